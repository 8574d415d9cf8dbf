// Sums of terms and the step of a decoder layer, for the module fewbits.kernels._native.
#pragma once
#include <nanobind/nanobind.h>

namespace fewbits {

void bind_sums(nanobind::module_& module);

}  // namespace fewbits

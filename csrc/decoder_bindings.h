// Steps of a decoder layer, and of all of a model's, for the module fewbits.kernels._native.
#pragma once
#include <nanobind/nanobind.h>

namespace fewbits {

void bind_decoder(nanobind::module_& module);

}  // namespace fewbits

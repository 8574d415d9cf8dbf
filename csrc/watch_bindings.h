// Whether objects of Python are still what they were, for the module fewbits.kernels._native.
#pragma once
#include <nanobind/nanobind.h>

namespace fewbits {

void bind_watch(nanobind::module_& module);

}  // namespace fewbits

// Sums of terms, for the module fewbits.kernels._native.
#pragma once
#include <nanobind/nanobind.h>

#include "reader.h"
#include "sum.h"

namespace fewbits {

// How many terms, each behind whether it has an inner factor; how many biases, and the type of each.
Sum read_sum(Reader& reader);

void bind_sums(nanobind::module_& module);

}  // namespace fewbits

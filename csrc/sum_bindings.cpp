// Sums of terms, for the module fewbits.kernels._native. Everything is checked here, before a kernel reads.
#include "sum_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "reader.h"
#include "runtime.h"

namespace nb = nanobind;

namespace fewbits {

Sum read_sum(Reader& reader) {
  Sum sum;
  for (int64_t left = reader.next(1, 64); left > 0; --left) {
    Summand term;
    const bool has_inner = reader.next(0, 1) == 1;
    term.matrix = &reader.read_any();
    term.inner = has_inner ? &reader.read_any() : nullptr;
    require(!has_inner || term.matrix->columns == term.inner->rows, "the factors of a term cannot be multiplied");
    const int64_t columns = has_inner ? term.inner->columns : term.matrix->columns;
    if (sum.terms.empty()) sum.rows = term.matrix->rows, sum.columns = columns;
    require(term.matrix->rows == sum.rows && columns == sum.columns, "terms of different shapes cannot be added");
    sum.terms.push_back(term);
  }
  for (int64_t left = reader.next(0, 2); left > 0; --left) {
    const Number number = to_number(reader.next(0, 2));
    sum.biases.push_back({reader.next_buffer(sum.rows * size_of(number)), number});
  }
  return sum;
}

namespace {

using Layout = std::vector<int64_t>;
using Buffers = std::vector<uint64_t>;

// `sizes` are the columns of all sums, and the rows of each.
void multiply_sums_of(const std::string& isa, const Layout& layout, const Buffers& buffers, uint64_t inputs, const Buffers& outputs, const Layout& sizes,
                      int64_t vectors, int64_t number, int threads, int digits) {
  Reader reader(layout, buffers);
  std::vector<Sum> sums;
  require(sizes.size() == outputs.size() + 1, "each sum has rows and outputs");
  for (size_t i = 0; i < outputs.size(); ++i) {
    sums.push_back(read_sum(reader));
    const Sum& sum = sums.back();
    require(sum.columns == sizes[0] && sum.rows == sizes[i + 1], "a sum has other rows or columns than its outputs and inputs");
    require(vectors >= 0 && vectors <= largest / std::max(sum.rows, sum.columns), "the number of vectors is out of range");
  }
  reader.finish();
  require(digits >= 1 && digits <= 3, "inputs must have 1 to 3 digits");
  std::vector<void*> places;
  for (const uint64_t output : outputs) places.push_back(reinterpret_cast<void*>(output));
  const Kernels& kernels = find_kernels(isa);
  nb::gil_scoped_release released;
  multiply_sums(kernels, sums, reinterpret_cast<const void*>(inputs), places, vectors, to_number(number), threads, digits);
}

}  // namespace

void bind_sums(nb::module_& module) {
  module.def("multiply_sums", &multiply_sums_of, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("inputs"), nb::arg("outputs"), nb::arg("sizes"), nb::arg("vectors"),
             nb::arg("number"), nb::arg("threads"), nb::arg("digits") = 3, "Products of sums of matrices with the same inputs.");
}

}  // namespace fewbits

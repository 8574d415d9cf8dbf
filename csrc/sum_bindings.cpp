// Sums of terms, for the module fewbits.kernels._native. Everything is checked here, before a kernel reads.
#include "sum_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "panels.h"
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

// Sums that were read once. `sizes` are the columns of all, and the rows of each. Their memory is their maker's, who sees that it stays where it is.
class Sums {
 public:
  Sums(const std::string& isa, Layout layout, Buffers buffers, const Layout& sizes)
      : layout_(std::move(layout)), buffers_(std::move(buffers)), reader_(layout_, buffers_), kernels_(find_kernels(isa)) {
    require(!sizes.empty(), "there must be columns");
    most_ = sizes[0];
    for (size_t i = 1; i < sizes.size(); ++i) {
      const Sum& sum = sums_.emplace_back(read_sum(reader_));
      require(sum.columns == sizes[0] && sum.rows == sizes[i], "a sum has other rows or columns than its outputs and inputs");
      most_ = std::max(most_, sum.rows);
    }
    reader_.finish();
  }
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;

  void multiply(uint64_t inputs, const Buffers& outputs, int64_t vectors, int64_t number, int threads, int digits) const {
    require(outputs.size() == sums_.size(), "each sum has outputs");
    require(vectors >= 0 && vectors <= largest / most_, "the number of vectors is out of range");
    require(digits >= 1 && digits <= 3, "inputs must have 1 to 3 digits");
    std::vector<void*> places;
    for (const uint64_t output : outputs) places.push_back(reinterpret_cast<void*>(output));
    const Number type = to_number(number);
    const void* from = reinterpret_cast<const void*>(inputs);
    nb::gil_scoped_release released;
    if (const Coded* only = only_matrix()) {
      if (multiply_in_panels(kernels_, {only, from, places[0], vectors, type, digits}, threads)) return;
    }
    multiply_sums(kernels_, sums_, from, places, vectors, type, threads, digits);
  }

 private:
  const Coded* only_matrix() const {
    if (sums_.size() != 1 || sums_[0].terms.size() != 1 || !sums_[0].biases.empty()) return nullptr;
    return sums_[0].terms[0].inner == nullptr ? sums_[0].terms[0].matrix : nullptr;
  }

  Layout layout_;  // which the matrices point into
  Buffers buffers_;
  Reader reader_;
  std::vector<Sum> sums_;
  int64_t most_ = 0;  // columns, or rows of a sum
  const Kernels& kernels_;
};

}  // namespace

void bind_sums(nb::module_& module) {
  nb::class_<Sums>(module, "Sums", "Sums of matrices whose layouts were read, to be multiplied often with the same inputs.")
      .def(nb::init<std::string, Layout, Buffers, Layout>(), nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("sizes"))
      .def("multiply", &Sums::multiply, nb::arg("inputs"), nb::arg("outputs"), nb::arg("vectors"), nb::arg("number"), nb::arg("threads"),
           nb::arg("digits") = 3, "Each sum's product with the inputs.");
}

}  // namespace fewbits

// Sums of terms and the step of a decoder layer, for the module fewbits.kernels._native. Everything is checked here, before a kernel reads.
#include "sum_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "decoder_step.h"
#include "reader.h"
#include "runtime.h"

namespace nb = nanobind;

namespace fewbits {
namespace {

using Layout = std::vector<int64_t>;
using Buffers = std::vector<uint64_t>;

// How many terms, each behind whether it has an inner factor; how many biases, and the type of each.
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

// A layer that was read once. `layout` has the type of numbers, heads of queries and of keys, the width of a head and whether heads have norms of
// their own; then the sums of queries, keys, values, output, gate, up and down. Buffers behind them are the norms' weights.
class DecoderStep {
 public:
  DecoderStep(Layout layout, Buffers buffers, const std::vector<double>& epsilons) : layout_(std::move(layout)), buffers_(std::move(buffers)), reader_(layout_, buffers_) {
    layer_.number = to_number(reader_.next(0, 2));
    layer_.heads = reader_.next(1, 1 << 16);
    layer_.key_heads = reader_.next(1, 1 << 16);
    layer_.width = reader_.next(2, 1 << 16);
    const bool norms = reader_.next(0, 1) == 1;
    for (Sum* sum : {&layer_.query, &layer_.key, &layer_.value, &layer_.output, &layer_.gate, &layer_.up, &layer_.down}) *sum = read_sum(reader_);
    layer_.hidden = layer_.query.columns;
    layer_.between = layer_.gate.rows;
    require(epsilons.size() == (norms ? 4 : 2), "each norm has a number of its own");
    layer_.before_attention = read_norm(layer_.hidden, epsilons[0]);
    layer_.before_mlp = read_norm(layer_.hidden, epsilons[1]);
    if (norms) layer_.of_queries = read_norm(layer_.width, epsilons[2]), layer_.of_keys = read_norm(layer_.width, epsilons[3]);
    reader_.finish();
    check();
  }
  DecoderStep(const DecoderStep&) = delete;
  DecoderStep& operator=(const DecoderStep&) = delete;

  // Addresses and sizes of the states, of cosines and sines, and of what is written: queries, keys and values.
  void before(const std::string& isa, const Buffers& buffers, int64_t tokens, int64_t positions, int threads, int digits) const {
    check_call(tokens, digits);
    require(positions >= 1 && positions <= tokens, "there must be a position for each token, or for some that all sequences share");
    const int64_t angles = positions * layer_.width, keys = tokens * layer_.key.rows;
    const std::vector<void*> at = read(buffers, {tokens * layer_.hidden, angles, angles, tokens * layer_.query.rows, keys, keys});
    const Kernels& kernels = find_kernels(isa);
    nb::gil_scoped_release released;
    before_attention(kernels, layer_, {at[0], at[1], at[2], tokens, positions, at[3], at[4], at[5]}, threads, digits);
  }

  // Addresses and sizes of what attention gave, of the layer's own inputs, and of what is written.
  void after(const std::string& isa, const Buffers& buffers, int64_t tokens, int threads, int digits) const {
    check_call(tokens, digits);
    const std::vector<void*> at = read(buffers, {tokens * layer_.output.columns, tokens * layer_.hidden, tokens * layer_.hidden});
    const Kernels& kernels = find_kernels(isa);
    nb::gil_scoped_release released;
    after_attention(kernels, layer_, {at[0], at[1], at[2], tokens}, threads, digits);
  }

 private:
  Norm read_norm(int64_t size, double epsilon) { return {reader_.next_buffer(size * size_of(layer_.number)), size, static_cast<float>(epsilon)}; }

  void check() const {
    const auto is = [](const Sum& sum, int64_t rows, int64_t columns) { return sum.rows == rows && sum.columns == columns; };
    const int64_t keys = layer_.key_heads * layer_.width, queries = layer_.heads * layer_.width, hidden = layer_.hidden, between = layer_.between;
    require(layer_.width % 2 == 0, "the channels of a head must be pairs");
    require(is(layer_.query, queries, hidden) && is(layer_.key, keys, hidden) && is(layer_.value, keys, hidden), "queries, keys or values do not fit the heads");
    require(is(layer_.output, hidden, queries), "the output does not fit the heads");
    require(is(layer_.gate, between, hidden) && is(layer_.up, between, hidden) && is(layer_.down, hidden, between), "gate, up and down do not fit");
  }

  void check_call(int64_t tokens, int digits) const {
    const int64_t most = std::max({layer_.hidden, layer_.between, layer_.query.rows});
    require(tokens >= 1 && tokens <= largest / most, "the number of tokens is out of range");
    require(digits >= 1 && digits <= 3, "inputs must have 1 to 3 digits");
  }

  std::vector<void*> read(const Buffers& buffers, const std::vector<int64_t>& counts) const {
    require(buffers.size() == 2 * counts.size(), "there are more or fewer buffers than the step has");
    std::vector<void*> found;
    for (size_t i = 0; i < counts.size(); ++i) {
      const uint64_t bytes = static_cast<uint64_t>(counts[i] * size_of(layer_.number));
      require(buffers[2 * i] != 0 && buffers[2 * i + 1] == bytes, "a buffer is not of the size that the step needs");
      found.push_back(reinterpret_cast<void*>(buffers[2 * i]));
    }
    return found;
  }

  Layout layout_;  // which the matrices point into
  Buffers buffers_;
  Reader reader_;
  DecoderLayer layer_;
};

}  // namespace

void bind_sums(nb::module_& module) {
  module.def("multiply_sums", &multiply_sums_of, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("inputs"), nb::arg("outputs"), nb::arg("sizes"), nb::arg("vectors"),
             nb::arg("number"), nb::arg("threads"), nb::arg("digits") = 3, "Products of sums of matrices with the same inputs.");
  nb::class_<DecoderStep>(module, "DecoderStep", "A decoder layer's computing for a few tokens, without its attention.")
      .def(nb::init<Layout, Buffers, std::vector<double>>(), nb::arg("layout"), nb::arg("buffers"), nb::arg("epsilons"))
      .def("before", &DecoderStep::before, nb::arg("isa"), nb::arg("buffers"), nb::arg("tokens"), nb::arg("positions"), nb::arg("threads"), nb::arg("digits"),
           "Norm, queries, keys and values, and their rotation.")
      .def("after", &DecoderStep::after, nb::arg("isa"), nb::arg("buffers"), nb::arg("tokens"), nb::arg("threads"), nb::arg("digits"),
           "Output, norm, gate, up and down, and what they are added to.");
}

}  // namespace fewbits

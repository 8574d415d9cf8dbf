// Steps of a decoder layer, and of all of a model's, for the module fewbits.kernels._native. Everything is checked here, before a kernel reads.
#include "decoder_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>

#include "decoder_stack.h"
#include "decoder_step.h"
#include "reader.h"
#include "runtime.h"
#include "sum_bindings.h"

namespace nb = nanobind;

namespace fewbits {
namespace {

using Layout = std::vector<int64_t>;
using Buffers = std::vector<uint64_t>;

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

  const DecoderLayer& layer() const { return layer_; }

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

// Layers one behind another, which live as long as it does. `norm` is the address and the size of the weight of the norm behind them, or nothing.
class DecoderStack {
 public:
  DecoderStack(std::vector<nb::object> steps, const Buffers& norm, double epsilon, double scale) : steps_(std::move(steps)) {
    for (const nb::object& step : steps_) layers_.push_back(&nb::cast<const DecoderStep&>(step).layer());
    require(!layers_.empty(), "a stack has layers");
    const DecoderLayer& first = *layers_[0];
    for (const DecoderLayer* layer : layers_) {
      require(layer->hidden == first.hidden && layer->width == first.width && layer->number == first.number, "layers of a stack must have one width and one type of numbers");
      require(layer->width % 8 == 0 && layer->heads % layer->key_heads == 0, "a head must have a multiple of 8 channels, and a head of keys as many heads of queries");
    }
    std::optional<Norm> last;
    if (!norm.empty()) {
      require(norm.size() == 2 && norm[0] != 0 && norm[1] == static_cast<uint64_t>(first.hidden * size_of(first.number)), "the norm behind the layers does not fit");
      last = Norm{reinterpret_cast<const void*>(norm[0]), first.hidden, static_cast<float>(epsilon)};
    }
    stack_.reset(new Stack(layers_, last, static_cast<float>(scale)));
  }

  // Addresses and sizes of the states, of cosines and sines, and of what is written; of each layer's keys and values. False where another thread
  // is in the stack: then nothing was computed.
  bool run(const std::string& isa, const Buffers& buffers, const Buffers& kept, int64_t before, int threads, int digits) {
    const DecoderLayer& first = *layers_[0];
    const int64_t item = size_of(first.number), states = first.hidden * item, angles = first.width * item;
    require(buffers.size() == 8 && kept.size() == 4 * layers_.size(), "there are more or fewer buffers than the stack has");
    const int64_t sizes[] = {states, angles, angles, states};
    for (size_t i = 0; i < 4; ++i) require(buffers[2 * i] != 0 && buffers[2 * i + 1] == static_cast<uint64_t>(sizes[i]), "a buffer is not of the size that the stack needs");
    require(before >= 0 && before < largest / (first.width * item), "the number of tokens is out of range");
    require(digits >= 1 && digits <= 3, "inputs must have 1 to 3 digits");
    std::vector<Kept> places;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const int64_t each = layers_[i]->key_heads * first.width * item;
      const uint64_t* of = kept.data() + 4 * i;
      const int64_t room = static_cast<int64_t>(of[1] / static_cast<uint64_t>(each));
      require(of[0] != 0 && of[2] != 0 && of[1] == of[3] && static_cast<uint64_t>(room * each) == of[1] && before < room, "there is no room for the token's keys and values");
      places.push_back({reinterpret_cast<void*>(of[0]), reinterpret_cast<void*>(of[2]), room});
    }
    const auto at = [&](size_t i) { return reinterpret_cast<void*>(buffers[2 * i]); };
    const Token token{at(0), at(1), at(2), at(3), before};
    nb::gil_scoped_release released;
    std::unique_lock<std::mutex> mine(running_, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    stack_->run(isa, token, places, threads, digits);
    return true;
  }

 private:
  const std::vector<nb::object> steps_;
  std::vector<const DecoderLayer*> layers_;
  std::unique_ptr<Stack> stack_;
  std::mutex running_;
};

}  // namespace

void bind_decoder(nb::module_& module) {
  nb::class_<DecoderStep>(module, "DecoderStep", "A decoder layer's computing for a few tokens, without its attention.")
      .def(nb::init<Layout, Buffers, std::vector<double>>(), nb::arg("layout"), nb::arg("buffers"), nb::arg("epsilons"))
      .def("before", &DecoderStep::before, nb::arg("isa"), nb::arg("buffers"), nb::arg("tokens"), nb::arg("positions"), nb::arg("threads"), nb::arg("digits"),
           "Norm, queries, keys and values, and their rotation.")
      .def("after", &DecoderStep::after, nb::arg("isa"), nb::arg("buffers"), nb::arg("tokens"), nb::arg("threads"), nb::arg("digits"),
           "Output, norm, gate, up and down, and what they are added to.");
  nb::class_<DecoderStack>(module, "DecoderStack", "The layers of a decoder for one token, with their attention.")
      .def(nb::init<std::vector<nb::object>, Buffers, double, double>(), nb::arg("steps"), nb::arg("norm"), nb::arg("epsilon"), nb::arg("scale"))
      .def("run", &DecoderStack::run, nb::arg("isa"), nb::arg("buffers"), nb::arg("kept"), nb::arg("before"), nb::arg("threads"), nb::arg("digits"),
           "A token's way through all layers; its keys and values are written behind those that are kept.");
}

}  // namespace fewbits

// Transforms of the inputs of a product, vector by vector, and matrices the other way round.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "runtime.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t few = 1 << 15;  // numbers that one thread is through with before another is awake

// Indices as they are packed: a little-endian stream, up to 32 bits each.
std::vector<uint32_t> unpack_order(const Reordering& job) {
  std::vector<uint32_t> order(static_cast<size_t>(job.features));
  const uint64_t mask = (uint64_t{1} << job.bits) - 1;
  uint32_t largest = 0;
  for (int64_t i = 0; i < job.features; ++i) {
    const int64_t bit = i * job.bits, left = job.bytes - bit / 8;
    uint64_t word = 0;
    std::memcpy(&word, job.order + bit / 8, left >= 8 ? 8 : static_cast<size_t>(left));
    order[static_cast<size_t>(i)] = static_cast<uint32_t>(word >> (bit % 8) & mask);
    largest = std::max(largest, order[static_cast<size_t>(i)]);
  }
  if (static_cast<int64_t>(largest) >= job.features) throw std::invalid_argument("an order names a feature that there is not");
  return order;
}

template <typename Item>
void gather(const Item* from, const std::vector<uint32_t>& order, Item* to) {
  for (size_t i = 0; i < order.size(); ++i) to[i] = from[order[i]];
}

// A block the other way round, a few columns at a time: what is written then stays in the first cache until it is whole.
template <typename Item>
void transpose(const Item* from, int64_t rows, int64_t columns, Item* to) {
  constexpr int64_t strip = 16;
  for (int64_t first = 0; first < columns; first += strip) {
    const int64_t count = std::min(strip, columns - first);
    for (int64_t row = 0; row < rows; ++row) {
      const Item* here = from + row * columns + first;
      Item* there = to + first * rows + row;
      for (int64_t c = 0; c < count; ++c) there[c * rows] = here[c];
    }
  }
}

template <typename Item>
void transpose_block(const Transposition& job, int64_t block) {
  const int64_t at = block * job.rows * job.columns;
  transpose(static_cast<const Item*>(job.inputs) + at, job.rows, job.columns, static_cast<Item*>(job.outputs) + at);
}

}  // namespace

void rotate(const Kernels& kernels, const Rotation& given, int threads) {
  struct Job {
    const Kernels& kernels;
    const Rotation& given;
    std::vector<float> scratch;
  };
  threads = given.vectors * given.size < few ? 1 : std::max(threads, 1);
  Job job{kernels, given, std::vector<float>(static_cast<size_t>(2 * given.size * threads))};
  const auto work = [](void* context, int64_t vector, int worker) {
    Job& job = *static_cast<Job*>(context);
    job.kernels.rotate(job.given, vector, job.scratch.data() + worker * 2 * job.given.size);
  };
  run_tasks(threads, given.vectors, work, &job);
}

void reorder(const Reordering& given, int threads) {
  struct Job {
    const Reordering& given;
    std::vector<uint32_t> order;
  };
  Job job{given, unpack_order(given)};
  const auto work = [](void* context, int64_t vector, int) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t at = vector * job.given.features;
    if (job.given.item == 4) gather(static_cast<const uint32_t*>(job.given.inputs) + at, job.order, static_cast<uint32_t*>(job.given.outputs) + at);
    else gather(static_cast<const uint16_t*>(job.given.inputs) + at, job.order, static_cast<uint16_t*>(job.given.outputs) + at);
  };
  run_tasks(given.vectors * given.features < few ? 1 : std::max(threads, 1), given.vectors, work, &job);
}

void transpose_blocks(const Transposition& given, int threads) {
  const auto work = [](void* context, int64_t block, int) {
    const Transposition& job = *static_cast<const Transposition*>(context);
    if (job.item == 4) transpose_block<uint32_t>(job, block);
    else if (job.item == 2) transpose_block<uint16_t>(job, block);
    else transpose_block<uint8_t>(job, block);
  };
  Transposition job = given;
  run_tasks(given.blocks * given.rows * given.columns < few ? 1 : std::max(threads, 1), given.blocks, work, &job);
}

}  // namespace fewbits

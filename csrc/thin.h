// Matrices of plain numbers: the factors of a low-rank term, few long rows or many short ones, and layers that were not compressed.
#pragma once
#include "addition_lanes.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace additions {
namespace thin {

constexpr int64_t slab = 2048;       // numbers that are read at once
constexpr int64_t short_row = 512;  // columns up to which rows are multiplied by as many as there are lanes, and not by fours

static inline int64_t item_bytes(const Coded& w) { return w.number == Number::f32 ? 4 : 2; }
static inline int64_t padded_columns(const Coded& w) { return rounded_up(w.columns, two); }
static inline int64_t slab_rows(const Coded& w) { return slab / w.columns > 1 ? slab / w.columns : 1; }
static int64_t scratch_floats(const Coded& w) { return slab_rows(w) * w.columns + two; }
static int64_t prepared_floats(const Product& product) { return padded_columns(*product.matrix) * product.vectors; }

// Whether rows of one vector are read where they are, `two` numbers at a time.
static inline bool read_in_place(const Coded& w) { return w.columns > short_row || w.columns % two == 0; }

// Inputs as floats: of one vector in the order in which `load_two` reads weights.
static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  const int64_t padded = padded_columns(w), at = vector * w.columns;
  float* to = room + vector * padded;
  const bool apart = product.vectors == 1 && w.number == Number::bf16 && read_in_place(w);
  int64_t c = 0;
  if (apart && product.number == Number::bf16) {
    for (; c + two <= w.columns; c += two) {
      Floats both[2];
      load_two<Number::bf16>(static_cast<const uint8_t*>(product.inputs) + 2 * (at + c), both);
      store(to + c, both[0]), store(to + c + lanes, both[1]);
    }
  }
  read_numbers(static_cast<const uint8_t*>(product.inputs), at + c, product.number, w.columns - c, to + c);
  for (int64_t i = w.columns; i < padded; ++i) to[i] = 0.0f;
  for (; c < padded && apart; c += two) {
    float ordered[two];
    std::memcpy(ordered, to + c, sizeof ordered);
    for (int i = 0; i < lanes; ++i) to[c + i] = ordered[2 * i], to[c + lanes + i] = ordered[2 * i + 1];
  }
}

// What is fetched is some 16 KiB ahead, in whole rows.
static inline int64_t bytes_ahead(int64_t bytes) { return least(rounded_up(1 << 14, bytes), 64 * bytes); }

// One vector and long rows, by fours, from where they are.
template <Number Is>
static void multiply_long_rows(const Product& product, const float* inputs, int64_t first, int64_t last) {
  constexpr int64_t item = Is == Number::f32 ? 4 : 2;
  const Coded& w = *product.matrix;
  const int64_t bytes = item * w.columns, whole = w.columns / two * two, ahead = bytes_ahead(bytes);
  for (int64_t row = first; row < last; row += 4) {
    const int64_t few = least(4, last - row);
    const uint8_t* weights[4];
    for (int64_t r = 0; r < 4; ++r) weights[r] = w.codes + (row + least(r, few - 1)) * bytes;
    Floats sums[4][2] = {{zeros(), zeros()}, {zeros(), zeros()}, {zeros(), zeros()}, {zeros(), zeros()}};
    const auto step = [&](const uint8_t* from, int64_t c, int r) {
      Floats both[2];
      load_two<Is>(from, both);
      sums[r][0] = multiply_add(both[0], load(inputs + c), sums[r][0]);
      sums[r][1] = multiply_add(both[1], load(inputs + c + lanes), sums[r][1]);
    };
    for (int64_t c = 0; c < whole; c += two) {
      const bool line = item * c % 64 == 0;
      for (int r = 0; r < 4; ++r) {
        if (line) __builtin_prefetch(weights[r] + item * c + ahead, 0, 2);
        step(weights[r] + item * c, c, r);
      }
    }
    for (int r = 0; r < 4 && whole < w.columns; ++r) {
      alignas(64) uint8_t rest[item * two] = {};
      std::memcpy(rest, weights[r] + item * whole, static_cast<size_t>(item * (w.columns - whole)));
      step(rest, whole, r);
    }
    float found[4];
    sum_four(add(sums[0][0], sums[0][1]), add(sums[1][0], sums[1][1]), add(sums[2][0], sums[2][1]), add(sums[3][0], sums[3][1]), found);
    for (int64_t r = 0; r < few; ++r) put_one(product, 0, row + r, found[r]);
  }
}

// One vector and short rows from where they are, one for each lane: what lanes hold is added up for all at once.
template <Number Is>
static inline __attribute__((always_inline)) Floats multiply_lanes(const uint8_t* from, int64_t bytes, const float* inputs, int64_t columns) {
  constexpr int64_t item = Is == Number::f32 ? 4 : 2;
  Floats sums[lanes];
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) sums[r] = zeros();
  for (int64_t c = 0; c < columns; c += two) {
    const Floats first = load(inputs + c), second = load(inputs + c + lanes);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      Floats both[2];
      load_two<Is>(from + r * bytes + item * c, both);
      sums[r] = multiply_add(both[1], second, multiply_add(both[0], first, sums[r]));
    }
  }
  return sum_all(sums);
}

template <Number Is>
static void multiply_short_rows(const Product& product, const float* inputs, int64_t first, int64_t last) {
  constexpr int64_t item = Is == Number::f32 ? 4 : 2;
  const Coded& w = *product.matrix;
  const int64_t bytes = item * w.columns, ahead = 1 << 12;
  int64_t row = first;
  for (; row + lanes <= last; row += lanes) {
    const uint8_t* from = w.codes + row * bytes;
    for (int64_t at = 0; at < lanes * bytes; at += 64) __builtin_prefetch(from + at + ahead, 0, 2);
    put_lanes(product, row, lanes, multiply_lanes<Is>(from, bytes, inputs, w.columns));
  }
  for (; row < last; ++row) {
    Floats total = zeros();
    for (int64_t c = 0; c < w.columns; c += two) {
      Floats both[2];
      load_two<Is>(w.codes + row * bytes + item * c, both);
      total = multiply_add(both[1], load(inputs + c + lanes), multiply_add(both[0], load(inputs + c), total));
    }
    put_one(product, 0, row, sum(total));
  }
}

// One vector and short rows that end inside of lanes: many at a time are made floats first.
static void multiply_odd_rows(const Product& product, const float* inputs, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t at_once = slab_rows(w);
  for (int64_t begin = first; begin < last; begin += at_once) {
    const int64_t count = least(at_once, last - begin);
    read_numbers(w.codes, begin * w.columns, w.number, count * w.columns, scratch);
    for (int64_t row = 0; row < count; row += lanes) {
      const int64_t few = least(lanes, count - row);
      Floats sums[lanes];
      for (int r = 0; r < lanes; ++r) sums[r] = zeros();
      for (int64_t c = 0; c < w.columns; c += lanes) {
        const uint64_t there = (uint64_t{1} << least(lanes, w.columns - c)) - 1;
        for (int r = 0; r < few; ++r) sums[r] = multiply_add(load_some(scratch + (row + r) * w.columns + c, there), load(inputs + c), sums[r]);
      }
      put_lanes(product, begin + row, few, sum_all(sums));
    }
  }
}

// A row that was made floats times four vectors, of which there may be fewer: `whole` columns, and the rest with zeros behind.
static inline void multiply_four(const float* weights, const float* rest, int64_t whole, int64_t columns, const float* const* inputs, float* found) {
  Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
  for (int64_t c = 0; c < whole; c += lanes) {
    const Floats weight = load(weights + c);
    for (int v = 0; v < 4; ++v) sums[v] = multiply_add(weight, load(inputs[v] + c), sums[v]);
  }
  if (whole < columns) for (int v = 0; v < 4; ++v) sums[v] = multiply_add(load(rest), load(inputs[v] + whole), sums[v]);
  sum_four(sums[0], sums[1], sums[2], sums[3], found);
}

static void multiply_vectors(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t rows = slab_rows(w), whole = w.columns / lanes * lanes, padded = padded_columns(w), bytes = w.columns * item_bytes(w);
  for (int64_t row = first; row < last; row += rows) {
    const int64_t count = least(rows, last - row), next = least(rows, last - row - count) * bytes;
    for (int64_t at = 0; at < next; at += 64) __builtin_prefetch(w.codes + (row + count) * bytes + at, 0, 2);
    read_numbers(w.codes, row * w.columns, w.number, count * w.columns, scratch);
    for (int64_t r = 0; r < count; ++r) {
      const float* weights = scratch + r * w.columns;
      float rest[lanes] = {};
      for (int64_t c = whole; c < w.columns; ++c) rest[c - whole] = weights[c];
      for (int64_t v = 0; v < product.vectors; v += 4) {
        const float* inputs[4];
        for (int64_t i = 0; i < 4; ++i) inputs[i] = prepared + least(v + i, product.vectors - 1) * padded;
        float found[4];
        multiply_four(weights, rest, whole, w.columns, inputs, found);
        for (int64_t i = 0; i < least(4, product.vectors - v); ++i) put_one(product, v + i, row + r, found[i]);
      }
    }
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  if (product.vectors > 1) return multiply_vectors(product, prepared, first, last, scratch);
  if (!read_in_place(w)) return multiply_odd_rows(product, prepared, first, last, scratch);
  for_number(w.number, [&](auto type) {
    if (w.columns > short_row) multiply_long_rows<decltype(type)::value>(product, prepared, first, last);
    else multiply_short_rows<decltype(type)::value>(product, prepared, first, last);
  });
}

}  // namespace thin
}  // namespace additions
}  // namespace FEWBITS_ISA
}  // namespace fewbits

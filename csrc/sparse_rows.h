// Few entries in compressed sparse rows. Their columns are looked at before they are followed: a matrix that points outside of itself is told,
// and no further read.
#pragma once
#include "addition_lanes.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace additions {
namespace sparse_rows {

constexpr int64_t run = 1024;  // entries that are read at once, of as many rows as have no more
constexpr int most = 16;       // vectors at a time

// Vectors side by side: as many as loops are written out for.
static inline int64_t padded_vectors(int64_t vectors) {
  if (vectors == 1) return 1;
  return vectors <= 4 ? 4 : vectors <= 8 ? 8 : rounded_up(vectors, most);
}

static int64_t scratch_floats() { return run + 64; }

// Whether inputs stay in bfloat16, so that the first cache holds more of them.
static inline bool stay_halves(const Product& product) { return product.vectors == 1 && product.given == Number::bf16; }

// Inputs as floats, all vectors of a column side by side, behind them room for each vector; or bfloat16 behind one line, so that there is
// something before the first.
static int64_t prepared_floats(const Product& product) {
  const int64_t vectors = padded_vectors(product.vectors);
  return 32 + rounded_up(product.matrix->columns, lanes) * (vectors == 1 ? 1 : vectors + product.vectors);
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  const int64_t vectors = padded_vectors(product.vectors);
  if (stay_halves(product)) return static_cast<void>(std::memcpy(reinterpret_cast<uint8_t*>(room) + 64, product.inputs, static_cast<size_t>(2 * w.columns)));
  float* to = vectors == 1 ? room : room + (vectors + vector) * rounded_up(w.columns, lanes);
  read_numbers(product.inputs, vector * w.columns, product.number, w.columns, to);
  if (vectors > 1) for (int64_t c = 0; c < w.columns; ++c) room[c * vectors + vector] = to[c];
}

static bool point_inside(const Coded& w, int64_t first, int64_t last) {
  const int32_t end = static_cast<int32_t>(least(w.entries, INT32_MAX));
  const int32_t* from = w.pointers;
  int32_t broken = from[first] < 0;
  for (int64_t row = first; row < last; ++row) broken |= (from[row] > from[row + 1]) | (from[row + 1] > end);
  return broken == 0;
}

template <typename Index>
static bool all_below(const Index* indices, int64_t count, int64_t columns) {
  Index largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = indices[i] > largest ? indices[i] : largest;
  return static_cast<int64_t>(largest) < columns;
}

// Entries times the inputs of their columns: whose rows they are is not asked, so that no branch is. Those to come are fetched: they are read too
// fast for caches to notice by themselves.
template <Number Is, bool Halves, typename Index>
static void multiply_entries(const uint8_t* values, const Index* indices, int64_t count, const void* inputs, float* products) {
  constexpr int64_t item = Is == Number::f32 ? 4 : 2, soon = 256, later = 2048;
  const auto some = [&](const uint8_t* from, const Index* at, float* to) { store(to, multiply(load_lanes<Is>(from), gather<Halves>(inputs, at))); };
  constexpr int64_t lines = 64 / sizeof(uint16_t);  // entries between those that are fetched
  int64_t i = 0;
  for (; i + lines <= count; i += lines) {
    __builtin_prefetch(values + item * (i + soon), 0, 3);
    __builtin_prefetch(indices + i + soon, 0, 3);
    __builtin_prefetch(values + item * (i + later), 0, 2);
    __builtin_prefetch(indices + i + later, 0, 2);
#pragma GCC unroll 2
    for (int64_t part = i; part < i + lines; part += lanes) some(values + item * part, indices + part, products + part);
  }
  for (; i + lanes <= count; i += lanes) some(values + item * i, indices + i, products + i);
  if (i == count) return;
  if (count >= lanes) return some(values + item * (count - lanes), indices + count - lanes, products + count - lanes);  // some of them again
  alignas(64) uint8_t few[item * lanes] = {};
  Index places[lanes] = {};
  std::memcpy(few, values, static_cast<size_t>(item * count));
  std::memcpy(places, indices, sizeof(Index) * static_cast<size_t>(count));
  some(few, places, products);
}

// The sum of up to `Step` products in lanes, of which `count` are the row's and the others count as zero.
template <int Step>
static inline __attribute__((always_inline)) Floats lanes_of_row(const float* products, int32_t count) {
  const uint64_t there = (count < Step ? uint64_t{1} << (count & 63) : Step < 64 ? uint64_t{1} << (Step & 63) : 0) - 1;
  Floats total = load_some(products, there);
  for (int part = lanes; part < Step; part += lanes) total = add(total, load_some(products + part, there >> part));
  return total;
}

// The sums of rows' products, one row a lane. `products` lie as the entries do, from the first row's first one on; behind them a step may be read.
template <int Step>
static void add_up_rows(const Product& product, const float* products, int64_t row, int64_t rows) {
  const int32_t* pointers = product.matrix->pointers + row;
  const int32_t begin = pointers[0];
  const auto rest = [&](int64_t r, int32_t done) {
    float total = 0.0f;
    for (int32_t at = pointers[r] + done; at < pointers[r + 1]; at += Step) total += sum(lanes_of_row<Step>(products + (at - begin), pointers[r + 1] - at));
    return total;
  };
  const int64_t whole = rows / lanes * lanes;
  for (int64_t end = row + whole; row < end; row += lanes, pointers += lanes) {
    Floats sums[lanes];
    int32_t longer = 0;  // below zero where a row is longer than a step
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      const int32_t count = pointers[r + 1] - pointers[r];
      longer |= Step - count;
      sums[r] = lanes_of_row<Step>(products + (pointers[r] - begin), count);
    }
    Floats found = sum_all(sums);
    if (longer < 0) {
      float each[lanes];
      store(each, found);
      for (int r = 0; r < lanes; ++r) if (pointers[r + 1] - pointers[r] > Step) each[r] += rest(r, Step);
      found = load(each);
    }
    put_lanes(product, row, lanes, found);
  }
  for (int64_t r = 0; r < rows - whole; ++r) put_one(product, 0, row + r, rest(r, 0));
}

// Entries of a row times the inputs of their columns, `Width` vectors side by side.
template <int Width, typename Index>
static inline void add_entries(const float* values, const Index* indices, int64_t count, const float* inputs, int64_t vectors, float* sums) {
  float found[Width];
  for (int v = 0; v < Width; ++v) found[v] = sums[v];
  for (int64_t i = 0; i < count; ++i) {
    const float* from = inputs + static_cast<int64_t>(indices[i]) * vectors;
    for (int v = 0; v < Width; ++v) found[v] += values[i] * from[v];
  }
  for (int v = 0; v < Width; ++v) sums[v] = found[v];
}

// Calls `add(sums, first vector)` for the vectors of a row, as many at a time as loops are written out for, and puts their sums.
template <typename Function>
static inline void put_vectors(const Product& product, int64_t row, Function add) {
  const int64_t vectors = padded_vectors(product.vectors);
  for (int64_t begin = 0; begin < vectors; begin += most) {
    float sums[most] = {};
    add(sums, begin);
    for (int64_t v = begin; v < least(begin + most, product.vectors); ++v) put_one(product, v, row, sums[v - begin]);
  }
}

template <typename Index>
static inline void add_vectors(const float* values, const Index* indices, int64_t count, const float* inputs, int64_t vectors, float* sums) {
  if (vectors == 4) return add_entries<4>(values, indices, count, inputs, vectors, sums);
  if (vectors == 8) return add_entries<8>(values, indices, count, inputs, vectors, sums);
  add_entries<most>(values, indices, count, inputs, vectors, sums);
}

// Entries of a row that is read a part at a time, times the inputs of one vector.
template <typename Index>
static float add_long(const Product& product, const float* values, const Index* indices, int64_t count, const float* inputs) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(inputs) + 32;
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i) total += values[i] * (stay_halves(product) ? as_float(static_cast<uint32_t>(halves[indices[i]]) << 16) : inputs[indices[i]]);
  return total;
}

// A row of more entries than are read at once.
template <typename Index>
static void multiply_long_row(const Product& product, const float* prepared, int64_t row, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t vectors = padded_vectors(product.vectors), from = w.pointers[row], to = w.pointers[row + 1];
  const Index* indices = static_cast<const Index*>(w.indices);
  if (!all_below(indices + from, to - from, w.columns)) return product.broken->store(true);
  put_vectors(product, row, [&](float* sums, int64_t vector) {
    for (int64_t at = from; at < to; at += run) {
      const int64_t count = least(run, to - at);
      read_numbers(w.codes, at, w.number, count, scratch);
      if (vectors > 1) add_vectors(scratch, indices + at, count, prepared + vector, vectors, sums);
      else sums[0] += add_long(product, scratch, indices + at, count, prepared);
    }
  });
}

// Rows whose entries are read together.
template <typename Index>
static void multiply_run(const Product& product, const float* prepared, int64_t row, int64_t rows, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t item = w.number == Number::f32 ? 4 : 2, from = w.pointers[row], count = w.pointers[row + rows] - from, vectors = padded_vectors(product.vectors);
  const Index* indices = static_cast<const Index*>(w.indices) + from;
  const uint8_t* values = w.codes + from * item;
  if (!all_below(indices, count, w.columns)) return product.broken->store(true);
  if (vectors == 1) {
    for_number(w.number, [&](auto type) {
      if (stay_halves(product)) multiply_entries<decltype(type)::value, true>(values, indices, count, reinterpret_cast<const uint8_t*>(prepared) + 62, scratch);
      else multiply_entries<decltype(type)::value, false>(values, indices, count, prepared, scratch);
    });
    return count > 24 * rows ? add_up_rows<64>(product, scratch, row, rows) : add_up_rows<32>(product, scratch, row, rows);
  }
  read_numbers(values, 0, w.number, count, scratch);
  for (int64_t last = row + rows; row < last; ++row) {
    const int64_t at = w.pointers[row] - from, entries = w.pointers[row + 1] - w.pointers[row];
    put_vectors(product, row, [&](float* sums, int64_t vector) { add_vectors(scratch + at, indices + at, entries, prepared + vector, vectors, sums); });
  }
}

template <typename Index>
static void multiply_as(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  if (!point_inside(w, first, last)) return product.broken->store(true);
  for (int64_t row = first; row < last;) {
    const int64_t from = w.pointers[row];
    int64_t next = row;  // rows that have one lane each, as many times as all their entries are read at once; or else fewer
    while (next + lanes <= last && w.pointers[next + lanes] - from <= run) next += lanes;
    if (next == row) for (++next; next < last && next < row + lanes && w.pointers[next + 1] - from <= run;) ++next;
    if (w.pointers[next] - from > run) multiply_long_row<Index>(product, prepared, row, scratch);
    else multiply_run<Index>(product, prepared, row, next - row, scratch);
    row = next;
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  if (product.matrix->index_bytes == 2) return multiply_as<uint16_t>(product, prepared, first, last, scratch);
  multiply_as<uint32_t>(product, prepared, first, last, scratch);
}

}  // namespace sparse_rows
}  // namespace additions
}  // namespace FEWBITS_ISA
}  // namespace fewbits

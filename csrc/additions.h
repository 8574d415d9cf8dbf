// What is added to a matrix of codes: few entries in compressed sparse rows, and the thin factors of a low-rank term.
#pragma once
#include "grid.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace additions {

constexpr int64_t slab = 2048;  // numbers that are read at once
constexpr int64_t usual_entries = 32;  // of a sparse row: so many are added up whether they are there or not

static inline int64_t padded_columns(const Coded& w) { return rounded_up(w.columns, lanes); }
static inline int64_t padded_vectors(int64_t vectors) { return vectors == 1 ? 1 : rounded_up(vectors, 4); }

// Inputs as floats: one vector after the other for plain numbers, all vectors of a column side by side for sparse rows.
static int64_t prepared_floats(const Product& product) {
  return padded_columns(*product.matrix) * (padded_vectors(product.vectors) + product.vectors);
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  if (vector >= product.vectors) return;
  const int64_t padded = padded_columns(w), vectors = padded_vectors(product.vectors);
  const bool apart = w.form == Coded::plain || product.vectors == 1;
  float* to = apart ? room + vector * padded : room + vectors * padded + vector * padded;
  read_numbers(product.inputs, vector * w.columns, product.number, w.columns, to);
  for (int64_t c = w.columns; c < padded; ++c) to[c] = 0.0f;
  if (!apart) for (int64_t c = 0; c < w.columns; ++c) room[c * vectors + vector] = to[c];
}

constexpr int64_t piece = slab / 4;  // columns that are read at once of four long rows

static inline int64_t slab_rows(const Coded& w) { return slab / padded_columns(w) > 1 ? slab / padded_columns(w) : 1; }

static int64_t scratch_floats(const Coded& w) {
  const int64_t plain = slab_rows(w) * w.columns + padded_columns(w) + lanes;
  const int64_t sparse = slab + usual_entries + lanes;
  return plain > sparse ? plain : sparse;
}

// Adds four rows' products with one vector up, over `count` columns whose inputs are zeros behind it up to a whole lane.
static inline __attribute__((always_inline)) void add_four(const float* const* weights, const float* inputs, int64_t count, Floats* sums) {
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    const Floats input = load(inputs + c);
    for (int r = 0; r < 4; ++r) sums[r] = multiply_add(load(weights[r] + c), input, sums[r]);
  }
  if (c == count) return;
  float rest[4][lanes] = {};
  for (int r = 0; r < 4; ++r) for (int64_t i = c; i < count; ++i) rest[r][i - c] = weights[r][i];
  for (int r = 0; r < 4; ++r) sums[r] = multiply_add(load(rest[r]), load(inputs + c), sums[r]);
}

// Four sums of lanes, of which the first `count` are outputs.
static inline __attribute__((always_inline)) void put_four(const Product& product, int64_t row, int64_t count, const Floats* sums) {
  float found[4];
  sum_four(sums[0], sums[1], sums[2], sums[3], found);
  for (int64_t r = 0; r < count; ++r) put_number(product.outputs, row + r, product.number, found[r]);
}

typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));
typedef uint32_t Wholes __attribute__((vector_size(4 * lanes)));

static inline Floats load_bf16(const uint8_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Wholes) << 16);
}

// One vector and bfloat16: rows by fours, from where they are.
static void multiply_bf16_once(const Product& product, const float* inputs, int64_t first, int64_t last) {
  const Coded& w = *product.matrix;
  const int64_t bytes = 2 * w.columns, whole = w.columns / lanes * lanes;
  const int64_t ahead = least(rounded_up(1 << 14, bytes), 64 * bytes);
  for (int64_t row = first; row < last; row += 4) {
    const int64_t few = least(4, last - row);
    const uint8_t* weights[4];
    for (int64_t r = 0; r < 4; ++r) weights[r] = w.codes + (row + least(r, few - 1)) * bytes;
    Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
    for (int64_t c = 0; c < whole; c += lanes) {
      const Floats input = load(inputs + c);
      const bool line = c % 32 == 0;
      for (int r = 0; r < 4; ++r) {
        if (line) __builtin_prefetch(weights[r] + 2 * c + ahead, 0, 2);
        sums[r] = multiply_add(load_bf16(weights[r] + 2 * c), input, sums[r]);
      }
    }
    if (whole < w.columns) {
      for (int r = 0; r < 4; ++r) {
        uint8_t rest[2 * lanes] = {};
        std::memcpy(rest, weights[r] + 2 * whole, static_cast<size_t>(2 * (w.columns - whole)));
        sums[r] = multiply_add(load_bf16(rest), load(inputs + whole), sums[r]);
      }
    }
    put_four(product, row, few, sums);
  }
}

// One vector: rows by fours, short ones many at a time into the scratch, long ones a piece at a time.
static void multiply_plain_once(const Product& product, const float* inputs, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const bool are_short = w.columns <= piece;
  const int64_t rows = are_short ? slab / w.columns / 4 * 4 : 4, bytes = w.columns * (w.number == Number::f32 ? 4 : 2);
  for (int64_t row = first; row < last; row += rows) {
    const int64_t count = least(rows, last - row), next = least(rows, last - row - count) * bytes;
    for (int64_t at = 0; at < next; at += 64) __builtin_prefetch(w.codes + (row + count) * bytes + at, 0, 2);
    if (are_short) read_numbers(w.codes, row * w.columns, w.number, count * w.columns, scratch);
    for (int64_t r = 0; r < count; r += 4) {
      const int64_t few = least(4, count - r);
      Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
      const float* weights[4];
      if (are_short) {
        for (int64_t i = 0; i < 4; ++i) weights[i] = scratch + (r + least(i, few - 1)) * w.columns;
        add_four(weights, inputs, w.columns, sums);
      }
      for (int64_t c = 0; c < w.columns && !are_short; c += piece) {
        const int64_t columns = least(piece, w.columns - c);
        for (int64_t i = 0; i < 4; ++i) weights[i] = scratch + least(i, few - 1) * piece;
        for (int64_t i = 0; i < few; ++i) read_numbers(w.codes, (row + i) * w.columns + c, w.number, columns, scratch + i * piece);
        add_four(weights, inputs + c, columns, sums);
      }
      put_four(product, row + r, few, sums);
    }
  }
}

static void multiply_plain(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  if (product.vectors == 1 && product.matrix->number == Number::bf16) return multiply_bf16_once(product, prepared, first, last);
  if (product.vectors == 1) return multiply_plain_once(product, prepared, first, last, scratch);
  const Coded& w = *product.matrix;
  const int64_t rows = slab_rows(w), whole = w.columns / lanes * lanes, padded = padded_columns(w), bytes = w.columns * (w.number == Number::f32 ? 4 : 2);
  for (int64_t row = first; row < last; row += rows) {
    const int64_t count = least(rows, last - row), next = least(rows, last - row - count) * bytes;
    for (int64_t at = 0; at < next; at += 64) __builtin_prefetch(w.codes + (row + count) * bytes + at, 0, 2);
    read_numbers(w.codes, row * w.columns, w.number, count * w.columns, scratch);
    for (int64_t r = 0; r < count; ++r) {
      const float* weights = scratch + r * w.columns;
      float rest[lanes] = {};
      for (int64_t c = whole; c < w.columns; ++c) rest[c - whole] = weights[c];
      for (int64_t v = 0; v < product.vectors; ++v) {
        const float* inputs = prepared + v * padded;
        Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};
        int64_t c = 0;
        for (; c + 4 * lanes <= whole; c += 4 * lanes) {
          for (int i = 0; i < 4; ++i) sums[i] = multiply_add(load(weights + c + i * lanes), load(inputs + c + i * lanes), sums[i]);
        }
        for (; c < whole; c += lanes) sums[0] = multiply_add(load(weights + c), load(inputs + c), sums[0]);
        if (whole < w.columns) sums[1] = multiply_add(load(rest), load(inputs + whole), sums[1]);
        put_number(product.outputs, v * w.rows + row + r, product.number, sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
      }
    }
  }
}

template <typename Index>
static bool all_below(const Index* indices, int64_t count, int64_t columns) {
  Index largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = indices[i] > largest ? indices[i] : largest;
  return static_cast<int64_t>(largest) < columns;
}

// Entries times the inputs of their columns, in the place of the entries: whose rows they are is not asked, so that no branch is.
template <typename Index>
static void multiply_entries(float* values, const Index* indices, int64_t count, const float* inputs) {
  typedef float Four __attribute__((vector_size(16)));
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    Index at[4];
    if constexpr (sizeof(Index) == 2) {  // in one load
      uint64_t all;
      std::memcpy(&all, indices + i, 8);
      for (int j = 0; j < 4; ++j) at[j] = static_cast<Index>(all >> (16 * j));
    } else {
      std::memcpy(at, indices + i, sizeof at);
    }
    Four some;
    std::memcpy(&some, values + i, 16);
    some *= Four{inputs[at[0]], inputs[at[1]], inputs[at[2]], inputs[at[3]]};
    std::memcpy(values + i, &some, 16);
  }
  for (; i < count; ++i) values[i] *= inputs[indices[i]];
}

// The sum of a row's products, in lanes; `usual_entries` from its first one on may be read, and count as zero where they are other rows'.
static inline __attribute__((always_inline)) Floats lanes_of_row(const float* products, int64_t count) {
  typedef int32_t Places __attribute__((vector_size(4 * lanes)));
  Places place;
  for (int lane = 0; lane < lanes; ++lane) place[lane] = lane;
  Floats total = zeros();
  const auto step = [&](int64_t at) {
    const Places here = reinterpret_cast<Places>(load(products + at)) & (place < static_cast<int32_t>(count - at));
    total = add(total, reinterpret_cast<Floats>(here));
  };
  for (int64_t at = 0; at < usual_entries; at += lanes) step(at);
  for (int64_t at = usual_entries; at < count; at += lanes) step(at);
  return total;
}

// Entries times the inputs of their columns, `width` vectors side by side.
template <typename Index>
static void add_entries(const float* values, const Index* indices, int64_t count, const float* inputs, int64_t vectors, int64_t width, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = inputs + static_cast<int64_t>(indices[i]) * vectors;
    for (int64_t v = 0; v < width; ++v) sums[v] += values[i] * from[v];
  }
}

// A row of more entries than are read at once.
template <typename Index>
static void multiply_long_row(const Product& product, const float* prepared, int64_t row, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t vectors = padded_vectors(product.vectors), from = w.pointers[row], to = w.pointers[row + 1];
  const Index* indices = static_cast<const Index*>(w.indices);
  constexpr int64_t most = 32;
  for (int64_t begin = 0; begin < vectors; begin += most) {
    float sums[most] = {};
    for (int64_t at = from; at < to; at += slab) {
      const int64_t count = least(slab, to - at);
      if (!all_below(indices + at, count, w.columns)) return product.broken->store(true);
      read_numbers(w.codes, at, w.number, count, scratch);
      add_entries(scratch, indices + at, count, prepared + begin, vectors, least(most, vectors - begin), sums);
    }
    for (int64_t v = begin; v < least(begin + most, product.vectors); ++v) put_number(product.outputs, v * w.rows + row, product.number, sums[v - begin]);
  }
}

// Indices, unsigned, are looked at before they are followed: a matrix that points outside of itself is told, and no further read.
// Entries are read many rows at a time, as a row has few of them.
template <typename Index>
static void multiply_sparse(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t vectors = padded_vectors(product.vectors), entry = w.number == Number::f32 ? 4 : 2;
  const Index* indices = static_cast<const Index*>(w.indices);
  constexpr int64_t most = 32;  // vectors at a time
  for (int64_t row = first; row < last; ++row) {
    if (w.pointers[row] < 0 || w.pointers[row] > w.pointers[row + 1] || w.pointers[row + 1] > w.entries) return product.broken->store(true);
  }
  for (int64_t row = first; row < last;) {
    const int64_t from = w.pointers[row];
    int64_t next = row + 1;  // rows whose entries are read together: one, or as many as the scratch holds
    while (next < last && w.pointers[next + 1] - from <= slab) ++next;
    if (next == row + 1 && w.pointers[next] - from > slab) {
      multiply_long_row<Index>(product, prepared, row++, scratch);
      continue;
    }
    const int64_t count = w.pointers[next] - from;
    for (int64_t at = 0; at < count * entry; at += 64) __builtin_prefetch(w.codes + (from + count) * entry + at, 0, 2);
    for (int64_t at = 0; at < count * w.index_bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(indices + from + count) + at, 0, 2);
    if (!all_below(indices + from, count, w.columns)) return product.broken->store(true);
    read_numbers(w.codes, from, w.number, count, scratch);
    if (vectors == 1) {
      multiply_entries(scratch, indices + from, count, prepared);
      for (; row < next; row += 4) {
        Floats sums[4];
        for (int64_t r = 0; r < 4; ++r) {
          const int64_t here = least(row + r, next - 1);
          sums[r] = lanes_of_row(scratch + (w.pointers[here] - from), w.pointers[here + 1] - w.pointers[here]);
        }
        put_four(product, row, least(4, next - row), sums);
      }
      row = next;
      continue;
    }
    for (; row < next; ++row) {
      const float* values = scratch + (w.pointers[row] - from);
      const Index* places = indices + w.pointers[row];
      const int64_t entries = w.pointers[row + 1] - w.pointers[row];
      for (int64_t begin = 0; begin < vectors; begin += most) {
        float sums[most] = {};
        add_entries(values, places, entries, prepared + begin, vectors, least(most, vectors - begin), sums);
        for (int64_t v = begin; v < least(begin + most, product.vectors); ++v) put_number(product.outputs, v * w.rows + row, product.number, sums[v - begin]);
      }
    }
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  if (w.form == Coded::plain) return multiply_plain(product, prepared, first, last, scratch);
  if (w.index_bytes == 2) return multiply_sparse<uint16_t>(product, prepared, first, last, scratch);
  multiply_sparse<uint32_t>(product, prepared, first, last, scratch);
}

}  // namespace additions
}  // namespace FEWBITS_ISA
}  // namespace fewbits

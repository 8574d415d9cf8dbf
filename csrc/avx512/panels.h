// Panels of numbers, weights as float32 or as pairs of bfloat16 where the inputs are, times tiles of vectors.
//
// A word of 32 bits holds one column of a row, or two. A panel lies `[words, 32 rows]`, inputs `[blocks, tiles, words of a block, vectors
// of a tile]`: one word of every row, two registers, meets one word of every vector, so that sums need not be added across lanes.
// A block of columns of a panel stays in the second cache while all vectors pass.
#pragma once
#include "../panels.h"
#include "weights.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace panels {

// ---- inputs ---------------------------------------------------------------------------------------------------------------

template <class Kind>
static int64_t prepared_bytes(const Product& product) {
  return ceiling(product.vectors, tile) * tile * (padded_columns(*product.matrix) / Kind::per_word) * 4;
}

// Where the inputs of a block of columns begin, `words` words of each tile.
template <class Kind>
static inline int64_t place_in(int64_t column, int64_t words, int64_t tiles, int64_t which) {
  return (column / Kind::per_word * tiles + which * words) * tile;
}

// Lanes that there are of sixteen, or of 32.
static inline uint32_t lanes_of(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// Sixteen inputs of a vector from place `at` on as float32; those behind `count` are zero.
static inline __m512i take_floats(const Product& product, int64_t at, int64_t count) {
  const __mmask16 there = static_cast<__mmask16>(lanes_of(count));
  if (product.number == Number::f32) return _mm512_maskz_loadu_epi32(there, static_cast<const uint32_t*>(product.inputs) + at);
  const __m256i numbers = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(product.inputs) + at);
  return product.number == Number::f16 ? _mm512_castps_si512(_mm512_cvtph_ps(numbers)) : _mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}

// Places of 32 numbers in whose order the two of a word lie `apart`: 1, 4, 8 or 16 columns.
static __m512i find_order(int64_t apart) {
  alignas(64) uint16_t order[32];
  for (int64_t i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / (2 * apart) * (2 * apart) + i % 2 * apart + i % (2 * apart) / 2);
  return _mm512_load_si512(order);
}

template <class Kind>
static void prepare(const Product& product, int64_t which, uint8_t* room) {
  const Coded& w = *product.matrix;
  const int64_t padded = padded_columns(w), tiles = ceiling(product.vectors, tile), vectors = product.vectors - which * tile;
  const __m512i order = find_order(apart(w));
  for (int64_t column = 0; column < padded; column += Kind::block) {
    const int64_t words = least(Kind::block, padded - column) / Kind::per_word;
    lay_out(words, reinterpret_cast<uint32_t*>(room) + place_in<Kind>(column, words, tiles, which), [&](int v, int64_t word) {
      const int64_t from = column + word * Kind::per_word, at = (which * tile + v) * w.columns + from, count = v < vectors ? w.columns - from : 0;
      if constexpr (Kind::per_word == 1) return take_floats(product, at, count);
      return _mm512_permutexvar_epi16(order, _mm512_maskz_loadu_epi16(lanes_of(count), static_cast<const uint16_t*>(product.inputs) + at));
    });
  }
}

// ---- memory of a thread ---------------------------------------------------------------------------------------------------

template <class Kind>
static int64_t words_of_panel(const Coded& w) {
  const int64_t columns = padded_columns(w);
  return (way_of(w) == Way::rows ? columns : least(Kind::block, columns)) / Kind::per_word;
}

template <class Kind>
static int64_t words_of_each(const Coded& w, int64_t tiles) {
  return (words_of_panel<Kind>(w) + 2 * padded_groups(w) + tiles * tile) * panel_rows;
}

template <class Kind>
static int64_t scratch_bytes(const Product& product, int64_t tiles) {
  const Coded& w = *product.matrix;
  const int64_t rows = way_of(w) == Way::rows ? 17 * padded_columns(w) + decode_floats(w) : 0, grids = sixteen_room(w);
  return (words_of_each<Kind>(w, tiles) * panels_at_once + (rows > grids ? rows : grids)) * 4;
}

template <class Kind>
static Panel find_panel(const Coded& w, int64_t tiles, int64_t which, uint8_t* scratch) {
  const int64_t each = words_of_each<Kind>(w, tiles);
  Panel made{};
  made.weights = reinterpret_cast<uint32_t*>(scratch) + which * each;
  made.scales = reinterpret_cast<float*>(made.weights) + words_of_panel<Kind>(w) * panel_rows;
  made.shifts = made.scales + padded_groups(w) * panel_rows;
  made.sums = made.shifts + padded_groups(w) * panel_rows;
  made.room = reinterpret_cast<float*>(scratch) + panels_at_once * each;
  return made;
}

// ---- products -------------------------------------------------------------------------------------------------------------

// `words` words of a panel times those of some vectors of a tile, added to sums `[Vectors, panel_rows]`.
template <class Kind, int Vectors>
static void multiply_tile(const uint32_t* weights, const uint32_t* inputs, int64_t words, bool begin, float* sums) {
  __m512 low[Vectors], high[Vectors];
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    low[v] = begin ? _mm512_setzero_ps() : _mm512_load_ps(sums + v * panel_rows);
    high[v] = begin ? _mm512_setzero_ps() : _mm512_load_ps(sums + v * panel_rows + 16);
  }
  for (int64_t k = 0; k < words; ++k, weights += panel_rows, inputs += tile) {
    const __m512i first = _mm512_load_si512(weights), second = _mm512_load_si512(weights + 16);
    _mm_prefetch(reinterpret_cast<const char*>(inputs + words * tile), _MM_HINT_T1);  // of the next tile
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      const __m512i input = _mm512_set1_epi32(static_cast<int>(inputs[v]));
      low[v] = Kind::add(low[v], first, input);
      high[v] = Kind::add(high[v], second, input);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    _mm512_store_ps(sums + v * panel_rows, low[v]);
    _mm512_store_ps(sums + v * panel_rows + 16, high[v]);
  }
}

template <class Kind>
static void multiply_block(const uint32_t* weights, const uint32_t* inputs, int64_t words, int64_t vectors, bool begin, float* sums) {
  const auto function = vectors > 8 ? multiply_tile<Kind, 12> : vectors > 4 ? multiply_tile<Kind, 8> : multiply_tile<Kind, 4>;
  function(weights, inputs, words, begin, sums);
}

template <class Kind>
static void multiply(const Product& product, const uint8_t* prepared, int64_t row, int64_t first, int64_t last, uint8_t* memory) {
  const Coded& w = *product.matrix;
  const bool whole = way_of(w) == Way::rows;
  const int64_t columns = padded_columns(w), vectors = least(last * tile, product.vectors) - first * tile;
  const int64_t tiles = ceiling(product.vectors, tile), count = least(panels_at_once, ceiling(w.rows - row, panel_rows));
  const PanelRows rows[] = {PanelRows(w, row), PanelRows(w, row + panel_rows)}, next(w, row + panels_at_once * panel_rows);
  const Panel panels[] = {find_panel<Kind>(w, last - first, 0, memory), find_panel<Kind>(w, last - first, 1, memory)};
  for (int64_t p = 0; p < count; ++p) {
    if (whole) fill_from_rows<Kind>(w, rows[p], panels[p]);
    else read_grids(w, rows[p], panels[p]);
  }
  for (int64_t column = 0; column < columns; column += Kind::block) {
    const int64_t taken = least(Kind::block, columns - column), words = taken / Kind::per_word;
    const uint32_t* inputs = reinterpret_cast<const uint32_t*>(prepared) + place_in<Kind>(column, words, tiles, first);
    const int64_t at = whole ? column / Kind::per_word * panel_rows : 0;  // of the block in a panel
#ifdef __AVX512VBMI__
    const bool more = column + taken < columns;
    for (int64_t p = 0; p < count && !whole; ++p) {
      fill_from_codes<Kind>(w, rows[p], column, taken, panels[p]);
      fetch_codes(w, more ? rows[p] : next, more ? column + taken : 0, Kind::block);
    }
#endif
    for (int64_t v = 0; v < vectors; v += tile) {
      for (int64_t p = 0; p < count; ++p) {
        multiply_block<Kind>(panels[p].weights + at, inputs + v * words, words, vectors - v, column == 0, panels[p].sums + v * panel_rows);
      }
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t v = 0; v < vectors; ++v) put_rows(product, first * tile + v, row + p * panel_rows, panels[p].sums + v * panel_rows);
  }
}

// Seen at matrices of 4096 x 4096: looking levels up, and codes of more than 6 bits, cost kernels that read codes as they lie the most.
template <class Kind>
static int64_t few_vectors(const Product& product) {
  const Coded& w = *product.matrix;
  if (way_of(w) == Way::rows) return w.levels.kind != Values::none ? 16 : 32;
  if (w.lines) return w.levels.kind == Values::none ? few_vectors_of_lines(w) : Kind::per_word == 2 ? 4 : 8;
  const bool dear = w.levels.kind != Values::none || w.bits > 6;
  return Kind::per_word == 2 ? (dear ? 1 : 4) : dear ? 8 : 32;
}

template <class Kind>
constexpr Panels make_panels() {
  return {tile, panels_at_once * panel_rows, few_vectors<Kind>, prepared_bytes<Kind>, prepare<Kind>, scratch_bytes<Kind>, multiply<Kind>};
}

}  // namespace panels
}  // namespace FEWBITS_ISA
}  // namespace fewbits

// Panels of weights as numbers: float32, a column a word, or pairs of bfloat16, two columns a word.
//
// Codes of sixteen rows are exchanged between registers as they are stored, until a lane holds some neighbouring columns of a row: 32 bits
// of one row, or 64 where two columns make a word. A code is then shifted down and looked up, or converted; four codes of more than four bits are
// looked up together. The two columns of a word lie 32 bits apart in such a lane, so that both leave it at once.
#pragma once
#include <type_traits>

#include "columns.h"
#include "number_tables.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace panels {

// Float32 weights.
struct Floats32 {
  static constexpr int64_t per_word = 1, block = 256;  // columns
  static inline __m512 add(__m512 sum, __m512i weights, __m512i inputs) { return _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_castsi512_ps(inputs), sum); }
  static void pack(const float* from, int64_t count, uint32_t* to) { std::memcpy(to, from, static_cast<size_t>(count) * 4); }
};

#ifdef __AVX512BF16__
// Weights rounded to bfloat16, as the definition rounds them.
struct Pairs {
  static constexpr int64_t per_word = 2, block = 512;
  static inline __m512 add(__m512 sum, __m512i weights, __m512i inputs) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(inputs));
  }
  static inline __m512i joined(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }
  static void pack(const float* from, int64_t count, uint32_t* to) {
    for (int64_t i = 0; i < count; i += 32) _mm512_storeu_si512(to + i / 2, joined(_mm512_loadu_ps(from + i), _mm512_loadu_ps(from + i + 16)));
  }
};
#endif

// How a panel's weights are made: from codes in registers, whose level is looked up or whose multiples of a scale are shifted by zero points
// and offsets, or from rows that are decoded in full.
enum class Way { levels, shifts, rows };

static Way way_of(const Coded& w) {
#ifdef __AVX512VBMI__
  if (w.bits > 8 || (w.groups > 1 && w.group % 4 != 0)) return Way::rows;
  if (w.levels.kind != Values::none) return w.level_groups == 1 && w.levels.rows == 1 ? Way::levels : Way::rows;
  return w.zeros.kind == Values::none && w.bits <= 4 ? Way::levels : Way::shifts;
#else
  (void)w;
  return Way::rows;
#endif
}

// Columns between the two of a word.
static inline int64_t apart(const Coded& w) {
#ifdef __AVX512VBMI__
  return way_of(w) == Way::rows ? 1 : 32 / field_bits(w);
#else
  (void)w;
  return 1;
#endif
}

// One panel, memory of a thread.
struct Panel {
  uint32_t* weights;      // [words of a block or of all columns, panel_rows]
  float *scales, *shifts;  // [padded groups, panel_rows]
  float* sums;            // [vectors, panel_rows]
  float* room;            // for reading grids, or rows
};

// All columns, row by row.
template <class Kind>
static void fill_from_rows(const Coded& w, const PanelRows& rows, const Panel& panel) {
  const int64_t columns = padded_columns(w), words = columns / Kind::per_word;
  uint32_t* packed = reinterpret_cast<uint32_t*>(panel.room);
  float* row = panel.room + 16 * columns;
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < 16; ++r) {
      decode_row(w, rows.row[16 * half + r], row, row + columns);
      for (int64_t c = w.columns; c < columns; ++c) row[c] = 0.0f;
      Kind::pack(row, columns, packed + r * words);
    }
    transpose_words(packed, words, words, panel.weights + 16 * half, panel_rows);
  }
}

#ifdef __AVX512VBMI__
// Sixteen lanes of grid: a lane a row, or two for each of eight rows.
struct LaneGrid {
  __m512 scale, shift;
};

// Of the rows from `first` on where lanes are rows in pairs: the groups of the first and of the second column of a word.
static inline __m512 in_pairs(const float* one, const float* two, int first) {
  const __m512i order = _mm512_add_epi32(_mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), _mm512_set1_epi32(first));
  return _mm512_permutex2var_ps(_mm512_load_ps(one), order, _mm512_load_ps(two));
}

// Field `j` of every lane's 32 bits, of which those above may be left where only four are read.
template <int Bits, int Field>
static inline __attribute__((always_inline)) __m512i take_field(__m512i all, int j) {
  if constexpr (Bits <= 4) return j == 0 ? all : _mm512_srli_epi32(all, static_cast<unsigned>(Field * j));
  if (j == 0) return _mm512_and_si512(all, _mm512_set1_epi32(255));
  if (j == 3) return _mm512_srli_epi32(all, 24);
  const __m512i bytes = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
  return _mm512_maskz_permutexvar_epi8(0x1111111111111111, _mm512_add_epi32(bytes, _mm512_set1_epi32(j)), all);
}

// What the lowest four bits of a lane say.
template <int Bits, bool Levels>
static inline __attribute__((always_inline)) __m512 to_weights(__m512i codes, const LaneGrid& grid, __m512 levels) {
  if constexpr (Levels) return _mm512_mul_ps(_mm512_permutexvar_ps(codes, levels), grid.scale);
  __m512 numbers;
  if constexpr (Bits <= 4) numbers = _mm512_permutexvar_ps(codes, levels);  // reads four bits, of which there may be those of others
  else numbers = _mm512_cvtepi32_ps(codes);
  return _mm512_fmadd_ps(numbers, grid.scale, grid.shift);
}

// Of more than sixteen levels those that the four bytes of every lane say, one column after the other.
template <int Bits>
static inline __attribute__((always_inline)) void look_up_columns(__m512i codes, const NumberTable& table, __m512* levels) {
  const __m512i by_columns = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);  // of four rows
  table.look_up_in_fours<Bits>(_mm512_shuffle_epi8(codes, by_columns), levels);
}

static NumberTable find_table(const Coded& w) {
  float found[256];
  for (int i = 0; i < 256; ++i) found[i] = number_at(w.levels.data, i % (1 << w.bits), w.levels.number);
  return NumberTable(found);
}

// What the lowest four bits of a lane stand for: a level, or their number.
static __m512 find_levels(const Coded& w, bool levels) {
  alignas(64) float found[16];
  for (int i = 0; i < 16; ++i) {
    const int code = i % (1 << (w.bits < 4 ? w.bits : 4));
    if (w.levels.kind != Values::none) found[i] = number_at(w.levels.data, code, w.levels.number);
    else found[i] = static_cast<float>(code) - (levels ? zero_of(w) : 0.0f);
  }
  return _mm512_load_ps(found);
}

static inline int64_t group_at(const Coded& w, int64_t column) { return w.groups == 1 ? 0 : least(column / w.group, w.groups - 1); }

// The grids of the columns from `column` on: of sixteen rows, or of eight and eight.
template <class Kind, bool Levels>
static inline __attribute__((always_inline)) void load_grids(const Coded& w, const Panel& panel, int half, int64_t column, int64_t apart, LaneGrid* grids) {
  const int64_t one = group_at(w, column) * panel_rows + 16 * half, two = group_at(w, column + apart) * panel_rows + 16 * half;
  if constexpr (Kind::per_word == 1) {
    (void)two;
    grids[0].scale = _mm512_load_ps(panel.scales + one);
    if constexpr (!Levels) grids[0].shift = _mm512_load_ps(panel.shifts + one);
  } else {
    for (int i = 0; i < 2; ++i) {
      grids[i].scale = in_pairs(panel.scales + one, panel.scales + two, 8 * i);
      if constexpr (!Levels) grids[i].shift = in_pairs(panel.shifts + one, panel.shifts + two, 8 * i);
    }
  }
}

// How lanes of codes become weights: one look-up or conversion a column, or one look-up for four of them.
template <bool Levels, int Bits, int Field>
struct Columns {
  static constexpr int count = 32 / Field;  // of a lane of 32 bits
  __m512 levels;

  explicit Columns(const Coded& w) : levels(find_levels(w, Levels)) {}

  inline __attribute__((always_inline)) void make(__m512i codes, const LaneGrid& grid, __m512* weights) const {
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j) weights[j] = to_weights<Bits, Levels>(take_field<Bits, Field>(codes, j), grid, levels);
  }
};

template <int Bits>
struct LookedUp {
  static constexpr int count = 4;
  NumberTable table;

  explicit LookedUp(const Coded& w) : table(find_table(w)) {}

  inline __attribute__((always_inline)) void make(__m512i codes, const LaneGrid& grid, __m512* weights) const {
    look_up_columns<Bits>(codes, table, weights);
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) weights[j] = _mm512_mul_ps(weights[j], grid.scale);
  }
};

// The columns of a block, 512 / Field at a time.
template <class Kind, bool Levels, int Bits, int Field>
static void fill_block(const Coded& w, const PanelRows& rows, int64_t column, int64_t columns, const Panel& panel) {
  using Maker = std::conditional_t<Levels && (Bits > 4), LookedUp<Bits>, Columns<Levels, Bits, Field>>;
  const Maker maker(w);
  for (int half = 0; half < 2; ++half) {
    uint32_t* to = panel.weights + 16 * half;
    LaneGrid grids[2];
    int64_t end = 0;  // of the columns that have these grids
    for (int64_t at = column; at < column + columns;) {
      __m512i all[16];
      take_lanes<Bits, Field, Kind::per_word>(w, rows.row + 16 * half, at, all);
#pragma GCC unroll 16
      for (int lane = 0; lane < 16 / Kind::per_word; ++lane, at += Maker::count * Kind::per_word) {
        if (at + Maker::count * (Kind::per_word - 1) >= end) {
          load_grids<Kind, Levels>(w, panel, half, at, Maker::count, grids);
          const int64_t last = group_at(w, at) + 1;
          end = w.groups == 1 || last >= w.groups ? column + columns : last * w.group;
        }
        __m512 weights[Kind::per_word][Maker::count];
#pragma GCC unroll 2
        for (int i = 0; i < Kind::per_word; ++i) maker.make(all[lane + 8 * i], grids[i], weights[i]);
#pragma GCC unroll 16
        for (int j = 0; j < Maker::count; ++j, to += panel_rows) {
          if constexpr (Kind::per_word == 1) _mm512_store_ps(reinterpret_cast<float*>(to), weights[0][j]);
          else _mm512_store_si512(to, Kind::joined(weights[0][j], weights[1][j]));
        }
      }
    }
  }
}

template <class Kind, bool Levels>
struct Fill {
  template <int Bits, int Field>
  static void of(const Coded& w, const PanelRows& rows, int64_t column, int64_t columns, const Panel& panel) {
    fill_block<Kind, Levels, Bits, Field>(w, rows, column, columns, panel);
  }
};

template <class Kind>
static void fill_from_codes(const Coded& w, const PanelRows& rows, int64_t column, int64_t columns, const Panel& panel) {
  using WithLevels = Fill<Kind, true>;
  using WithShifts = Fill<Kind, false>;
  if (way_of(w) == Way::levels) FEWBITS_FOR_FIELDS(WithLevels::template of, w, w, rows, column, columns, panel)
  FEWBITS_FOR_FIELDS(WithShifts::template of, w, w, rows, column, columns, panel)
}
#endif

static void read_grids(const Coded& w, const PanelRows& rows, const Panel& panel) {
  const int64_t count = padded_groups(w) * panel_rows;
  read_by_groups(w, w.scales, 1.0f, rows, panel.scales, panel.room);
  for (int64_t i = 0; i < count; ++i) panel.scales[i] *= step_of(w);
  if (way_of(w) != Way::shifts) return;
  const bool offsets = has_offsets(w);
  read_by_groups(w, w.zeros, zero_of(w), rows, panel.shifts, panel.room);
  for (int64_t i = 0; i < count; ++i) panel.shifts[i] = offsets ? panel.shifts[i] - zero_of(w) * panel.scales[i] : -panel.shifts[i] * panel.scales[i];
}

}  // namespace panels
}  // namespace FEWBITS_ISA
}  // namespace fewbits

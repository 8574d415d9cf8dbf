// Products of codes that lie in lines: line i of sixteen rows holds word i, 32 bits, of each of them, a row a lane.
//
// One line is masked, and multiplied with four inputs of one byte each that all lanes share and memory hands to each of them. No sum is
// added across lanes, a group's scales are one register, and memory is read from its beginning to its end: this is why codes are laid in lines.
// Inputs are cut into digits as in fixed.h. A code that is masked but not shifted is the code times a power of two, which its sum keeps to
// itself until the group's end.
#pragma once
#include <optional>

#include "../avx512/columns.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace lines {

constexpr int64_t run = 32;            // columns of whole lines, whatever the width of codes: as many lines as a code has bits
constexpr int64_t longest = 1 << 14;   // columns whose products are summed in 32 bits
constexpr int64_t most_vectors = 4;    // that share a look at the codes
constexpr int64_t bytes_ahead = 1 << 14;  // of what is fetched, into the second cache
constexpr int64_t small_group = 64;     // columns up to which scaling sums takes as long as memory does

static bool serves(const Coded& w) {
  const bool whole = w.columns % run == 0 && (w.groups == 1 || w.group % run == 0);
  const bool codes = w.levels.kind == Values::none ? w.bits <= 8 : w.bits <= 6 && w.levels.rows == 1 && w.level_groups == 1;
  return w.form == Coded::packed && w.lines && codes && whole;
}

static inline int64_t tiles_of(int64_t vectors) { return ceiling(vectors, most_vectors); }
static inline int64_t tile_of(int64_t vectors) { return ceiling(vectors, tiles_of(vectors)); }

// ---- inputs ---------------------------------------------------------------------------------------------------------------

// Of a tile's vectors: words of digits [columns / 4, digits, tile], the groups' units and sums [groups, tile]; and room to make them.
struct Inputs {
  int64_t tile, words, groups;  // of a tile: vectors, words of digits; of a vector: padded groups
  int32_t* digits;
  float *units, *sums, *room;

  Inputs(const Product& product, float* at) {
    const Coded& w = *product.matrix;
    const int64_t tiles = tiles_of(product.vectors);
    tile = tile_of(product.vectors);
    words = w.columns / 4 * product.digits * tile;
    groups = padded_groups(w);
    digits = reinterpret_cast<int32_t*>(at);
    units = at + tiles * words;
    sums = units + tiles * tile * groups;
    room = sums + tiles * tile * groups;
  }
};

static int64_t prepared_floats(const Product& product) {
  const Coded& w = *product.matrix;
  return tiles_of(product.vectors) * tile_of(product.vectors) * (w.columns / 4 * product.digits + 2 * padded_groups(w) + 2 * w.columns);
}

// The column of a run that byte `j` of the codes' register `k` holds: of whole codes in bytes, as a mask takes them out of a line.
static constexpr int column_of(int bits, int k, int j) {
  if (8 % bits != 0) return 4 * k + j;
  const int fields = 8 / bits;
  return k / fields * 4 * fields + j * fields + k % fields;
}

// Numbers of a run of columns as the digits that meet its codes; `stride` words from one digit of four inputs to the next.
template <int Digits>
static void lay_out(const int32_t* numbers, __m256i order, int64_t stride, int32_t* to) {
  const __m512i middle = _mm512_set1_epi32(0x808080);  // of every digit: what makes them signed
  __m512i half[2];
  for (int i = 0; i < 2; ++i) half[i] = _mm512_xor_si512(_mm512_add_epi32(_mm512_loadu_si512(numbers + 16 * i), middle), middle);
  for (int digit = 0; digit < Digits; ++digit) {
    const unsigned shift = static_cast<unsigned>(8 * (Digits - 1 - digit));
    const __m128i low = _mm512_cvtepi32_epi8(_mm512_srli_epi32(half[0], shift)), high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(half[1], shift));
    alignas(32) int32_t words[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm256_permutexvar_epi8(order, _mm256_set_m128i(high, low)));
    for (int k = 0; k < 8; ++k) to[(k * Digits + digit) * stride] = words[k];
  }
}

static void prepare(const Product& product, int64_t vector, float* memory) {
  const Coded& w = *product.matrix;
  const Inputs to(product, memory);
  if (vector >= tiles_of(product.vectors) * to.tile) return;
  const int64_t there = vector < product.vectors ? w.columns : 0, which = vector / to.tile, in_tile = vector % to.tile;
  float *values = to.room + vector * 2 * w.columns, *units = to.units + which * to.tile * to.groups + in_tile, *sums = to.sums + which * to.tile * to.groups + in_tile;
  int32_t* numbers = reinterpret_cast<int32_t*>(values + w.columns);
  read_numbers(product.inputs, vector * w.columns, product.number, there, values);
  for (int64_t c = there; c < w.columns; ++c) values[c] = 0.0f;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t first = g * w.group, count = least(w.group, w.columns - first);
    units[g * to.tile] = fixed::to_whole_numbers(values + first, count, 8 * product.digits - 1, numbers + first);
    sums[g * to.tile] = static_cast<float>(fixed::sum_of_numbers(numbers + first, count));  // in units
  }
  alignas(32) uint8_t order[run];
  for (int i = 0; i < run; ++i) order[i] = static_cast<uint8_t>(column_of(w.bits, i / 4, i % 4));
  const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(order));
  int32_t* digits = to.digits + which * to.words + in_tile;
  for (int64_t c = 0; c < w.columns; c += run, digits += 8 * product.digits * to.tile) {
    if (product.digits == 1) lay_out<1>(numbers + c, places, to.tile, digits);
    else if (product.digits == 2) lay_out<2>(numbers + c, places, to.tile, digits);
    else lay_out<3>(numbers + c, places, to.tile, digits);
  }
}

// ---- scales ---------------------------------------------------------------------------------------------------------------

// Levels as whole numbers of two bytes, or of three where inputs have as many, a byte in each table: (number - zero) * unit. What is lost is
// half a unit. Sixty-four codes are looked up at once, by six bits; of narrower codes those above are any, and the table has each level more than once.
struct Levels {
  __m512i tables[3];
  float unit, zero;

  Levels(const Coded& w, int planes) {
    const int count = 1 << w.bits;
    float found[64], low = number_at(w.levels.data, 0, w.levels.number), high = low;
    for (int i = 0; i < count; ++i) {
      found[i] = number_at(w.levels.data, i, w.levels.number);
      low = found[i] < low ? found[i] : low, high = found[i] > high ? found[i] : high;
    }
    const double most = (int64_t{1} << (8 * planes)) - 1, step = (static_cast<double>(high) - low) / most;
    unit = step > 0 ? static_cast<float>(step) : 1.0f;
    zero = static_cast<float>(-static_cast<double>(low) / unit);
    alignas(64) uint8_t bytes[3][64];
    for (int i = 0; i < 64; ++i) {
      const double place = (static_cast<double>(found[i % count]) - low) / unit;
      const int32_t number = place > 0 ? static_cast<int32_t>((place < most ? place : most) + 0.5) : 0;
      for (int plane = 0; plane < planes; ++plane) bytes[plane][i] = static_cast<uint8_t>(number >> (8 * (planes - 1 - plane)));
      if (!(found[i % count] - found[i % count] == 0.0f)) unit = as_float(0x7fc00000);  // one that is not finite
    }
    for (int plane = 0; plane < planes; ++plane) tables[plane] = _mm512_load_si512(bytes[plane]);
  }
};

// What sixteen rows have beside their codes, group by group: sixteen scales, zero points and offsets, a row a lane. Those that do not lie
// so are brought there first, as float32.
struct Grid {
  const uint8_t *scales, *zeros, *offsets;  // of the first group; nullptr where there are none
  Number of_scales, of_zeros, of_offsets;
  bool packed;   // zero points of the width of the codes
  float factor, zero;  // of scales, if not 1; the zero point where none are stored

  inline __attribute__((always_inline)) __m512 scale(int64_t group) const {
    const __m512 found = scales == nullptr ? _mm512_set1_ps(1.0f) : sixteen_numbers(scales, group, of_scales);
    return factor == 1.0f ? found : _mm512_mul_ps(found, _mm512_set1_ps(factor));
  }

  template <int Bits>
  inline __attribute__((always_inline)) __m512 zero_point(int64_t group) const {
    if (zeros == nullptr) return _mm512_set1_ps(zero);
    return packed ? sixteen_codes(zeros, group, Bits) : sixteen_numbers(zeros, group, of_zeros);
  }
};

static int64_t scratch_floats(const Coded& w) { return 48 * padded_groups(w) + sixteen_room(w); }

static Grid find_grid(const Coded& w, const Levels* levels, int64_t row, float* room) {
  const int64_t each = 16 * padded_groups(w);
  const auto find = [&](const Values& values, float* to, Number& number) -> const uint8_t* {
    if (values.kind == Values::none) return nullptr;
    number = values.number;
    if (values.lines && values.kind != Values::table) return static_cast<const uint8_t*>(values.data) + row * row_bytes_of(values, w.bits);
    read_sixteen(w, values, [row](int64_t r) { return row + r; }, to, room + 3 * each);
    number = Number::f32;
    return reinterpret_cast<const uint8_t*>(to);
  };
  Grid grid{};
  grid.factor = levels != nullptr ? levels->unit : step_of(w);
  grid.zero = levels != nullptr ? levels->zero : zero_of(w);
  grid.scales = find(w.scales, room, grid.of_scales);
  const bool offsets = has_offsets(w);
  (offsets ? grid.offsets : grid.zeros) = find(w.zeros, room + each, offsets ? grid.of_offsets : grid.of_zeros);
  grid.packed = w.zeros.kind == Values::packed && w.zeros.lines;
  return grid;
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Four products a lane of codes and of four inputs in memory, added to a sum in its place.
static inline __attribute__((always_inline)) __m512i add_products(__m512i sum, __m512i codes, const int32_t* inputs) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*inputs));
  return sum;
}

// How codes leave their lines and where their products are summed: in place, times a power of two, as far as there are registers. Levels'
// bytes are multiplied each with each digit, and what has the same weight is one sum.
template <int Bits, int Digits, int Planes, int Vectors>
struct Shape {
  static constexpr int wanted = Planes > 0 || 8 % Bits != 0 || Bits == 8 ? 1 : Bits == 4 ? 2 : 4;
  static constexpr int places = Digits * Vectors * wanted <= 24 ? wanted : 1;
  static constexpr int weights = Planes > 0 ? Digits + Planes - 1 : Digits;
  static constexpr int enough = Planes > 0 ? 8 : 4;  // so that no sum is waited for
  static constexpr int repeats = weights * Vectors * places < enough ? enough / (weights * Vectors * places) : 1;
  static constexpr int sets = places * repeats;
  // Where a line is computed with for longer than memory takes for it, lines must be under way meanwhile. Where memory is waited for, it gives
  // them one after another faster if nothing else is asked for.
  static constexpr bool computes = 8 * Digits * Vectors * (Planes > 0 ? Planes : 1) >= (8 % Bits == 0 ? 6 : 4) * Bits;
};

// Register `K` of a run's codes, times 2 to the power of Bits * (K % places); what is above them is masked, or left.
template <int Bits, int Places, int K, bool Masked>
static inline __attribute__((always_inline)) __m512i take(const __m512i* line) {
  constexpr int mask = (1 << Bits) - 1;
  if constexpr (Bits == 8) {
    return line[K];
  } else if constexpr (8 % Bits == 0) {
    constexpr int fields = 8 / Bits, field = K % fields, place = field % Places, down = field - place;
    const __m512i all = down == 0 ? line[K / fields] : _mm512_srli_epi32(line[K / fields], static_cast<unsigned>(Bits * down));
    return Masked ? _mm512_and_si512(all, _mm512_set1_epi8(static_cast<char>(mask << (Bits * place)))) : all;
  } else {  // four codes are within 32 bits of a row, of one word or of two
    constexpr int first = 4 * Bits * K, word = first / 32, bit = first % 32;
    __m512i all = line[word];
    if constexpr (bit != 0) all = _mm512_srli_epi32(all, bit);
    if constexpr (bit + 4 * Bits > 32) all = _mm512_or_si512(all, _mm512_slli_epi32(line[word + 1], 32 - bit));
    constexpr uint64_t starts = Bits << 8 | 2 * Bits << 16 | static_cast<uint64_t>(3 * Bits) << 24;
    constexpr uint64_t both = starts | (starts + 0x20202020) << 32;
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(both)), all);
    return Masked ? _mm512_and_si512(codes, _mm512_set1_epi8(mask)) : codes;
  }
}

// A run of columns, one register of codes after the other.
template <int Bits, int Digits, int Planes, int Vectors, bool Fetch, int... K>
static inline __attribute__((always_inline)) void add_run(const uint8_t* from, const int32_t* inputs, const __m512i* tables,
                                                          __m512i (*sums)[Shape<Bits, Digits, Planes, Vectors>::weights][Vectors],
                                                          std::integer_sequence<int, K...>) {
  using S = Shape<Bits, Digits, Planes, Vectors>;
  __m512i line[Bits];
#pragma GCC unroll 8
  for (int i = 0; i < Bits; ++i) {
    line[i] = _mm512_loadu_si512(from + 64 * i);
    if constexpr (Fetch) _mm_prefetch(reinterpret_cast<const char*>(from) + 64 * i + bytes_ahead, _MM_HINT_T1);
  }
  const auto add = [&](auto k) __attribute__((always_inline)) {
    constexpr int at = decltype(k)::value, set = at % S::places * S::repeats + at / S::places % S::repeats;
    const __m512i codes = take<Bits, S::places, at, Planes == 0>(line);
#pragma GCC unroll 4
    for (int plane = 0; plane < (Planes > 0 ? Planes : 1); ++plane) {
      const __m512i numbers = Planes > 0 ? _mm512_permutexvar_epi8(codes, tables[plane]) : codes;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
        for (int d = 0; d < Digits; ++d) {
          sums[set][plane + d][v] = add_products(sums[set][plane + d][v], numbers, inputs + (at * Digits + d) * Vectors + v);
        }
      }
    }
  };
  (add(std::integral_constant<int, K>{}), ...);
}

// What the sums of a vector come to, in units.
template <int Bits, class S, int Vectors>
static inline __attribute__((always_inline)) __m512 join(const __m512i (*sums)[S::weights][Vectors], int v) {
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int weight = 0; weight < S::weights; ++weight) {
    __m512i all = sums[0][weight][v];
#pragma GCC unroll 8
    for (int s = 1; s < S::sets; ++s) {
      const __m512i more = sums[s][weight][v];
      all = _mm512_add_epi32(all, s < S::repeats ? more : _mm512_srai_epi32(more, static_cast<unsigned>(Bits * (s / S::repeats))));
    }
    const __m512 numbers = _mm512_cvtepi32_ps(all);
    total = weight == 0 ? numbers : _mm512_fmadd_ps(total, _mm512_set1_ps(256.0f), numbers);
  }
  return total;
}

template <int Bits, int Digits, int Planes, int Vectors, bool Fetch>
static void multiply_sixteen(const Coded& w, const uint8_t* from, const Grid& grid, const Levels* levels, const Inputs& of, int64_t which, __m512* totals) {
  using S = Shape<Bits, Digits, Planes, Vectors>;
  const int32_t* inputs = of.digits + which * of.words;
  const float *units = of.units + which * Vectors * of.groups, *input_sums = of.sums + which * Vectors * of.groups;
  __m512i tables[3] = {};
  for (int plane = 0; plane < Planes; ++plane) tables[plane] = levels->tables[plane];
  __m512 total[Vectors];
  for (int v = 0; v < Vectors; ++v) total[v] = _mm512_setzero_ps();
  for (int64_t column = 0, group = 0; column < w.columns; ++group, units += Vectors, input_sums += Vectors) {
    const int64_t end = least(column + w.group, w.columns);
    const __m512 scale = grid.scale(group), zero = grid.zero_point<Bits>(group);
    __m512 sum[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[v] = _mm512_mul_ps(zero, _mm512_set1_ps(-input_sums[v]));
    while (column < end) {
      const int64_t to = least(column + longest, end);
      __m512i sums[S::sets][S::weights][Vectors];
#pragma GCC unroll 32
      for (int i = 0; i < S::sets * S::weights * Vectors; ++i) (&sums[0][0][0])[i] = _mm512_setzero_si512();
      for (; column < to; column += run, from += 64 * Bits, inputs += 8 * Digits * Vectors) {
        add_run<Bits, Digits, Planes, Vectors, Fetch>(from, inputs, tables, sums, std::make_integer_sequence<int, 8>{});
      }
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[v] = _mm512_add_ps(sum[v], join<Bits, S, Vectors>(sums, v));
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) total[v] = _mm512_fmadd_ps(sum[v], _mm512_mul_ps(scale, _mm512_set1_ps(units[v])), total[v]);
    if (grid.offsets == nullptr) continue;
    const __m512 offset = sixteen_numbers(grid.offsets, group, grid.of_offsets);
    for (int v = 0; v < Vectors; ++v) total[v] = _mm512_fmadd_ps(offset, _mm512_set1_ps(input_sums[v] * units[v]), total[v]);
  }
  for (int v = 0; v < Vectors; ++v) totals[v] = total[v];
}

using Sixteen = decltype(&multiply_sixteen<4, 2, 0, 1, true>);

template <int Bits, int Digits, int Planes, int Vectors>
static Sixteen find_function(const Coded& w) {
  constexpr bool computes = Shape<Bits, Digits, Planes, Vectors>::computes;
  return computes || w.group <= small_group ? multiply_sixteen<Bits, Digits, Planes, Vectors, true> : multiply_sixteen<Bits, Digits, Planes, Vectors, computes>;
}

template <int Bits, int Digits, int Planes>
static Sixteen find_function(const Coded& w, int64_t vectors) {
  switch (vectors) {
    case 1: return find_function<Bits, Digits, Planes, 1>(w);
    case 2: return find_function<Bits, Digits, Planes, 2>(w);
    case 3: return find_function<Bits, Digits, Planes, 3>(w);
    default: return find_function<Bits, Digits, Planes, 4>(w);
  }
}

constexpr int planes_of(int digits) { return digits == 1 ? 2 : digits; }  // of levels

template <int Bits, int Digits>
static void multiply_as(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const Inputs of(product, const_cast<float*>(prepared));
  constexpr int planes = planes_of(Digits);
  const std::optional<Levels> levels = w.levels.kind == Values::none ? std::nullopt : std::optional<Levels>(std::in_place, w, planes);
  const Levels* found = levels ? &*levels : nullptr;
  Sixteen function = find_function<Bits, Digits, 0>(w, of.tile);
  if constexpr (Bits <= 6) function = levels ? find_function<Bits, Digits, planes>(w, of.tile) : function;
  for (int64_t row = first; row < last; row += line_rows) {
    const Grid grid = find_grid(w, found, row, scratch);
    for (int64_t which = 0; which < tiles_of(product.vectors); ++which) {
      __m512 totals[most_vectors];
      function(w, w.codes + row * w.row_bytes, grid, found, of, which, totals);
      for (int64_t v = 0; v < of.tile && which * of.tile + v < product.vectors; ++v) {
        put_sixteen(product, (which * of.tile + v) * w.rows + row, 0xffff, totals[v]);
      }
    }
  }
}

template <int Digits>
static void multiply_digits(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  switch (product.matrix->bits) {
    case 1: return multiply_as<1, Digits>(product, prepared, first, last, scratch);
    case 2: return multiply_as<2, Digits>(product, prepared, first, last, scratch);
    case 3: return multiply_as<3, Digits>(product, prepared, first, last, scratch);
    case 4: return multiply_as<4, Digits>(product, prepared, first, last, scratch);
    case 5: return multiply_as<5, Digits>(product, prepared, first, last, scratch);
    case 6: return multiply_as<6, Digits>(product, prepared, first, last, scratch);
    case 7: return multiply_as<7, Digits>(product, prepared, first, last, scratch);
    default: return multiply_as<8, Digits>(product, prepared, first, last, scratch);
  }
}

// Rows first to last, whole sixteens of them.
static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const auto function = product.digits == 1 ? multiply_digits<1> : product.digits == 2 ? multiply_digits<2> : multiply_digits<3>;
  function(product, prepared, first, last, scratch);
}

}  // namespace lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits

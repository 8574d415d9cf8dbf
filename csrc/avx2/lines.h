// Products of codes that lie in lines (avx512vnni/lines.h says why they do): AVX2 takes a line as two registers of eight rows, a row a lane, and
// inputs as line_inputs.h says.
#pragma once
#include <utility>

#include "line_inputs.h"

namespace fewbits {
namespace FEWBITS_ISA {

static void transpose_words(const uint32_t* from, int64_t stride, int64_t count, uint32_t* to, int64_t apart) {
  for (int64_t at = 0; at < count; ++at) for (int64_t r = 0; r < 16; ++r) to[at * apart + r] = from[r * stride + at];
}

template <class Row>
static bool read_faster(const Values&, const Row&, float*, float*, int64_t) {
  return false;
}

namespace lines {

constexpr int64_t bytes_ahead = 1 << 14;  // of what is fetched, into the second cache
constexpr int level_bits = 4;             // of levels that one instruction looks up

// Other widths and other numbers of vectors would take as long to compile again as these do.
constexpr bool serves_width(int bits) { return bits <= 4 || bits == 8; }
static inline int64_t whole_tile(int64_t vectors) { return vectors == 3 ? 4 : vectors; }
static bool serves(const Coded& w) { return serves_width(w.bits) && fits(w, level_bits); }

// ---- scales ---------------------------------------------------------------------------------------------------------------

// The numbers of a group that eight of sixteen rows have, and codes, byte after byte of sixteen rows, of which one may be in two.
static inline __attribute__((always_inline)) __m256 eight_numbers(const uint8_t* data, int64_t at, Number number) {
  if (number == Number::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(data) + at);
  return few_numbers(reinterpret_cast<const uint16_t*>(data) + at, 8, number == Number::f16);
}

static inline __attribute__((always_inline)) __m256i eight_bytes(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

template <int Bits>
static inline __attribute__((always_inline)) __m256 eight_codes(const uint8_t* data, int64_t group, int half) {
  const int64_t first = group * Bits, bit = first % 8;
  const uint8_t* from = data + first / 8 * line_rows + 8 * half;
  __m256i all = eight_bytes(from);
  if (8 % Bits != 0 && bit + Bits > 8) all = _mm256_or_si256(all, _mm256_slli_epi32(eight_bytes(from + line_rows), 8));
  const __m256i codes = _mm256_srl_epi32(all, _mm_cvtsi64_si128(bit));
  return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << Bits) - 1)));
}

static inline __attribute__((always_inline)) __m256 scale_of(const Grid& grid, int64_t group, int half) {
  const __m256 found = grid.scales == nullptr ? _mm256_set1_ps(1.0f) : eight_numbers(grid.scales, line_rows * group + 8 * half, grid.of_scales);
  return grid.factor == 1.0f ? found : _mm256_mul_ps(found, _mm256_set1_ps(grid.factor));
}

template <int Bits>
static inline __attribute__((always_inline)) __m256 zero_point_of(const Grid& grid, int64_t group, int half) {
  if (grid.zeros == nullptr) return _mm256_set1_ps(grid.zero);
  return grid.packed ? eight_codes<Bits>(grid.zeros, group, half) : eight_numbers(grid.zeros, line_rows * group + 8 * half, grid.of_zeros);
}

static void look_up_numbers(const float* lookup, const uint8_t* codes, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = lookup[codes[i]];
}

// ---- products -------------------------------------------------------------------------------------------------------------

static inline __attribute__((always_inline)) __m256i line_at(const uint8_t* from, int line) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 64 * line));
}

// Four codes of every row, from the lowest bit of each lane on; those above are any.
template <int Bits, int K>
static inline __attribute__((always_inline)) __m256i four_of(const uint8_t* from) {
  constexpr int first = 4 * Bits * K, word = first / 32, bit = first % 32;
  __m256i all = line_at(from, word);
  if constexpr (bit != 0) all = _mm256_srli_epi32(all, bit);
  if constexpr (bit + 4 * Bits > 32) all = _mm256_or_si256(all, _mm256_slli_epi32(line_at(from, word + 1), 32 - bit));
  return all;
}

// The same, two of them from the lowest bit of either half of a lane on.
template <int Bits, int K>
static inline __attribute__((always_inline)) __m256i twos_of(const uint8_t* from) {
  const __m256i all = four_of<Bits, K>(from);
  return Bits == 8 ? all : _mm256_blend_epi16(all, _mm256_slli_epi32(all, 16 - 2 * Bits), 0xaa);
}

// Register `K` of a run's codes, as bytes.
template <int Bits, int K>
static inline __attribute__((always_inline)) __m256i take(const uint8_t* from) {
  constexpr int mask = (1 << Bits) - 1;
  if constexpr (8 % Bits == 0) {
    constexpr int fields = 8 / Bits, field = K % fields;
    const __m256i line = line_at(from, K / fields);
    return _mm256_and_si256(field == 0 ? line : _mm256_srli_epi32(line, Bits * field), _mm256_set1_epi8(mask));
  } else {
    const __m256i twos = twos_of<Bits, K>(from);
    const __m256i low = _mm256_and_si256(twos, _mm256_set1_epi16(mask)), high = _mm256_slli_epi16(twos, 8 - Bits);
    return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi16(mask << 8)));
  }
}

// A sum that is there before the next one begins: compilers would add products up in another order, and keep all of them in memory until then.
static inline __attribute__((always_inline)) __m256i in_turn(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// Sums of eight rows at a time of `Halves` of a line.
template <class S, int Halves, int Vectors>
struct Sums {
  __m256i narrow[S::bytes ? S::sums : 1][Vectors][Halves];
  __m256i wide[S::sums][Vectors][Halves][S::sides];
};

// Four columns of codes in bytes. `Begins` says whether sums in 16 bits begin here.
template <int Bits, int Digits, int Halves, int Vectors, int K, bool Begins>
static inline __attribute__((always_inline)) void add_bytes(const uint8_t* from, const int32_t* inputs, __m256i (*sums)[Vectors][Halves]) {
  __m256i codes[Halves];
#pragma GCC unroll 2
  for (int h = 0; h < Halves; ++h) codes[h] = take<Bits, K>(from + 32 * h);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
    for (int d = 0; d < Digits; ++d) {
      const __m256i input = _mm256_set1_epi32(inputs[(K * Digits + d) * Vectors + v]);
#pragma GCC unroll 2
      for (int h = 0; h < Halves; ++h) {
        const __m256i products = _mm256_maddubs_epi16(codes[h], input);
        sums[d][v][h] = in_turn(Begins ? products : _mm256_add_epi16(sums[d][v][h], products));
      }
    }
  }
}

// Four columns of codes of 16 bits, the first and third ones in one register.
template <int Bits, class S, int Halves, int Vectors, int K>
static inline __attribute__((always_inline)) void add_twos(const uint8_t* from, const int32_t* inputs, __m256i (*sums)[Vectors][Halves][1]) {
  const __m256i mask = _mm256_set1_epi16((1 << Bits) - 1);
  __m256i codes[2][Halves];
#pragma GCC unroll 2
  for (int h = 0; h < Halves; ++h) {
    const __m256i twos = twos_of<Bits, K>(from + 32 * h), above = _mm256_srli_epi16(twos, Bits);
    codes[0][h] = _mm256_and_si256(twos, mask);
    codes[1][h] = Bits == 8 ? above : _mm256_and_si256(above, mask);
  }
#pragma GCC unroll 2
  for (int other = 0; other < 2; ++other) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 2
      for (int part = 0; part < S::parts; ++part) {
        const __m256i input = _mm256_set1_epi32(inputs[(K * S::words + other * S::parts + part) * Vectors + v]);
#pragma GCC unroll 2
        for (int h = 0; h < Halves; ++h) sums[part][v][h][0] = in_turn(_mm256_add_epi32(sums[part][v][h][0], _mm256_madd_epi16(codes[other][h], input)));
      }
    }
  }
}

// Four columns of codes whose levels are looked up, `tables` of a plane's low and high bytes. Levels of 16 bits are those of two rows of each four.
template <int Bits, class S, int Halves, int Vectors, int K>
static inline __attribute__((always_inline)) void add_levels(const uint8_t* from, const int32_t* inputs, const __m256i* tables,
                                                             __m256i (*sums)[Vectors][Halves][2]) {
#pragma GCC unroll 2
  for (int h = 0; h < Halves; ++h) {
    const __m256i codes = take<Bits, K>(from + 32 * h);
#pragma GCC unroll 2
    for (int plane = 0; plane < S::planes; ++plane) {
      const __m256i low = _mm256_shuffle_epi8(tables[2 * plane], codes), high = _mm256_shuffle_epi8(tables[2 * plane + 1], codes);
      const __m256i found[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 2
        for (int part = 0; part < S::parts; ++part) {
          int64_t four;
          std::memcpy(&four, inputs + (K * S::parts + part) * 2 * Vectors + 2 * v, 8);
          const __m256i input = _mm256_set1_epi64x(four);
#pragma GCC unroll 2
          for (int side = 0; side < 2; ++side) {
            __m256i& sum = sums[plane + part][v][h][side];
            sum = in_turn(_mm256_add_epi32(sum, _mm256_madd_epi16(found[side], input)));
          }
        }
      }
    }
  }
}

// Adds sums in 16 bits up to those in 32.
template <class S, int Halves, int Vectors>
static inline __attribute__((always_inline)) void widen(Sums<S, Halves, Vectors>& sums) {
#pragma GCC unroll 4
  for (int i = 0; i < S::sums; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 2
      for (int h = 0; h < Halves; ++h) {
        __m256i& wide = sums.wide[i][v][h][0];
        wide = _mm256_add_epi32(wide, _mm256_madd_epi16(sums.narrow[i][v][h], _mm256_set1_epi16(1)));
      }
    }
  }
}

// A run of columns. `Begins` says whether sums in 16 bits begin with it.
template <int Bits, int Digits, bool Looked, int Halves, int Vectors, bool Begins, int... K>
static inline __attribute__((always_inline)) void add_run(const uint8_t* from, const int32_t* inputs, const __m256i* tables,
                                                          Sums<Shape<Bits, Digits, Looked>, Halves, Vectors>& sums, std::integer_sequence<int, K...>) {
  using S = Shape<Bits, Digits, Looked>;
  // Bytes of one vector are computed with faster than memory gives them, which is fastest if nothing else is asked for; four bits, as far as memory.
  constexpr bool waits = Bits == 4 && Digits * Vectors == 1 && S::bytes;
  if constexpr (Bits < 8 || Vectors > 1) fetch<waits ? Fetch::some : Fetch::all, Bits, bytes_ahead>(from);
  const auto add = [&](auto k) __attribute__((always_inline)) {
    constexpr int at = decltype(k)::value;
    if constexpr (S::bytes) {
      add_bytes<Bits, Digits, Halves, Vectors, at, Begins && at == 0>(from, inputs, sums.narrow);
    } else if constexpr (Looked) {
      add_levels<Bits, S, Halves, Vectors, at>(from, inputs, tables, sums.wide);
    } else {
      add_twos<Bits, S, Halves, Vectors, at>(from, inputs, sums.wide);
    }
  };
  (add(std::integral_constant<int, K>{}), ...);
}

// Columns whose products 32 bits hold the sum of.
template <int Bits, int Digits, bool Looked, int Halves, int Vectors>
static inline __attribute__((always_inline)) void add_columns(int64_t columns, const uint8_t*& from, const int32_t*& inputs, const __m256i* tables,
                                                              Sums<Shape<Bits, Digits, Looked>, Halves, Vectors>& sums) {
  using S = Shape<Bits, Digits, Looked>;
  constexpr auto all = std::make_integer_sequence<int, 8>{};
  const auto next = [&] { from += 64 * Bits, inputs += 8 * S::words * Vectors; };
#pragma GCC unroll 32
  for (int i = 0; i < S::sums * Vectors * Halves * S::sides; ++i) (&sums.wide[0][0][0][0])[i] = _mm256_setzero_si256();
  while (columns > 0) {
    const int64_t count = S::bytes ? least(S::runs * run, columns) : columns;
    add_run<Bits, Digits, Looked, Halves, Vectors, true>(from, inputs, tables, sums, all);
    next();
    if constexpr (S::runs > 1 || !S::bytes) {
      for (int64_t at = run; at < count; at += run, next()) add_run<Bits, Digits, Looked, Halves, Vectors, false>(from, inputs, tables, sums, all);
    }
    if constexpr (S::bytes) widen<S, Halves, Vectors>(sums);
    columns -= count;
  }
}

// What the sums of a vector and of eight rows come to, in units.
template <class S, int Halves, int Vectors>
static inline __attribute__((always_inline)) __m256 join(const Sums<S, Halves, Vectors>& sums, int v, int h) {
  __m256 total = _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < S::sums; ++i) {
    const __m256i* each = sums.wide[i][v][h];
    const __m256 numbers = _mm256_cvtepi32_ps(S::sides == 1 ? each[0] : _mm256_hadd_epi32(each[0], each[S::sides - 1]));
    total = i == 0 ? numbers : _mm256_fmadd_ps(total, _mm256_set1_ps(static_cast<float>(1 << S::form.part_bits)), numbers);
  }
  return total;
}

// Eight or sixteen rows, from the first or the second half of their lines on.
template <int Bits, int Digits, bool Looked, int Halves, int Vectors>
static void multiply_halves(const Coded& w, const uint8_t* from, const Grid& grid, const __m256i* tables, const Inputs& of, int64_t which, int first,
                            float* totals) {
  using S = Shape<Bits, Digits, Looked>;
  const int32_t* inputs = of.digits + which * of.words;
  const float *units = of.units + which * Vectors * of.groups, *input_sums = of.sums + which * Vectors * of.groups;
  const __m256 lowered = _mm256_set1_ps(Looked ? static_cast<float>(1 << (Digits == 3 ? 23 : 15)) : 0.0f);  // by which levels have a sign
  __m256 total[Vectors][Halves];
#pragma GCC unroll 8
  for (int i = 0; i < Vectors * Halves; ++i) (&total[0][0])[i] = _mm256_setzero_ps();
  for (int64_t column = 0, group = 0; column < w.columns; ++group, units += Vectors, input_sums += Vectors) {
    const int64_t end = least(column + w.group, w.columns);
    __m256 sum[Vectors][Halves];
#pragma GCC unroll 2
    for (int h = 0; h < Halves; ++h) {
      const __m256 zero = _mm256_sub_ps(zero_point_of<Bits>(grid, group, first + h), lowered);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[v][h] = _mm256_mul_ps(zero, _mm256_set1_ps(-input_sums[v]));
    }
    while (column < end) {
      const int64_t columns = least(S::longest, end - column);
      Sums<S, Halves, Vectors> sums;
      add_columns<Bits, Digits, Looked, Halves, Vectors>(columns, from, inputs, tables, sums);
      column += columns;
#pragma GCC unroll 8
      for (int i = 0; i < Vectors * Halves; ++i) {
        __m256& here = sum[i / Halves][i % Halves];
        here = _mm256_add_ps(here, join(sums, i / Halves, i % Halves));
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < Halves; ++h) {
      const __m256 scale = scale_of(grid, group, first + h);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) total[v][h] = _mm256_fmadd_ps(sum[v][h], _mm256_mul_ps(scale, _mm256_set1_ps(units[v])), total[v][h]);
      if (grid.offsets == nullptr) continue;
      const __m256 offset = eight_numbers(grid.offsets, line_rows * group + 8 * (first + h), grid.of_offsets);
      for (int v = 0; v < Vectors; ++v) total[v][h] = _mm256_fmadd_ps(offset, _mm256_set1_ps(input_sums[v] * units[v]), total[v][h]);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    for (int h = 0; h < Halves; ++h) _mm256_store_ps(totals + v * line_rows + 8 * (first + h), total[v][h]);
  }
}

// Both halves of lines at once as far as registers hold their sums, else one after the other.
template <int Bits, int Digits, bool Looked, int Vectors>
static void multiply_sixteen(const Coded& w, const uint8_t* from, const Grid& grid, const __m256i* tables, const Inputs& of, int64_t which, float* totals) {
  using S = Shape<Bits, Digits, Looked>;
  if constexpr (S::sums * S::sides * Vectors <= 6) {
    multiply_halves<Bits, Digits, Looked, 2, Vectors>(w, from, grid, tables, of, which, 0, totals);
  } else {
    for (int half = 0; half < 2; ++half) {
      multiply_halves<Bits, Digits, Looked, 1, Vectors>(w, from + 32 * half, grid, tables, of, which, half, totals);
    }
  }
}

using Sixteen = decltype(&multiply_sixteen<4, 2, false, 1>);

template <int Bits, int Digits, bool Looked>
static Sixteen find_function(int64_t vectors) {
  switch (vectors) {
    case 1: return multiply_sixteen<Bits, Digits, Looked, 1>;
    case 2: return multiply_sixteen<Bits, Digits, Looked, 2>;
    default: return multiply_sixteen<Bits, Digits, Looked, 4>;
  }
}

template <int Bits, int Digits>
struct Kernel {
  static constexpr bool served = serves_width(Bits);
  __m256i tables[4] = {};  // of a plane's low and high bytes
  Sixteen function;

  Kernel(const Coded&, const Levels* levels, int64_t vectors) {
    function = find_function<Bits, Digits, false>(vectors);
    if constexpr (Bits <= level_bits) {
      if (levels == nullptr) return;
      function = find_function<Bits, Digits, true>(vectors);
      constexpr int planes = Shape<Bits, Digits, true>::planes;
      for (int plane = 0; plane < planes; ++plane) {
        alignas(16) uint8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
          const int32_t number = levels->numbers[i] - (1 << (8 * level_bytes(Bits, Digits) - 1));
          const int32_t cut = planes == 1 ? number : plane == 0 ? (number + 0x800) >> 12 : ((number + 0x800) & 0xfff) - 0x800;
          bytes[0][i] = static_cast<uint8_t>(cut), bytes[1][i] = static_cast<uint8_t>(cut >> 8);
        }
        for (int byte = 0; byte < 2; ++byte) {
          tables[2 * plane + byte] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[byte])));
        }
      }
    }
  }

  void multiply(const Coded& w, const uint8_t* from, const Grid& grid, const Inputs& of, int64_t which, float* sums) const {
    function(w, from, grid, tables, of, which, sums);
  }
};

static void put_line(const Product& product, int64_t at, const float* sums) {
  for (int64_t r = 0; r < line_rows; ++r) put_number(product.outputs, at + r, product.number, sums[r]);
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  multiply_rows<Kernel>(product, prepared, first, last, scratch);
}

}  // namespace lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits

// Products of codes that lie in lines: line i of sixteen rows holds word i, 32 bits, of each of them, a row a lane.
//
// One line is masked, and multiplied with four inputs of one byte each that all lanes share and memory hands to each of them. No sum is
// added across lanes, a group's scales are one register, and memory is read from its beginning to its end: this is why codes are laid in lines.
// Inputs are cut into digits as in fixed.h. A code that is masked but not shifted is the code times a power of two, which its sum keeps to
// itself until the group's end.
#pragma once
#include "../avx512/columns.h"
#include "../avx512/number_tables.h"
#include "../lines_parts.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace lines {

constexpr int64_t longest = 1 << 14;   // columns whose products are summed in 32 bits
constexpr int64_t bytes_ahead = 1 << 13;  // of what is fetched into the second cache

static inline int64_t whole_tile(int64_t vectors) { return vectors == 3 ? 4 : vectors; }  // each is compiled for every width
static constexpr bool has_half_runs(int bits) { return bits == 2 || bits == 4; }  // as groups of NVFP4 and of llama.cpp's q2_k are
static bool serves(const Coded& w) { return fits(w, most_level_bits, has_half_runs(w.bits) ? run / 2 : run); }

// ---- inputs ---------------------------------------------------------------------------------------------------------------

static int64_t words_of_four(const Product& product) { return product.digits; }

// Numbers of a run of columns as the digits that meet its codes; `stride` words from one digit of four inputs to the next.
template <int Digits>
static void lay_out_run(const int32_t* numbers, __m256i order, int64_t stride, int32_t* to) {
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

static void lay_out(const Product& product, const int32_t* numbers, int64_t tile, int64_t in_tile, int32_t* to) {
  const Coded& w = *product.matrix;
  to += in_tile;
  alignas(32) uint8_t order[run];
  for (int i = 0; i < run; ++i) order[i] = static_cast<uint8_t>(column_of(w.bits, i / 4, i % 4));
  const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(order));
  for (int64_t c = 0; c < w.columns; c += run, to += 8 * product.digits * tile) {
    if (product.digits == 1) lay_out_run<1>(numbers + c, places, tile, to);
    else if (product.digits == 2) lay_out_run<2>(numbers + c, places, tile, to);
    else lay_out_run<3>(numbers + c, places, tile, to);
  }
}

static int32_t digit_of(int32_t number, int digits, int digit) {
  const int32_t middle = 0x808080;  // of every digit: what makes them signed
  return static_cast<int8_t>(((number + middle) ^ middle) >> (8 * (digits - 1 - digit)));
}

// Lower bytes of levels are not multiplied with lower digits of inputs, where both together weigh less than what inputs are rounded by: with a
// digit not the `without` lowest bytes. What these say is put back as the mean of all levels; what remains is worth less than that rounding.
static float left_out_of(const Product& product, const Levels& levels, const int32_t* numbers, int64_t count) {
  const int planes = level_bytes(product.matrix->bits, product.digits), weights = planes > product.digits ? planes : product.digits;
  double sum = 0.0;
  for (int digit = 0; digit < product.digits; ++digit) {
    const int without = digit + planes - weights;
    if (without <= 0) continue;
    int64_t digits = 0;
    for (int64_t i = 0; i < count; ++i) digits += digit_of(numbers[i], product.digits, digit);
    sum += levels.lowest[without] * static_cast<double>(digits * (int64_t{1} << (8 * (product.digits - 1 - digit))));
  }
  return static_cast<float>(sum);
}

// ---- levels and scales ----------------------------------------------------------------------------------------------------

// A byte of each level in each table.
static void make_tables(const Levels& levels, int planes, __m512i (*tables)[most_parts]) {
  for (int plane = 0; plane < planes; ++plane) {
    alignas(64) uint8_t bytes[1 << most_level_bits];
    for (int i = 0; i < 1 << most_level_bits; ++i) bytes[i] = static_cast<uint8_t>(levels.numbers[i] >> (8 * (planes - 1 - plane)));
    for (int part = 0; part < most_parts; ++part) tables[plane][part] = _mm512_load_si512(bytes + 64 * part);
  }
}

static void look_up_numbers(const float* lookup, const uint8_t* codes, int64_t count, float* to) {
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i % 16 / 4 * 16 + i / 16 * 4 + i % 4);
  const __m512i places = _mm512_load_si512(order);
  const NumberTable table(lookup);
  for (int64_t at = 0; at < count; at += 64) {
    const int64_t left = count - at;
    const __m512i some = _mm512_maskz_loadu_epi8(left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1, codes + at);
    __m512 numbers[4];
    table.look_up_in_fours<8>(_mm512_permutexvar_epi8(places, some), numbers);
    for (int64_t i = 0; i < 4 && 16 * i < left; ++i) _mm512_storeu_ps(to + at + 16 * i, numbers[i]);
  }
}

static inline __attribute__((always_inline)) __m512 scale_of(const Grid& grid, int64_t group) {
  const __m512 found = grid.scales == nullptr ? _mm512_set1_ps(1.0f) : sixteen_numbers(grid.scales, group, grid.of_scales);
  return grid.factor == 1.0f ? found : _mm512_mul_ps(found, _mm512_set1_ps(grid.factor));
}

template <int Bits>
static inline __attribute__((always_inline)) __m512 zero_point_of(const Grid& grid, int64_t group) {
  if (grid.zeros == nullptr) return _mm512_set1_ps(grid.zero);
  return grid.packed ? sixteen_codes(grid.zeros, group, Bits) : sixteen_numbers(grid.zeros, group, grid.of_zeros);
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Four products a lane of codes and of four inputs in memory, added to a sum in its place.
static inline __attribute__((always_inline)) __m512i add_products(__m512i sum, __m512i codes, const int32_t* inputs) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*inputs));
  return sum;
}

// How codes leave their lines and where their products are summed: in place, times a power of two, as far as there are registers. Levels'
// bytes are multiplied each with each digit that is worth something together, and what has the same weight is one sum.
template <int Bits, int Digits, int Planes, int Vectors>
struct Shape {
  static constexpr int wanted = Planes > 0 || 8 % Bits != 0 || Bits == 8 ? 1 : Bits == 4 ? 2 : 4;
  static constexpr int places = Digits * Vectors * wanted <= 24 ? wanted : 1;
  static constexpr int weights = Planes > Digits ? Planes : Digits;
  static constexpr int left_out = Planes > 0 ? Digits + Planes - 1 - weights : 0;  // weights
  static constexpr int enough = Planes > 0 ? 8 : 4;  // so that no sum is waited for
  static constexpr int repeats = weights * Vectors * places < enough ? enough / (weights * Vectors * places) : 1;
  static constexpr int sets = places * repeats;

  // Of register `k` of a run's codes; of a set, how much higher its codes are.
  static constexpr int set_of(int k) { return k % places * repeats + k / places % repeats; }
  static constexpr int shift_of(int set) { return Bits * (set / repeats); }

  // With how many of the highest digits a byte of levels is multiplied.
  static constexpr int digits_of(int plane) { return weights - plane < Digits ? weights - plane : Digits; }
  // For a run, about as many cycles: what takes codes out of words, look-ups and multiplications.
  static constexpr float computing() {
    int each = Planes > 0 ? Planes * (2 * parts_of(Bits) - 1) : Digits * Vectors;
    for (int plane = 0; plane < Planes; ++plane) each += digits_of(plane) * Vectors;
    return 8.0f * static_cast<float>(each) + (8 % Bits != 0 ? 8.0f : 0.0f);
  }
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
    constexpr int first = 4 * Bits * K, word = first / 32, bit = first % 32, behind = bit + 4 * Bits > 32 ? 0 : bit;
    __m512i all = line[word];
    if constexpr (behind != bit) all = _mm512_or_si512(_mm512_srli_epi32(all, bit), _mm512_slli_epi32(line[word + 1], 32 - bit));
    constexpr uint64_t starts = [] {
      uint64_t made = 0;
      for (int i = 0; i < 4; ++i) made |= static_cast<uint64_t>(behind + i * Bits) << (8 * i);
      return made;
    }();
    constexpr uint64_t both = starts | (starts + 0x20202020) << 32;
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(both)), all);
    return Masked ? _mm512_and_si512(codes, _mm512_set1_epi8(mask)) : codes;
  }
}

// A run of columns, or half of one, one register of codes after the other.
template <int Bits, int Digits, int Planes, int Vectors, Fetch Asks, int... K>
static inline __attribute__((always_inline)) void add_run(const uint8_t* from, const int32_t* inputs, const __m512i (*tables)[most_parts],
                                                          __m512i (*sums)[Shape<Bits, Digits, Planes, Vectors>::weights][Vectors],
                                                          std::integer_sequence<int, K...>) {
  using S = Shape<Bits, Digits, Planes, Vectors>;
  constexpr int lines = Bits * static_cast<int>(sizeof...(K)) / 8;
  __m512i line[lines];
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) line[i] = _mm512_loadu_si512(from + 64 * i);
  fetch<Asks, lines, bytes_ahead>(from);
  const auto add = [&](auto k) __attribute__((always_inline)) {
    constexpr int at = decltype(k)::value, set = S::set_of(at);
    const __m512i codes = take<Bits, S::places, at, Planes == 0>(line);
#pragma GCC unroll 4
    for (int plane = 0; plane < (Planes > 0 ? Planes : 1); ++plane) {
      const __m512i numbers = Planes > 0 ? look_up<Bits>(codes, tables[plane]) : codes;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
        for (int d = 0; d < Digits; ++d) {
          if (d >= S::digits_of(plane)) continue;
          sums[set][plane + d][v] = add_products(sums[set][plane + d][v], numbers, inputs + (at * Digits + d) * Vectors + v);
        }
      }
    }
  };
  (add(std::integral_constant<int, K>{}), ...);
}

// What the sums of a vector come to, in units.
template <class S, int Vectors>
static inline __attribute__((always_inline)) __m512 join(const __m512i (*sums)[S::weights][Vectors], int v) {
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int weight = 0; weight < S::weights; ++weight) {
    __m512i all = sums[0][weight][v];
#pragma GCC unroll 8
    for (int s = 1; s < S::sets; ++s) {
      const __m512i more = sums[s][weight][v];
      all = _mm512_add_epi32(all, S::shift_of(s) == 0 ? more : _mm512_srai_epi32(more, static_cast<unsigned>(S::shift_of(s))));
    }
    const __m512 numbers = _mm512_cvtepi32_ps(all);
    total = weight == 0 ? numbers : _mm512_fmadd_ps(total, _mm512_set1_ps(256.0f), numbers);
  }
  return total;
}

template <int Bits, int Digits, int Planes, int Vectors, Fetch Asks, int Columns>
static void multiply_sixteen(const Coded& w, const uint8_t* from, const Grid& grid, const __m512i (*tables)[most_parts], const Inputs& of, int64_t which, float* totals) {
  using S = Shape<Bits, Digits, Planes, Vectors>;
  const int32_t* inputs = of.digits + which * of.words;
  const float *units = of.units + which * Vectors * of.groups, *input_sums = of.sums + which * Vectors * of.groups;
  const int64_t missing = of.left_out - of.sums;  // places from a group's sums to what its levels leave out
  __m512 total[Vectors];
  for (int v = 0; v < Vectors; ++v) total[v] = _mm512_setzero_ps();
  for (int64_t column = 0, group = 0; column < w.columns;) {
    const int64_t group_end = least((group + 1) * w.group, w.columns), end = least(column + longest, group_end);
    const bool last = end == group_end;  // what a group has once is added with its last columns
    const __m512 scale = scale_of(grid, group), zero = last ? zero_point_of<Bits>(grid, group) : _mm512_setzero_ps();
    __m512i sums[S::sets][S::weights][Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < S::sets * S::weights * Vectors; ++i) (&sums[0][0][0])[i] = _mm512_setzero_si512();
    for (; column < end; column += Columns, from += 2 * Columns * Bits, inputs += Columns / 4 * Digits * Vectors) {
      add_run<Bits, Digits, Planes, Vectors, Asks>(from, inputs, tables, sums, std::make_integer_sequence<int, Columns / 4>{});
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      __m512 sum = _mm512_mul_ps(zero, _mm512_set1_ps(-input_sums[v]));
      if constexpr (S::left_out > 0) sum = _mm512_add_ps(sum, _mm512_set1_ps(last ? input_sums[v + missing] : 0.0f));
      sum = _mm512_fmadd_ps(join<S, Vectors>(sums, v), _mm512_set1_ps(static_cast<float>(1 << (8 * S::left_out))), sum);
      total[v] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(units[v])), total[v]);
    }
    if (!last) continue;
    if (grid.offsets != nullptr) {
      const __m512 offset = sixteen_numbers(grid.offsets, group, grid.of_offsets);
      for (int v = 0; v < Vectors; ++v) total[v] = _mm512_fmadd_ps(offset, _mm512_set1_ps(input_sums[v] * units[v]), total[v]);
    }
    ++group, units += Vectors, input_sums += Vectors;
  }
  for (int v = 0; v < Vectors; ++v) _mm512_store_ps(totals + v * line_rows, total[v]);
}

using Sixteen = decltype(&multiply_sixteen<4, 2, 0, 1, Fetch::all, run>);

template <int Bits, int Digits, int Planes, int Vectors>
static Sixteen find_function(const Coded& w) {
  constexpr float memory = 6.8f * Bits, scaling = 12.0f;  // cycles for 32 columns, which are `Bits` lines, and at a group's end
  constexpr float computing = Shape<Bits, Digits, Planes, Vectors>::computing();
  const float runs = static_cast<float>(least(w.group, w.columns)) / run;
  if constexpr (has_half_runs(Bits)) {
    if (runs < 1.0f) return multiply_sixteen<Bits, Digits, Planes, Vectors, Fetch::all, run / 2>;
  }
  if (computing + scaling / runs >= memory) return multiply_sixteen<Bits, Digits, Planes, Vectors, Fetch::all, run>;
  if constexpr (computing >= memory) return multiply_sixteen<Bits, Digits, Planes, Vectors, Fetch::all, run>;
  else return multiply_sixteen<Bits, Digits, Planes, Vectors, Fetch::some, run>;
}

template <int Bits, int Digits, int Planes>
static Sixteen find_function(const Coded& w, int64_t vectors) {
  switch (vectors) {
    case 1: return find_function<Bits, Digits, Planes, 1>(w);
    case 2: return find_function<Bits, Digits, Planes, 2>(w);
    default: return find_function<Bits, Digits, Planes, 4>(w);
  }
}

template <int Bits, int Digits>
struct Kernel {
  static constexpr bool served = true;
  __m512i tables[3][most_parts] = {};
  Sixteen function;

  Kernel(const Coded& w, const Levels* levels, int64_t vectors) {
    function = find_function<Bits, Digits, 0>(w, vectors);
    if (levels == nullptr) return;
    make_tables(*levels, level_bytes(Bits, Digits), tables);
    function = find_function<Bits, Digits, level_bytes(Bits, Digits)>(w, vectors);
  }

  void multiply(const Coded& w, const uint8_t* from, const Grid& grid, const Inputs& of, int64_t which, float* sums) const {
    function(w, from, grid, tables, of, which, sums);
  }
};

static void put_line(const Product& product, int64_t at, const float* sums) { put_sixteen(product, at, 0xffff, _mm512_load_ps(sums)); }

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  multiply_rows<Kernel>(product, prepared, first, last, scratch);
}

}  // namespace lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits

// Products of codes of two to four bits by rows whose levels are each row's own, or those of a run of rows: 32 are looked up at once.
//
// Levels and inputs are whole numbers of 16 bits, of which an instruction adds the products of two neighbours in 32 bits. A row's levels are one
// register, over and over: five bits of a word say which is meant, of which those above a code are any. A word holds four neighbouring codes at its
// low end, and four rows share the inputs. At three digits floats are faster.
//
// Inputs have 15 bits and a sign, levels as many as the sums then have room for, 15 and a sign at most: what a few neighbouring inputs add up to is
// looked at when they are made ready.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "../avx512/columns.h"
#include "../fixed.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace row_levels {

constexpr int slots = 4;              // codes of a word
constexpr int64_t block = 32 * slots;  // columns
constexpr int64_t most_vectors = 4;
constexpr int64_t rows_at_once = 4;    // that share what is loaded of the inputs

// Blocks whose products are summed in 32 bits, eight columns of each in a lane: at four bits memory is waited for and not arithmetic.
constexpr int64_t blocks_of_sum(int bits) { return bits == 4 ? 1 : 2; }

static bool serves(const Coded& w, int64_t vectors, int digits) {
  const bool levels = w.form == Coded::packed && !w.lines && w.levels.kind == Values::dense && w.level_groups == 1 && w.bits >= 2 && w.bits <= 4;
  const bool scales = w.scales.kind == Values::none || (w.groups == 1 && w.scales.kind == Values::dense);
  return levels && scales && vectors <= most_vectors && digits <= 2;
}

// ---- inputs ---------------------------------------------------------------------------------------------------------------

// Of a vector: words [blocks, slots, 32], then what they are to be multiplied with; and room to make them.
struct Inputs {
  struct Units {
    float unit, sum;  // of the numbers
    float most;       // that a level may be, so that sums have room
  };
  int64_t columns, units, values, floats;  // places, in numbers of 32 bits

  explicit Inputs(const Coded& w) {
    columns = ceiling(w.columns, block) * block;
    units = columns / 2, values = units + 16, floats = values + 2 * columns;
  }

  Units units_of(const float* prepared) const {
    Units found;
    std::memcpy(&found, prepared + units, sizeof found);
    return found;
  }
};

static int64_t prepared_floats(const Product& product) { return product.vectors * Inputs(*product.matrix).floats; }

// The largest number that a level may be.
static float most_of_levels(const __m512i* words, int64_t blocks, int64_t together) {
  constexpr int64_t most_of_sums = (int64_t{1} << 31) - 1, most_of_words = (1 << 15) - 1;
  __m512i largest = _mm512_setzero_si512();
  for (int64_t first = 0; first < blocks; first += together) {
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = first * slots; i < least(first + together, blocks) * slots; ++i) {
      sums = _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_abs_epi16(_mm512_loadu_si512(words + i)), _mm512_set1_epi16(1)));
    }
    largest = _mm512_max_epi32(largest, sums);
  }
  const int64_t sum = _mm512_reduce_max_epi32(largest);
  return static_cast<float>(sum == 0 ? most_of_words : least(most_of_words, most_of_sums / sum));
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  if (vector >= product.vectors) return;
  const Inputs at(w);
  room += vector * at.floats;
  float* values = room + at.values;
  int32_t* numbers = reinterpret_cast<int32_t*>(values + at.columns);
  read_numbers(product.inputs, vector * w.columns, product.number, w.columns, values);
  for (int64_t c = w.columns; c < at.columns; ++c) values[c] = 0.0f;
  Inputs::Units units;
  units.unit = fixed::to_whole_numbers(values, at.columns, 15, numbers);
  units.sum = static_cast<float>(fixed::sum_of_numbers(numbers, at.columns));
  uint16_t* to = reinterpret_cast<uint16_t*>(room);
  for (int64_t c = 0; c < at.columns; c += 16) {  // four words: the first column of each, then the second
    const __m256i some = _mm512_cvtepi32_epi16(_mm512_loadu_si512(numbers + c));
    uint16_t* into = to + c / block * block + c % block / slots;
    for (int slot = 0; slot < slots; ++slot) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(into + 32 * slot), _mm256_cvtepi64_epi16(_mm256_srli_epi64(some, 16 * slot)));
    }
  }
  units.most = most_of_levels(reinterpret_cast<const __m512i*>(room), at.columns / block, blocks_of_sum(w.bits));
  std::memcpy(room + at.units, &units, sizeof units);
}

// ---- rows -----------------------------------------------------------------------------------------------------------------

// Of sixteen rows, or as many as there are: a level is `middle + reach * above`. They are found together, as one by one each waits for itself.
struct Rows {
  __m512 above[16];  // of -1 to 1; a row's levels side by side
  __m512 middle, reach, scale;  // a row a lane

  Rows(const Coded& w, int64_t row, int64_t count) {
    const int64_t levels = w.levels.columns, bytes = levels * (w.levels.number == Number::f32 ? 4 : 2);
    const __mmask16 there = static_cast<__mmask16>((1u << levels) - 1);
    alignas(64) float middles[16], inverses[16], scales[16];
    __m512 level[16];
    for (int64_t r = 0; r < 16; ++r) {
      const int64_t of = row + least(r, count - 1);
      const uint8_t* from = static_cast<const uint8_t*>(w.levels.data) + place_of(w.levels, of) * bytes;
      _mm_prefetch(reinterpret_cast<const char*>(from) + 16 * bytes, _MM_HINT_T0);
      above[r] = w.levels.number == Number::f32
                     ? _mm512_maskz_loadu_ps(there, from)
                     : few_numbers(reinterpret_cast<const uint16_t*>(from), levels, w.levels.number == Number::f16);
      level[r] = above[r];
      scales[r] = w.scales.kind == Values::none ? 1.0f : number_at(w.scales.data, place_of(w.scales, of), w.scales.number);
    }
    transpose(reinterpret_cast<__m512i*>(level));
    __m512 low = level[0], high = level[0], wrong = _mm512_setzero_ps();  // what is not finite less itself is NaN
    for (int64_t i = 0; i < levels; ++i) {
      low = _mm512_min_ps(low, level[i]), high = _mm512_max_ps(high, level[i]);
      wrong = _mm512_add_ps(wrong, _mm512_sub_ps(level[i], level[i]));
    }
    const __m512 half = _mm512_set1_ps(0.5f), most = _mm512_set1_ps(std::numeric_limits<float>::max());
    low = _mm512_mul_ps(low, half), high = _mm512_mul_ps(high, half);
    middle = _mm512_add_ps(low, high), reach = _mm512_add_ps(_mm512_sub_ps(high, low), wrong), scale = _mm512_load_ps(scales);
    _mm512_store_ps(middles, middle);
    _mm512_store_ps(inverses, _mm512_min_ps(_mm512_div_ps(_mm512_set1_ps(1.0f), reach), most));  // of levels that are all the same too
    for (int r = 0; r < 16; ++r) above[r] = _mm512_mul_ps(_mm512_sub_ps(above[r], _mm512_set1_ps(middles[r])), _mm512_set1_ps(inverses[r]));
  }
};

// Levels as numbers, the largest of which is `most`, as often as 32 words hold them.
template <int Bits>
static inline __m512i table_of(__m512 above, float most) {
  const __m256i numbers = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(above, _mm512_set1_ps(most))));
  if constexpr (Bits == 4) return _mm512_broadcast_i64x4(numbers);
  if constexpr (Bits == 3) return _mm512_broadcast_i32x4(_mm256_castsi256_si128(numbers));
  return _mm512_broadcastq_epi64(_mm256_castsi256_si128(numbers));
}

// ---- products -------------------------------------------------------------------------------------------------------------

// How codes come to lie four to a word.
template <int Bits>
struct Words {
  static constexpr int64_t bytes = block * Bits / 8, read = Bits == 2 ? 32 : 64;  // of a block, and touched by its load
  static constexpr bool in_place = Bits != 3;
  __m512i order, shifts[slots];

  Words() {
    alignas(64) uint8_t places[64];
    alignas(64) uint16_t bits[32];
    for (int i = 0; i < 64; ++i) places[i] = static_cast<uint8_t>(i / 2 * 3 / 2 + i % 2);
    order = _mm512_load_si512(places);
    for (int slot = 0; slot < slots; ++slot) {
      for (int i = 0; i < 32; ++i) bits[i] = static_cast<uint16_t>(Bits * slot + (in_place ? 0 : i % 2 * 4));
      shifts[slot] = _mm512_load_si512(bits);
    }
  }

  // The block at `from`, or its first `left` bytes.
  inline __attribute__((always_inline)) __m512i bring(const uint8_t* from, int64_t left) const {
    const uint64_t there = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    if constexpr (Bits == 2) {
      return _mm512_cvtepu8_epi16(left >= read ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                               : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(there), from));
    } else {
      const __m512i all = left >= read ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(there, from);
      return in_place ? all : _mm512_permutexvar_epi8(order, all);
    }
  }

  // One code of each word, and above it what is not looked at.
  inline __attribute__((always_inline)) __m512i take(__m512i words, int slot) const {
    return in_place && slot == 0 ? words : _mm512_srlv_epi16(words, shifts[slot]);
  }
};

// Sums over the columns of rows that lie one after another, of their levels' numbers times a vector's.
template <int Bits, int Count>
static inline __attribute__((always_inline)) void add_up(const Coded& w, const uint8_t* codes, const __m512i* inputs, const __m512i* tables, __m512* totals) {
  constexpr int64_t bytes = Words<Bits>::bytes, together = blocks_of_sum(Bits);
  const Words<Bits> as_words;
  const int64_t ahead = Count * std::max(rows_ahead(w), 2 * rows_at_once) / rows_at_once * w.row_bytes;  // the next rows are there by then
  __m512i sums[Count], next[Count];
#pragma GCC unroll 4
  for (int r = 0; r < Count; ++r) {
    sums[r] = _mm512_setzero_si512(), totals[r] = _mm512_setzero_ps();
    next[r] = as_words.bring(codes + r * w.row_bytes, w.row_bytes);
  }
  int64_t left = w.row_bytes - bytes;  // behind what is in `next`
  for (int64_t i = 1; left > -bytes; ++i, left -= bytes, inputs += slots) {
    __m512i words[Count];
    codes += bytes;
#pragma GCC unroll 4
    for (int r = 0; r < Count; ++r) {
      words[r] = next[r];
      const uint8_t* from = codes + r * w.row_bytes;
      _mm_prefetch(reinterpret_cast<const char*>(from) + ahead, _MM_HINT_T1);
      if (left > 0) next[r] = as_words.bring(from, left);  // a block early: a look-up waits for its shift, and that for its word
    }
#pragma GCC unroll 4
    for (int slot = 0; slot < slots; ++slot) {
      const __m512i numbers = _mm512_loadu_si512(inputs + slot);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        sums[r] = _mm512_dpwssd_epi32(sums[r], _mm512_permutexvar_epi16(as_words.take(words[r], slot), tables[r]), numbers);
      }
    }
    if (i % together != 0 && left > 0) continue;
#pragma GCC unroll 4
    for (int r = 0; r < Count; ++r) {
      totals[r] = _mm512_add_ps(totals[r], _mm512_cvtepi32_ps(sums[r]));
      sums[r] = _mm512_setzero_si512();
    }
  }
}

template <int Bits, int Count>
static void multiply_rows(const Product& product, const float* prepared, const Rows& rows, int64_t first, int64_t r, __m512 (*totals)[16]) {
  const Coded& w = *product.matrix;
  const Inputs at(w);
  for (int64_t v = 0; v < product.vectors; ++v, prepared += at.floats) {
    __m512i tables[Count];
    for (int i = 0; i < Count; ++i) tables[i] = table_of<Bits>(rows.above[r + i], at.units_of(prepared).most);
    add_up<Bits, Count>(w, w.codes + (first + r) * w.row_bytes, reinterpret_cast<const __m512i*>(prepared), tables, totals[v] + r);
  }
}

template <int Bits>
static void multiply_as(const Product& product, const float* prepared, int64_t first, int64_t last) {
  const Coded& w = *product.matrix;
  const Inputs at(w);
  for (; first < last; first += 16) {
    const int64_t count = least(16, last - first);
    const Rows rows(w, first, count);
    __m512 totals[most_vectors][16];
    int64_t r = 0;
    for (; r + rows_at_once <= count; r += rows_at_once) multiply_rows<Bits, rows_at_once>(product, prepared, rows, first, r, totals);
    for (; r < count; ++r) multiply_rows<Bits, 1>(product, prepared, rows, first, r, totals);
    for (int64_t v = 0; v < product.vectors; ++v) {
      const Inputs::Units units = at.units_of(prepared + v * at.floats);
      for (r = count; r < 16; ++r) totals[v][r] = _mm512_setzero_ps();
      transpose(reinterpret_cast<__m512i*>(totals[v]));
      __m512 sum = totals[v][0];
      for (int i = 1; i < 16; ++i) sum = _mm512_add_ps(sum, totals[v][i]);
      sum = _mm512_mul_ps(sum, _mm512_mul_ps(rows.reach, _mm512_set1_ps(1.0f / units.most)));
      sum = _mm512_fmadd_ps(_mm512_set1_ps(units.sum), rows.middle, sum);
      sum = _mm512_mul_ps(sum, _mm512_mul_ps(_mm512_set1_ps(units.unit), rows.scale));
      put_sixteen(product, v * w.rows + first, static_cast<__mmask16>((1u << count) - 1), sum);
    }
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float*) {
  const int bits = product.matrix->bits;
  (bits == 2 ? multiply_as<2> : bits == 3 ? multiply_as<3> : multiply_as<4>)(product, prepared, first, last);
}

}  // namespace row_levels
}  // namespace FEWBITS_ISA
}  // namespace fewbits

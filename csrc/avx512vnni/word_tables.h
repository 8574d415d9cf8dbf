// Tables of sums for codewords: of a group of inputs and a codebook the inner products with all 256 codewords, made once for all rows.
//
// Numbers of a table are whole, of as many bytes as inputs have digits, raised to be positive, and lie as planes of 256 bytes. A run of tables
// shares a unit: the longest group of its inputs times the longest codeword, which no inner product exceeds, is the largest number.
//
// Of one or two bytes they are made of whole numbers of 16 bits: codewords in parts of the longest one, a group's inputs in parts of the
// run's longest group over a power of two, which the sum is shifted by. Of three bytes they are made in floats.
#pragma once
#include <cmath>
#include <limits>

#include "../vectors.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace word_tables {

constexpr int64_t table_entries = 256;    // and the bytes of a plane
constexpr int64_t longest = 256;          // tables of a run: so many bytes are summed in 16 bits
constexpr int64_t most_bytes = 32 << 20;  // of tables that are there at once
constexpr double parts_of_longest = 32760;  // a little less than 16 bits hold, as lengths are rounded

static inline int64_t tables_of(const Coded& w) { return vectors::groups(w) * w.books; }

static bool serves(const Coded& w, int64_t count) {
  const bool ours = w.form == Coded::vectors && w.lines && !w.transposed && w.rows >= word_rows;
  return ours && tables_of(w) <= most_bytes / (3 * table_entries) / count;
}

// How the memory of a product's inputs is divided, in numbers of 32 bits: what rows that are not in lines read, then codebooks number by
// number, or pair by pair, then of every vector the units of its runs and its tables.
struct Plan {
  int64_t groups, runs, table_floats;  // groups of a run, runs of a vector, floats of a table
  int64_t turned, reach, units, tables, floats;

  explicit Plan(const Product& product) {
    const Coded& w = *product.matrix;
    const int64_t all = vectors::groups(w), least_runs = ceiling(all, longest / w.books);
    groups = ceiling(all, least_runs);
    runs = ceiling(all, groups);
    table_floats = product.digits * table_entries / 4;
    turned = rounded_up(vectors::prepared_floats(product), lanes);
    reach = turned + w.books * w.unit * table_entries;
    units = reach + lanes;
    tables = rounded_up(units + product.vectors * runs, lanes);
    floats = tables + product.vectors * tables_of(w) * table_floats;
  }
};

static int64_t prepared_floats(const Product& product) { return Plan(product).floats; }

// ---- codebooks --------------------------------------------------------------------------------------------------------------

// In which order four registers of 16 numbers come to be one of 64 bytes when numbers are packed in pairs of registers.
static inline int64_t place_of_entry(int64_t entry) {
  const int64_t within = entry % 64;
  return entry / 64 * 64 + within % 16 / 4 * 16 + within / 16 * 4 + within % 4;
}

// Squares of eight numbers; in double precision, which those of no float leave.
static inline __m512d squares(__m256 values) {
  const __m512d wide = _mm512_cvtps_pd(values);
  return _mm512_mul_pd(wide, wide);
}

// The length of the longest of some vectors of `unit` numbers, which itself is told; no finite number where one of them is none.
static double find_longest(int64_t unit, const float* from, int64_t count, float* lengths) {
  double most = 0.0, all = 0.0;
  for (int64_t i = 0; i < count; ++i, from += unit) {
    __m512d sum = _mm512_setzero_pd();
    if (unit == 4) sum = squares(_mm256_zextps128_ps256(_mm_loadu_ps(from)));
    else for (int64_t at = 0; at < unit; at += 8) sum = _mm512_add_pd(sum, squares(_mm256_loadu_ps(from + at)));
    const double square = _mm512_reduce_add_pd(sum);
    most = square > most ? square : most;
    all += square;
    if (lengths != nullptr) lengths[i] = static_cast<float>(std::sqrt(square));
  }
  return all < std::numeric_limits<double>::infinity() ? std::sqrt(most) : all;
}

// The codewords' first numbers, then the second ones: `[unit, 256]` of each codebook, in the order that packing undoes.
static void turn_books(const Coded& w, const float* books, float* turned) {
  for (int64_t book = 0; book < w.books; ++book, turned += w.unit * table_entries) {
    for (int64_t i = 0; i < w.unit * table_entries; ++i) turned[i] = 0.0f;
    for (int64_t entry = 0; entry < w.entries; ++entry, books += w.unit) {
      const int64_t place = place_of_entry(entry);
      for (int64_t i = 0; i < w.unit; ++i) turned[i * table_entries + place] = books[i];
    }
  }
}

// Four neighbouring numbers times `by` as two pairs of 16 bits.
static inline void whole_pairs(const float* from, float by, int32_t* pairs) {
  const __m128i whole = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(from), _mm_set1_ps(by)));
  const int64_t both = _mm_cvtsi128_si64(_mm_packs_epi32(whole, whole));
  std::memcpy(pairs, &both, 8);
}

// The same of pairs of numbers, in parts: `[unit / 2, 256]`.
static void turn_pairs(const Coded& w, const float* books, float by, int32_t* turned) {
  for (int64_t book = 0; book < w.books; ++book, turned += w.unit / 2 * table_entries) {
    if (w.entries < table_entries) std::memset(turned, 0, static_cast<size_t>(w.unit * table_entries * 2));
    for (int64_t entry = 0; entry < w.entries; ++entry, books += w.unit) {
      int32_t* to = turned + place_of_entry(entry);
      for (int64_t i = 0; i < w.unit; i += 4, to += 2 * table_entries) {
        int32_t pairs[2];
        whole_pairs(books + i, by, pairs);
        to[0] = pairs[0], to[table_entries] = pairs[1];
      }
    }
  }
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  vectors::prepare(product, vector, room);
  if (vector != 0) return;
  const Plan plan(product);
  const float* books = vectors::find_books(product, room);
  const double reach = find_longest(w.unit, books, w.books * w.entries, nullptr);
  room[plan.reach] = static_cast<float>(reach);
  if (product.digits == 3) turn_books(w, books, room + plan.turned);
  else turn_pairs(w, books, static_cast<float>(parts_of_longest / reach), reinterpret_cast<int32_t*>(room + plan.turned));
}

// ---- tables -----------------------------------------------------------------------------------------------------------------

// The lowest bytes of 64 numbers of 16 bits, and the higher ones.
static inline __m512i low_bytes(__m512i one, __m512i two) {
  const __m512i low = _mm512_set1_epi16(0xff);
  return _mm512_packus_epi16(_mm512_and_si512(one, low), _mm512_and_si512(two, low));
}
static inline __m512i high_bytes(__m512i one, __m512i two) { return _mm512_packus_epi16(_mm512_srli_epi16(one, 8), _mm512_srli_epi16(two, 8)); }

// One or two planes: `input` has pairs of 16 bits, sums are rounded and shifted.
template <int Unit, int Planes>
static void make_table(const int32_t* input, int shift, const int32_t* turned, uint8_t* to) {
  const __m512i half = _mm512_set1_epi32(1 << (shift - 1)), raise = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m128i by = _mm_cvtsi32_si128(shift);
  __m512i pairs[Unit / 2];
  for (int i = 0; i < Unit / 2; ++i) pairs[i] = _mm512_set1_epi32(input[i]);
  for (int at = 0; at < table_entries; at += 64, to += 64) {
    __m512i sum[4];
    for (int part = 0; part < 4; ++part) sum[part] = half;
    for (int i = 0; i < Unit / 2; ++i) {
      const int32_t* from = turned + i * table_entries + at;
      for (int part = 0; part < 4; ++part) sum[part] = _mm512_dpwssd_epi32(sum[part], pairs[i], _mm512_load_si512(from + 16 * part));
    }
    for (int part = 0; part < 4; ++part) sum[part] = _mm512_sra_epi32(sum[part], by);
    const __m512i one = _mm512_packs_epi32(sum[0], sum[1]), two = _mm512_packs_epi32(sum[2], sum[3]);
    if (Planes == 2) _mm512_store_si512(to, low_bytes(one, two));
    const __m512i top = Planes == 2 ? high_bytes(one, two) : _mm512_packs_epi16(one, two);
    _mm512_store_si512(to + (Planes - 1) * table_entries, _mm512_xor_si512(top, raise));
  }
}

// Three planes.
template <int Unit>
static void make_table(const float* inputs, float by, const float* turned, uint8_t* to) {
  const __m512i lower = _mm512_set1_epi32(0xffff);
  __m512 input[Unit];
  for (int i = 0; i < Unit; ++i) input[i] = _mm512_set1_ps(inputs[i] * by);
  for (int at = 0; at < table_entries; at += 64, to += 64) {
    __m512 sum[4] = {};
    for (int i = 0; i < Unit; ++i) {
      for (int part = 0; part < 4; ++part) sum[part] = _mm512_fmadd_ps(input[i], _mm512_load_ps(turned + i * table_entries + at + 16 * part), sum[part]);
    }
    __m512i low[4], top[4];
    for (int part = 0; part < 4; ++part) {
      const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(sum[part]), _mm512_set1_epi32(1 << 23));
      low[part] = _mm512_and_si512(whole, lower), top[part] = _mm512_srli_epi32(whole, 16);
    }
    const __m512i one = _mm512_packus_epi32(low[0], low[1]), two = _mm512_packus_epi32(low[2], low[3]);
    _mm512_store_si512(to, low_bytes(one, two));
    _mm512_store_si512(to + table_entries, high_bytes(one, two));
    _mm512_store_si512(to + 2 * table_entries, _mm512_packus_epi16(_mm512_packus_epi32(top[0], top[1]), _mm512_packus_epi32(top[2], top[3])));
  }
}

// The tables of a group in units of a run: `by` makes parts of its inputs.
template <int Unit, int Planes>
static uint8_t* make_group(const Coded& w, const float* inputs, float by, double of_longest, const float* turned, uint8_t* to) {
  constexpr int shift = Planes == 1 ? 23 : 15, most = 31 - shift;
  // How often the group, doubled, is no longer than the longest.
  const int doubled = static_cast<int>(as_bits(static_cast<float>(of_longest)) >> 23) - 127, times = doubled < 0 ? 0 : doubled < most ? doubled : most;
  int32_t input[Unit / 2];
  for (int i = 0; i < Unit / 2; i += 2) whole_pairs(inputs + 2 * i, by * static_cast<float>(1 << times), input + i);
  for (int64_t book = 0; book < w.books; ++book, to += Planes * table_entries) {
    make_table<Unit, Planes>(input, shift + times, reinterpret_cast<const int32_t*>(turned) + book * (Unit / 2 * table_entries), to);
  }
  return to;
}

template <int Unit, int Planes>
static void make_tables(const Product& product, const Plan& plan, int64_t vector, int64_t run, float* room) {
  const Coded& w = *product.matrix;
  const int64_t first = run * plan.groups, count = least(plan.groups, vectors::groups(w) - first);
  const float *inputs = room + vector * vectors::input_floats(w) + first * Unit, *turned = room + plan.turned;
  float lengths[longest];
  const double length = find_longest(Unit, inputs, count, lengths), reach = room[plan.reach], largest = length * reach;
  constexpr double numbers = Planes == 3 ? (1 << 23) * (1.0 - 0x1p-12) : parts_of_longest * parts_of_longest / (Planes == 2 ? 1 << 15 : 1 << 23);
  const bool fits = length > 0x1p-100 && reach > 0x1p-100 && largest < 0x1p+120;  // what is less counts as nothing
  room[plan.units + vector * plan.runs + run] = fits ? static_cast<float>(largest / numbers) : largest < 1.0 ? 0.0f : NAN;
  const float by = !fits ? 0.0f : static_cast<float>((Planes == 3 ? numbers / reach : parts_of_longest) / length);
  uint8_t* to = reinterpret_cast<uint8_t*>(room + plan.tables + (vector * tables_of(w) + first * w.books) * plan.table_floats);
  for (int64_t group = 0; group < count; ++group, inputs += Unit) {
    if constexpr (Planes < 3) {
      to = make_group<Unit, Planes>(w, inputs, by, fits ? length / lengths[group] : 1.0, turned, to);
    } else {
      for (int64_t book = 0; book < w.books; ++book, to += Planes * table_entries) make_table<Unit>(inputs, by, turned + book * (Unit * table_entries), to);
    }
  }
}

static int64_t parts(const Product& product) { return product.vectors * Plan(product).runs; }

template <int Unit>
static void make_unit(const Product& product, const Plan& plan, int64_t vector, int64_t run, float* room) {
  if (product.digits == 1) make_tables<Unit, 1>(product, plan, vector, run, room);
  else if (product.digits == 2) make_tables<Unit, 2>(product, plan, vector, run, room);
  else make_tables<Unit, 3>(product, plan, vector, run, room);
}

static void make_part(const Product& product, int64_t part, float* room) {
  const Plan plan(product);
  const int64_t vector = part / plan.runs, run = part % plan.runs;
  if (product.matrix->unit == 4) make_unit<4>(product, plan, vector, run, room);
  else if (product.matrix->unit == 8) make_unit<8>(product, plan, vector, run, room);
  else make_unit<16>(product, plan, vector, run, room);
}

}  // namespace word_tables
}  // namespace FEWBITS_ISA
}  // namespace fewbits

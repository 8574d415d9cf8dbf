// Products of codewords by tables. For every group of columns and every codebook the inner products of the group's inputs with all codewords
// are made once, for all rows; a row then adds up numbers that it looks up, 64 rows at a time, whose codes lie side by side.
//
// Numbers of a table are whole, of as many bytes as inputs have digits, and lie as planes of 256 bytes: four registers, in which one
// instruction looks 64 codes up among 128 entries. Planes are summed apart, even and odd rows in 16 bits each, as long as that holds them.
// A run of tables shares a unit: the longest group of inputs times the longest codeword, which no inner product exceeds, is the largest number.
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
constexpr int64_t bytes_ahead = 2048;     // of codes that are fetched meanwhile

static inline int64_t tables_of(const Coded& w) { return vectors::groups(w) * w.books; }

static bool serves(const Coded& w, int64_t count) {
  const bool ours = w.form == Coded::vectors && w.lines && !w.transposed && w.rows >= word_rows;
  return ours && tables_of(w) <= most_bytes / (3 * table_entries) / count;
}

// How the memory of a product's inputs is divided, in numbers of 32 bits: what rows that are not in lines read, then codebooks number by
// number, then of every vector the units of its runs and its tables.
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

// ---- tables ---------------------------------------------------------------------------------------------------------------

// In which order four registers of 16 numbers come to be one of 64 bytes when numbers are packed in pairs of registers.
static inline int64_t place_of_entry(int64_t entry) {
  const int64_t within = entry % 64;
  return entry / 64 * 64 + within % 16 / 4 * 16 + within / 16 * 4 + within % 4;
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

// Squares of eight numbers; in double precision, which those of no float leave.
static inline __m512d squares(__m256 values) {
  const __m512d wide = _mm512_cvtps_pd(values);
  return _mm512_mul_pd(wide, wide);
}

// The largest of some lengths from their squares; no finite number where one of them is none.
struct Longest {
  __m512d most = _mm512_setzero_pd(), all = _mm512_setzero_pd();

  void see(__m512d square) {
    most = _mm512_max_pd(most, square);
    all = _mm512_add_pd(all, square);
  }

  double length() const {
    const double total = _mm512_reduce_add_pd(all);
    return total < std::numeric_limits<double>::infinity() ? std::sqrt(_mm512_reduce_max_pd(most)) : total;
  }
};

static double longest_word(const Coded& w, const float* turned) {
  Longest found;
  for (int64_t book = 0; book < w.books; ++book, turned += w.unit * table_entries) {
    for (int64_t at = 0; at < table_entries; at += 8) {
      __m512d sum = _mm512_setzero_pd();
      for (int64_t i = 0; i < w.unit; ++i) sum = _mm512_add_pd(sum, squares(_mm256_loadu_ps(turned + i * table_entries + at)));
      found.see(sum);
    }
  }
  return found.length();
}

static double longest_group(const Coded& w, const float* inputs, int64_t count) {
  Longest found;
  for (int64_t group = 0; group < count; ++group, inputs += w.unit) {
    __m512d sum = _mm512_setzero_pd();
    if (w.unit == 4) sum = squares(_mm256_zextps128_ps256(_mm_loadu_ps(inputs)));
    else for (int64_t i = 0; i < w.unit; i += 8) sum = _mm512_add_pd(sum, squares(_mm256_loadu_ps(inputs + i)));
    found.see(_mm512_set1_pd(_mm512_reduce_add_pd(sum)));
  }
  return found.length();
}

// What codes of one table stand for, in units: `by` is 1 over the unit. Numbers are raised to be positive.
template <int Unit, int Planes>
static void make_table(const float* inputs, float by, const float* turned, uint8_t* to) {
  constexpr float raise = static_cast<float>(1 << (8 * Planes - 1));
  const __m512i low = _mm512_set1_epi16(0xff), lower = _mm512_set1_epi32(0xffff);
  __m512 input[Unit];
  for (int i = 0; i < Unit; ++i) input[i] = _mm512_set1_ps(inputs[i] * by);
  for (int at = 0; at < table_entries; at += 64, to += 64) {
    __m512 sum[4];
    for (int part = 0; part < 4; ++part) sum[part] = _mm512_set1_ps(Planes < 3 ? raise : 0.0f);  // of 24 bits there are none to spare
    for (int i = 0; i < Unit; ++i) {
      for (int part = 0; part < 4; ++part) sum[part] = _mm512_fmadd_ps(input[i], _mm512_load_ps(turned + i * table_entries + at + 16 * part), sum[part]);
    }
    __m512i whole[4];
    for (int part = 0; part < 4; ++part) {
      whole[part] = _mm512_cvtps_epi32(sum[part]);
      if (Planes == 3) whole[part] = _mm512_add_epi32(whole[part], _mm512_set1_epi32(1 << 23));
    }
    if (Planes == 3) {
      const auto top = [&](int part) { return _mm512_packus_epi32(_mm512_srli_epi32(whole[part], 16), _mm512_srli_epi32(whole[part + 1], 16)); };
      _mm512_store_si512(to + 2 * table_entries, _mm512_packus_epi16(top(0), top(2)));
      for (int part = 0; part < 4; ++part) whole[part] = _mm512_and_si512(whole[part], lower);
    }
    const __m512i one = _mm512_packus_epi32(whole[0], whole[1]), two = _mm512_packus_epi32(whole[2], whole[3]);
    _mm512_store_si512(to, _mm512_packus_epi16(_mm512_and_si512(one, low), _mm512_and_si512(two, low)));
    if (Planes > 1) _mm512_store_si512(to + table_entries, _mm512_packus_epi16(_mm512_srli_epi16(one, 8), _mm512_srli_epi16(two, 8)));
  }
}

template <int Unit, int Planes>
static void make_tables(const Product& product, const Plan& plan, int64_t vector, int64_t run, float* room) {
  const Coded& w = *product.matrix;
  const int64_t first = run * plan.groups, count = least(plan.groups, vectors::groups(w) - first);
  const float* inputs = room + vector * vectors::input_floats(w) + first * Unit;
  // A little less than there are numbers, so that what rounds on the way to a number does not lead beyond the largest.
  constexpr double numbers = Planes == 1 ? 127.0 : (1 << (8 * Planes - 1)) * (1.0 - 0x1p-12);
  const double largest = longest_group(w, inputs, count) * room[plan.reach], unit = largest / numbers;
  const float by = unit > 0x1p-126 && room[plan.reach] > 0x1p-100f ? static_cast<float>(1.0 / unit) : 0.0f;  // too where it is not a number
  room[plan.units + vector * plan.runs + run] = by > 0.0f ? static_cast<float>(unit) : largest < 1.0 ? 0.0f : NAN;
  uint8_t* to = reinterpret_cast<uint8_t*>(room + plan.tables + (vector * tables_of(w) + first * w.books) * plan.table_floats);
  for (int64_t group = 0; group < count; ++group, inputs += Unit) {
    for (int64_t book = 0; book < w.books; ++book, to += Planes * table_entries) {
      make_table<Unit, Planes>(inputs, by, room + plan.turned + book * Unit * table_entries, to);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Sums of planes as floats, times the unit, to those of 64 rows: every fourth row from the first on, from the second on, ...
template <int Planes>
static inline void add_to_sums(const __m512i* all, const __m512i* odd, int64_t count, float unit, float* sums) {
  const __m512i low = _mm512_set1_epi32(0xffff), raised = _mm512_set1_epi32(static_cast<int>(count) << (Planes == 1 ? 7 : 15));
  __m512i of[4][Planes];
  for (int p = 0; p < Planes; ++p) {
    const __m512i even = _mm512_sub_epi16(all[p], _mm512_slli_epi16(odd[p], 8));
    of[0][p] = _mm512_and_si512(even, low), of[2][p] = _mm512_srli_epi32(even, 16);
    of[1][p] = _mm512_and_si512(odd[p], low), of[3][p] = _mm512_srli_epi32(odd[p], 16);
  }
  for (int place = 0; place < 4; ++place) {
    __m512i top = of[place][Planes - 1];
    if (Planes > 1) top = _mm512_add_epi32(_mm512_slli_epi32(top, 8), of[place][Planes == 1 ? 0 : Planes - 2]);
    __m512 found = _mm512_cvtepi32_ps(_mm512_sub_epi32(top, raised));  // less than 2**24
    if (Planes == 3) found = _mm512_fmadd_ps(found, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(of[place][0]));
    float* to = sums + 16 * place;
    _mm512_store_ps(to, _mm512_fmadd_ps(found, _mm512_set1_ps(unit), _mm512_load_ps(to)));
  }
}

// Adds up what the tables of a run have for some blocks of 64 rows, of each plane: of all bytes, modulo 2**16, and of the odd ones.
template <int Planes, int Blocks>
static void add_up(const uint8_t* codes, int64_t stride, const uint8_t* tables, int64_t count, float unit, float* sums) {
  __m512i all[Blocks][Planes], odd[Blocks][Planes];
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) for (int p = 0; p < Planes; ++p) all[b][p] = odd[b][p] = _mm512_setzero_si512();
  for (int64_t table = 0; table < count; ++table, codes += word_rows, tables += Planes * table_entries) {
    __m512i part[Planes][4];
#pragma GCC unroll 4
    for (int p = 0; p < Planes; ++p) for (int i = 0; i < 4; ++i) part[p][i] = _mm512_load_si512(tables + p * table_entries + 64 * i);
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const __m512i code = _mm512_loadu_si512(codes + b * stride);
      __builtin_prefetch(codes + b * stride + bytes_ahead, 0, 2);
      const __mmask64 upper = _mm512_movepi8_mask(code);
#pragma GCC unroll 4
      for (int p = 0; p < Planes; ++p) {
        const __m512i one = _mm512_permutex2var_epi8(part[p][0], code, part[p][1]), two = _mm512_permutex2var_epi8(part[p][2], code, part[p][3]);
        const __m512i found = _mm512_mask_blend_epi8(upper, one, two);
        all[b][p] = _mm512_add_epi16(all[b][p], found);
        odd[b][p] = _mm512_add_epi16(odd[b][p], _mm512_srli_epi16(found, 8));
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < Blocks; ++b) add_to_sums<Planes>(all[b], odd[b], count, unit, sums + b * word_rows);
}

// All runs of a vector for some blocks from `block` on.
template <int Planes, int Blocks>
static void multiply_blocks(const Product& product, const Plan& plan, const float* prepared, int64_t vector, int64_t block, float* sums) {
  const Coded& w = *product.matrix;
  const int64_t all = tables_of(w), stride = word_rows * w.row_bytes;
  for (int64_t i = 0; i < Blocks * word_rows; ++i) sums[i] = 0.0f;
  for (int64_t run = 0; run < plan.runs; ++run) {
    const int64_t first = run * plan.groups * w.books, count = least(plan.groups * w.books, all - first);
    const uint8_t* tables = reinterpret_cast<const uint8_t*>(prepared + plan.tables + (vector * all + first) * plan.table_floats);
    add_up<Planes, Blocks>(w.codes + block * stride + first * word_rows, stride, tables, count, prepared[plan.units + vector * plan.runs + run], sums);
  }
}

// The rows first to last of a block, times their scales, as numbers of the outputs' type.
static void put_block(const Product& product, int64_t vector, int64_t block, int64_t first, int64_t last, const float* sums) {
  const Coded& w = *product.matrix;
  const int64_t from = block * word_rows < first ? first : block * word_rows, count = least((block + 1) * word_rows, last) - from;
  float values[word_rows], scales[word_rows];
  for (int64_t i = 0; i < word_rows; ++i) values[i] = sums[i % 4 * 16 + i / 4];
  float* there = values + from % word_rows;
  if (w.scales.kind != Values::none) {
    read_numbers(w.scales.data, from, w.scales.number, count, scales);
    for (int64_t i = 0; i < count; ++i) there[i] *= scales[i];
  }
  for (int64_t i = 0; i < count; ++i) put_number(product.outputs, vector * w.rows + from + i, product.number, there[i]);
}

// Whether codes of whole blocks all have codewords.
static bool have_words(const Coded& w, int64_t block, int64_t last) {
  if (w.entries == table_entries) return true;
  const uint8_t *from = w.codes + block * word_rows * w.row_bytes, *end = w.codes + last * word_rows * w.row_bytes;
  uint8_t largest = 0;
  for (; from < end; ++from) largest = *from > largest ? *from : largest;
  return largest < w.entries;
}

template <int Planes>
static void multiply_lines(const Product& product, const Plan& plan, const float* prepared, int64_t first, int64_t last) {
  constexpr int at_once = Planes == 3 ? 2 : 4;  // as many as registers hold the sums of
  const int64_t end = ceiling(last, word_rows);
  alignas(64) float sums[at_once * word_rows];
  for (int64_t block = first / word_rows, blocks; block < end; block += blocks) {
    blocks = end - block >= at_once ? at_once : end - block >= 2 ? 2 : 1;
    if (!have_words(*product.matrix, block, block + blocks)) return product.broken->store(true);
    for (int64_t v = 0; v < product.vectors; ++v) {
      if (blocks == at_once) multiply_blocks<Planes, at_once>(product, plan, prepared, v, block, sums);
      else if (blocks == 2) multiply_blocks<Planes, 2>(product, plan, prepared, v, block, sums);
      else multiply_blocks<Planes, 1>(product, plan, prepared, v, block, sums);
      for (int64_t b = 0; b < blocks; ++b) put_block(product, v, block + b, first, last, sums + b * word_rows);
    }
  }
}

// ---- for each number of digits ----------------------------------------------------------------------------------------------

static void prepare(const Product& product, int64_t vector, float* room) {
  vectors::prepare(product, vector, room);
  if (vector != 0) return;
  const Plan plan(product);
  turn_books(*product.matrix, vectors::find_books(product, room), room + plan.turned);
  room[plan.reach] = static_cast<float>(longest_word(*product.matrix, room + plan.turned) * (1.0 + 0x1p-20));
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

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const int64_t end = vectors::rows_in_lines(*product.matrix);
  if (last > end) vectors::multiply(product, prepared, first < end ? end : first, last, scratch);
  if (first >= end) return;
  const Plan plan(product);
  last = least(last, end);
  if (product.digits == 1) multiply_lines<1>(product, plan, prepared, first, last);
  else if (product.digits == 2) multiply_lines<2>(product, plan, prepared, first, last);
  else multiply_lines<3>(product, plan, prepared, first, last);
}

}  // namespace word_tables
}  // namespace FEWBITS_ISA
}  // namespace fewbits

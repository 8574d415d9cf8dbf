// Panels of bytes: codes less a whole number, times inputs of 8 bits, summed by fours into 32 bits.
//
// A word of 32 bits holds four columns of a row: every other, or every fourth where codes have 4 or 2 bits, so that one mask takes them
// out of a register. Inputs are whole numbers from -127 to 127 times a unit, a power of two, of a run of columns
// (its groups, or as many of them as have 128 columns); 128 more in their bytes, which have no sign. What that adds is taken away where
// a sum begins: it is 128 times the sum of a row's weights over a segment, the columns whose sum is scaled at once.
#pragma once
#include "../avx512/columns.h"
#include "../panels.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace byte_panels {

constexpr int64_t some_vectors = 6;  // of a tile, that are multiplied at a time
constexpr int64_t least_run = 128, longest = 256;  // columns

// How columns are cut: groups into segments, which are joined to runs.
struct Cut {
  int64_t columns;            // of a row, whole registers
  int64_t group, pieces;      // columns of a group, and its segments
  int64_t segments, per_run;  // of a row, of a run
  int64_t runs, block;        // of a row; columns of which a panel is made at a time

  explicit Cut(const Coded& w) {
    columns = padded_columns(w);
    group = w.groups == 1 ? columns : w.group;
    pieces = ceiling(group, longest);
    const int64_t behind = (w.groups - 1) * group;  // which the last group begins, with the columns that pad a row
    segments = (w.groups - 1) * pieces + least(pieces, ceiling(columns - behind, longest));
    per_run = group >= least_run ? 1 : ceiling(least_run, group);
    runs = ceiling(segments, per_run);
    block = columns;
    const int64_t run = pieces > 1 ? longest : per_run * group;  // of every one but the last
    if (run % 64 != 0 || (pieces > 1 && w.groups > 1 && group % longest != 0)) return;
    for (block = rounded_up(longest, run); block % chunk != 0;) block += run;
    block = least(block, columns);
  }
};

// One segment, and on to the next without divisions, which take long.
struct Segment {
  int64_t index, group, piece, begin, end;

  Segment(const Cut& cut, int64_t at) : index(at), group(at / cut.pieces), piece(at % cut.pieces), begin(group * cut.group + piece * longest) { find_end(cut); }
  void find_end(const Cut& cut) { end = index + 1 == cut.segments ? cut.columns : piece + 1 == cut.pieces ? (group + 1) * cut.group : begin + longest; }
  void next(const Cut& cut) {
    index += 1, piece += 1;
    if (piece == cut.pieces) piece = 0, group += 1;
    begin = end;
    find_end(cut);
  }
};

// What a product needs to know of a segment.
struct Step {
  int32_t words, grid;  // of a row; where its scales are
  bool ends_run;
};

static void find_steps(const Cut& cut, Step* steps) {
  for (Segment s(cut, 0); s.index < cut.segments; s.next(cut)) {
    const bool ends_run = (s.index + 1) % cut.per_run == 0 || s.index + 1 == cut.segments;
    steps[s.index] = {static_cast<int32_t>((s.end - s.begin) / 4), static_cast<int32_t>(s.group * panel_rows), ends_run};
  }
}

// Whether weights are whole numbers of 8 bits times a scale, but for what offsets, and zero points that are not whole, add.
static bool serves(const Coded& w) {
  return w.form == Coded::packed && w.bits <= 8 && w.levels.kind == Values::none && (w.groups == 1 || w.group % 4 == 0);
}

// Whether codes less what stands for zero are such numbers, and not only codes less the middle one.
static bool whole(const Coded& w) {
  if (has_zero_points(w)) return w.zeros.kind == Values::packed && w.bits < 8;
  return w.counts != Coded::from_zero || w.bits < 8;
}

static bool shifted(const Coded& w) { return has_offsets(w) || !whole(w); }

// ---- inputs ---------------------------------------------------------------------------------------------------------------

// Words of all tiles, by blocks; then of each tile its units `[runs, tile]`, its sums `[segments, tile]`, and room for a vector and for bytes.
struct Inputs {
  uint32_t* words;
  float *units, *sums, *room;
  int64_t ahead = 0;  // words to the next tile's

  Inputs(const Cut& cut, int64_t tiles, int64_t which, uint8_t* memory) {
    const int64_t each = words_of_each(cut);
    words = reinterpret_cast<uint32_t*>(memory);
    units = reinterpret_cast<float*>(memory) + tiles * tile * (cut.columns / 4) + which * each;
    sums = units + cut.runs * tile;
    room = units + rounded_up((cut.runs + cut.segments) * tile, 16);
  }
  static int64_t words_of_each(const Cut& cut) { return rounded_up((cut.runs + cut.segments) * tile, 16) + cut.columns + tile * cut.columns / 4; }
};

static int64_t prepared_bytes(const Product& product) {
  const Cut cut(*product.matrix);
  return ceiling(product.vectors, tile) * (cut.columns / 4 * tile + Inputs::words_of_each(cut)) * 4;
}

// The power of two that inputs are rounded to multiples of; NaN where one is not finite. `count` is a multiple of 4.
static float find_unit(const float* inputs, int64_t count) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1u << (count - i)) - 1);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_maskz_loadu_epi32(there, inputs + i), _mm512_set1_epi32(0x7fffffff)));
  }
  const uint32_t found = _mm512_reduce_max_epu32(largest);
  if (found >= 0x7f800000) return as_float(0x7fc00000);
  // Numbers end at 127, so that the very largest mantissas need one bit more.
  const int exponent = static_cast<int>((found + 0x20000) >> 23) - 126;
  return as_float(static_cast<uint32_t>((exponent < -100 ? -100 : exponent) - 7 + 127) << 23);
}

// Inputs over a unit as bytes, 128 more than they are; returns their sum.
static int64_t to_bytes(const float* inputs, int64_t count, float unit, uint8_t* to) {
  const __m512 by = _mm512_set1_ps(unit == unit ? 1.0f / unit : 0.0f);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1u << (count - i)) - 1);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, inputs + i), by);
    const __m512i numbers = unit == unit ? _mm512_cvtps_epi32(scaled) : _mm512_setzero_si512();
    sum = _mm512_add_epi32(sum, numbers);
    _mm_mask_storeu_epi8(to + i, there, _mm_xor_si128(_mm512_cvtepi32_epi8(numbers), _mm_set1_epi8(static_cast<char>(0x80))));
  }
  return _mm512_reduce_add_epi32(sum);
}

static void prepare_vector(const Cut& cut, const float* values, uint8_t* bytes, float* units, float* sums) {
  Segment segment(cut, 0);
  for (int64_t run = 0; run < cut.runs; ++run) {
    const int64_t behind = least((run + 1) * cut.per_run, cut.segments), from = segment.begin, to = Segment(cut, behind - 1).end;
    const float unit = find_unit(values + from, to - from);
    units[run * tile] = unit;
    for (; segment.index < behind; segment.next(cut)) {
      const int64_t begin = segment.begin;
      sums[segment.index * tile] = static_cast<float>(to_bytes(values + begin, segment.end - begin, unit, bytes + begin));
    }
  }
}

// Where the inputs of a block of columns begin, `taken` columns of each tile.
static inline int64_t place_in(int64_t column, int64_t taken, int64_t tiles, int64_t which) { return (column * tiles + which * taken) / 4 * tile; }

// Bytes in such an order that those of a word lie `apart`: 1, 2 or 4 columns.
static void deal(uint8_t* bytes, int64_t count, int64_t apart) {
  if (apart == 1) return;
  alignas(16) uint8_t order[16];
  for (int64_t i = 0; i < 16; ++i) order[i] = static_cast<uint8_t>(i / (4 * apart) * (4 * apart) + i % 4 * apart + i % (4 * apart) / 4);
  const __m512i from = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(order)));
  for (int64_t i = 0; i < count; i += 64) _mm512_storeu_si512(bytes + i, _mm512_shuffle_epi8(_mm512_loadu_si512(bytes + i), from));
}

static void prepare(const Product& product, int64_t which, uint8_t* memory) {
  const Coded& w = *product.matrix;
  const Cut cut(w);
  const int64_t tiles = ceiling(product.vectors, tile);
  const Inputs to(cut, tiles, which, memory);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(to.room + cut.columns);
  for (int64_t v = 0; v < tile; ++v) {
    const int64_t vector = which * tile + v, there = vector < product.vectors ? w.columns : 0;
    read_numbers(product.inputs, vector * w.columns, product.number, there, to.room);
    std::memset(to.room + there, 0, static_cast<size_t>(cut.columns - there) * 4);
    prepare_vector(cut, to.room, bytes + v * cut.columns, to.units + v, to.sums + v);
    deal(bytes + v * cut.columns, cut.columns, 8 / field_bits(w));
  }
  for (int64_t column = 0; column < cut.columns; column += cut.block) {
    const int64_t taken = least(cut.block, cut.columns - column);
    lay_out(taken / 4, to.words + place_in(column, taken, tiles, which),
            [&](int v, int64_t word) { return _mm512_loadu_si512(bytes + v * cut.columns + column + 4 * word); });
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------------

// A panel, memory of a thread.
struct Panel {
  uint32_t* weights;          // [words of a block, panel_rows]
  float *scales, *shifts;     // [padded groups, panel_rows]; what is added to a sum for each input's number
  uint32_t* bases;            // [padded groups, panel_rows]: what is taken away from codes, four times
  int32_t* begins;            // [segments, panel_rows]: what sums begin with
  float* sums;                // [vectors, panel_rows]
  float* room;

  Panel(const Coded& w, const Cut& cut, int64_t tiles, int64_t which, uint8_t* memory) {
    const int64_t grid = padded_groups(w) * panel_rows;
    float* at = reinterpret_cast<float*>(memory) + which * words(w, cut, tiles);
    weights = reinterpret_cast<uint32_t*>(at), at += cut.block / 4 * panel_rows;
    scales = at, shifts = at + grid, bases = reinterpret_cast<uint32_t*>(at + 2 * grid), at += 3 * grid;
    begins = reinterpret_cast<int32_t*>(at), at += cut.segments * panel_rows;
    sums = at;
    room = reinterpret_cast<float*>(memory) + panels_at_once * words(w, cut, tiles);
  }
  static int64_t words(const Coded& w, const Cut& cut, int64_t tiles) {
    return (cut.block / 4 + 3 * padded_groups(w) + cut.segments + tiles * tile) * panel_rows;
  }
};

static int64_t scratch_bytes(const Product& product, int64_t tiles) {
  const Coded& w = *product.matrix;
  const Cut cut(w);
  return (panels_at_once * Panel::words(w, cut, tiles) + sixteen_room(w)) * 4 + cut.segments * static_cast<int64_t>(sizeof(Step));
}

static void read_grid(const Coded& w, const PanelRows& rows, const Panel& panel) {
  const int64_t count = padded_groups(w) * panel_rows;
  read_by_groups(w, w.scales, 1.0f, rows, panel.scales, panel.room);
  const bool offsets = has_offsets(w), subtracted = whole(w);
  const float middle = middle_code(w.bits), step = step_of(w);
  read_by_groups(w, w.zeros, zero_of(w), rows, panel.shifts, panel.room);
  for (int64_t i = 0; i < count; ++i) {
    const float zero = offsets ? zero_of(w) : panel.shifts[i], base = subtracted ? zero : middle;
    panel.bases[i] = static_cast<uint32_t>(step * base) * 0x01010101u;
    panel.shifts[i] = (base - zero) * step * panel.scales[i] + (offsets ? panel.shifts[i] : 0.0f);
  }
}

template <int Bits, int Field>
static void fill_as(const Coded& w, const Cut& cut, const PanelRows& rows, int64_t column, int64_t columns, const Panel& panel) {
  const bool doubled = w.counts == Coded::as_signs;
  const __m512i over = _mm512_set1_epi8(static_cast<char>(0x80)), mask = _mm512_set1_epi8(static_cast<char>((1 << Field) - 1));
  for (int half = 0; half < 2; ++half) {
    uint32_t* to = panel.weights + 16 * half;
    __m512i base = over, sum = over;
    Segment segment(cut, 0);
    while (segment.begin < column) segment.next(cut);
    for (int64_t at = column; at < column + columns;) {
      __m512i all[16];
      take_lanes<Bits, Field, 1>(w, rows.row + 16 * half, at, all);
      for (int lane = 0; lane < 16; ++lane, at += 32 / Field) {
        if (at == segment.begin) {
          base = _mm512_load_si512(panel.bases + segment.group * panel_rows + 16 * half);
          sum = _mm512_setzero_si512();
        }
#pragma GCC unroll 4
        for (int j = 0; j < 8 / Field; ++j, to += panel_rows) {
          __m512i codes = j == 0 ? all[lane] : _mm512_srli_epi32(all[lane], static_cast<unsigned>(Field * j));
          if constexpr (Field < 8) codes = _mm512_and_si512(codes, mask);
          const __m512i weights = _mm512_sub_epi8(doubled ? _mm512_add_epi8(codes, codes) : codes, base);
          sum = _mm512_dpbusd_epi32(sum, over, weights);
          _mm512_store_si512(to, weights);
        }
        if (at + 32 / Field == segment.end) {
          _mm512_store_si512(panel.begins + segment.index * panel_rows + 16 * half, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
          segment.next(cut);
        }
      }
    }
  }
}

static void fill(const Coded& w, const Cut& cut, const PanelRows& rows, int64_t column, int64_t columns, const Panel& panel) {
  FEWBITS_FOR_FIELDS(fill_as, w, w, cut, rows, column, columns, panel)
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Four products a lane added to a sum, in its place: the compiler's own function copies the sum.
static inline __attribute__((always_inline)) __m512i add_products(__m512i sum, __m512i inputs, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(inputs), "v"(weights));
  return sum;
}

// The segments first to last, whole runs, of a panel times some vectors of a tile, added to its sums `[Vectors, panel_rows]`.
template <int Vectors, bool Shifted>
static void multiply_segments(const Step* step, const Step* last, const Panel& panel, const Inputs& of, bool begin, float* sums) {
  const uint32_t *weights = panel.weights, *inputs = of.words;
  const float *units = of.units, *input_sums = of.sums;
  const int32_t* begins = panel.begins;
  const int64_t ahead = of.ahead;
  __m512 low[Vectors], high[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) low[v] = high[v] = _mm512_setzero_ps();
  for (; step != last; ++step, begins += panel_rows, input_sums += tile) {
    __m512i some[Vectors], others[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) some[v] = _mm512_load_si512(begins), others[v] = _mm512_load_si512(begins + 16);
    for (int32_t words = step->words; words != 0; --words, weights += panel_rows, inputs += tile) {
      const __m512i one = _mm512_load_si512(weights), two = _mm512_load_si512(weights + 16);
      _mm_prefetch(reinterpret_cast<const char*>(inputs + ahead), _MM_HINT_T1);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const __m512i input = _mm512_set1_epi32(static_cast<int>(inputs[v]));
        some[v] = add_products(some[v], input, one);
        others[v] = add_products(others[v], input, two);
      }
    }
    const float* scales = panel.scales + step->grid;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      low[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(some[v]), _mm512_load_ps(scales), low[v]);
      high[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(others[v]), _mm512_load_ps(scales + 16), high[v]);
      if constexpr (Shifted) {
        const float* shifts = panel.shifts + step->grid;
        const __m512 sum = _mm512_set1_ps(input_sums[v]);
        low[v] = _mm512_fmadd_ps(sum, _mm512_load_ps(shifts), low[v]);
        high[v] = _mm512_fmadd_ps(sum, _mm512_load_ps(shifts + 16), high[v]);
      }
    }
    if (!step->ends_run) continue;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const __m512 unit = _mm512_set1_ps(units[v]);
      float* to = sums + v * panel_rows;
      _mm512_store_ps(to, begin ? _mm512_mul_ps(low[v], unit) : _mm512_fmadd_ps(low[v], unit, _mm512_load_ps(to)));
      _mm512_store_ps(to + 16, begin ? _mm512_mul_ps(high[v], unit) : _mm512_fmadd_ps(high[v], unit, _mm512_load_ps(to + 16)));
      low[v] = high[v] = _mm512_setzero_ps();
    }
    begin = false;
    units += tile;
  }
}

static decltype(&multiply_segments<6, false>) find_function(int64_t vectors, bool shifts) {
  if (shifts) return vectors > 4 ? multiply_segments<6, true> : vectors > 2 ? multiply_segments<4, true> : multiply_segments<2, true>;
  return vectors > 4 ? multiply_segments<6, false> : vectors > 2 ? multiply_segments<4, false> : multiply_segments<2, false>;
}

static void multiply(const Product& product, const uint8_t* prepared, int64_t row, int64_t first, int64_t last, uint8_t* memory) {
  const Coded& w = *product.matrix;
  const Cut cut(w);
  const bool shifts = shifted(w);
  const int64_t tiles = ceiling(product.vectors, tile), vectors = least(last * tile, product.vectors) - first * tile;
  const int64_t count = least(panels_at_once, ceiling(w.rows - row, panel_rows));
  const PanelRows rows[] = {PanelRows(w, row), PanelRows(w, row + panel_rows)}, next(w, row + panels_at_once * panel_rows);
  const Panel panels[] = {Panel(w, cut, last - first, 0, memory), Panel(w, cut, last - first, 1, memory)};
  for (int64_t p = 0; p < count; ++p) read_grid(w, rows[p], panels[p]);
  Step* steps = reinterpret_cast<Step*>(panels[0].room + sixteen_room(w));
  find_steps(cut, steps);
  int64_t segment = 0, run = 0;
  for (int64_t column = 0; column < cut.columns; column += cut.block) {
    const int64_t taken = least(cut.block, cut.columns - column);
    const bool more = column + taken < cut.columns;
    for (int64_t p = 0; p < count; ++p) {
      fill(w, cut, rows[p], column, taken, panels[p]);
      fetch_codes(w, more ? rows[p] : next, more ? column + taken : 0, cut.block);
    }
    int64_t behind = segment, words = 0;
    for (; words < taken / 4; ++behind) words += steps[behind].words;
    for (int64_t v = 0; v < vectors; v += some_vectors) {
      const int64_t which = first + v / tile, in_tile = v % tile;
      Inputs inputs(cut, tiles, which, const_cast<uint8_t*>(prepared));
      inputs.words += place_in(column, taken, tiles, which) + in_tile, inputs.units += run * tile + in_tile, inputs.sums += segment * tile + in_tile;
      inputs.ahead = taken / 4 * tile;
      for (int64_t p = 0; p < count; ++p) {
        Panel panel = panels[p];
        panel.begins += segment * panel_rows;
        find_function(vectors - v, shifts)(steps + segment, steps + behind, panel, inputs, column == 0, panel.sums + v * panel_rows);
      }
    }
    for (; segment < behind; ++segment) run += steps[segment].ends_run ? 1 : 0;
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t v = 0; v < vectors; ++v) put_rows(product, first * tile + v, row + p * panel_rows, panels[p].sums + v * panel_rows);
  }
}

static int64_t few_vectors(const Product& product) { return product.matrix->lines ? few_vectors_of_lines(*product.matrix) : 8; }

constexpr Panels make_panels() {
  return {tile, panels_at_once * panel_rows, few_vectors, prepared_bytes, prepare, scratch_bytes, multiply};
}

}  // namespace byte_panels
}  // namespace FEWBITS_ISA
}  // namespace fewbits

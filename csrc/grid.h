// Rows in full: scales, zero points and codes as numbers, and decoding. Included after an instruction set's lanes.h.
#pragma once
#include <algorithm>

#include "matrix.h"
#include "numbers.h"
#include "rounding.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int64_t tile_vectors = 4;  // input vectors that share the unpacking of a code

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t rounded_up(int64_t a, int64_t b) { return ceiling(a, b) * b; }

// Rows from the one at work to the one that is fetched into the second cache meanwhile: about 16 KiB of codes. Fetching into
// the first cache would be slower than memory, as few of its misses can be under way at once.
static inline int64_t rows_ahead(const Coded& w) {
  const int64_t rows = ((1 << 14) / w.row_bytes + 3) / 4 * 4;
  return rows < 4 ? 4 : rows > 32 ? 32 : rows;
}

// ---- rows in full -------------------------------------------------------------------------------------------------------

static int64_t decode_floats(const Coded& w);

static int64_t values_floats(const Values& values) {
  if (values.kind == Values::coded) return decode_floats(*values.inner);
  if (values.lines) return 2 * values.columns + 8;
  return values.kind == Values::packed ? rounded_up(values.columns, 8) / 4 + 2 : 0;
}

// `count` numbers of type `number` from place `at` on.
static void read_numbers(const void* data, int64_t at, Number number, int64_t count, float* out) {
  if (number == Number::f32) {
    std::memcpy(out, static_cast<const float*>(data) + at, static_cast<size_t>(count) * 4);
  } else if (number == Number::f16) {
    halves_to_floats(static_cast<const uint16_t*>(data) + at, count, out);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(data) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
  }
}

// Scratch that decode_row needs.
static int64_t decode_floats(const Coded& w) {
  const int64_t inner = values_floats(w.scales), zero = values_floats(w.zeros);
  return (w.lines ? ceiling(w.row_bytes, 4) : 0) + rounded_up(w.columns, 8) / 4 + 2 * (w.groups + lanes) + (int64_t{1} << w.bits) * (w.level_groups > 0 ? w.level_groups : 1) + (inner > zero ? inner : zero) + 2 * lanes;
}

static void decode_row(const Coded& w, int64_t row, float* out, float* scratch);

// The row of a table that serves row `row` of its matrix.
static inline int64_t place_of(const Values& values, int64_t row) {
  if (values.rows == 1) return 0;
  return values.ends == nullptr ? row : std::upper_bound(values.ends, values.ends + values.rows, row) - values.ends;
}

// A row of what lies in lines, `item` bytes of each row at a time.
static void take_from_lines(const void* data, int64_t row_bytes, int64_t item, int64_t row, uint8_t* to) {
  const uint8_t* from = static_cast<const uint8_t*>(data) + row / line_rows * line_rows * row_bytes + row % line_rows * item;
  const auto take = [=](auto number) {  // of a size that compilers know: no call for each
    constexpr int64_t bytes = sizeof(number);
    for (int64_t at = 0; at < row_bytes; at += bytes) std::memcpy(to + at, from + at * line_rows, sizeof(number));
  };
  if (item == 4) take(uint32_t{});
  else if (item == 2) take(uint16_t{});
  else take(uint8_t{});
}

// Row `row` of scales, zero points, offsets or levels as numbers; `bits` is the width of packed ones.
static void read_values(const Values& values, int bits, int64_t row, float* out, float* scratch) {
  if (values.lines) {
    Values one = values;
    take_from_lines(values.data, row_bytes_of(values, bits), item_of(values), row, reinterpret_cast<uint8_t*>(scratch));
    one.data = scratch, one.rows = 1, one.lines = false;
    return read_values(one, bits, 0, out, scratch + values.columns + 2);
  }
  const int64_t count = values.columns, at = place_of(values, row);
  if (values.kind == Values::coded) return decode_row(*values.inner, at, out, scratch);
  if (values.kind == Values::packed) {
    codes_to_floats(static_cast<const uint8_t*>(values.data) + at * ((count * bits + 7) / 8), bits, count, out, reinterpret_cast<uint8_t*>(scratch));
  } else if (values.kind == Values::table) {
    const uint8_t* codes = static_cast<const uint8_t*>(values.data) + at * count;
    for (int64_t i = 0; i < count; ++i) out[i] = values.lookup[codes[i]];
  } else {
    read_numbers(values.data, at * count, values.number, count, out);
  }
}

// Scales of a row, as a code's step, and zero points times those, less offsets; what is past the last group is zero.
static void read_grid(const Coded& w, int64_t row, float* scales, float* shifts, float* scratch) {
  if (w.scales.kind == Values::none) for (int64_t g = 0; g < w.groups; ++g) scales[g] = 1.0f;
  else read_values(w.scales, w.bits, row, scales, scratch);
  for (int i = 0; i < lanes; ++i) scales[w.groups + i] = shifts[w.groups + i] = 0.0f;
  if (w.levels.kind != Values::none) return;
  const float zero = zero_of(w), step = step_of(w);
  if (w.zeros.kind != Values::none) read_values(w.zeros, w.bits, row, shifts, scratch);
  for (int64_t g = 0; g < w.groups; ++g) {
    scales[g] *= step;
    shifts[g] = has_zero_points(w) ? shifts[g] * scales[g] : has_offsets(w) ? zero * scales[g] - shifts[g] : zero * scales[g];
  }
}

// The codes of a row, in `room` where its words lie apart.
static const uint8_t* codes_of_row(const Coded& w, int64_t row, uint8_t* room) {
  if (!w.lines) return w.codes + row * w.row_bytes;
  take_from_lines(w.codes, w.row_bytes, word_of(w), row, room);
  return room;
}

// Codes that are numbers, less zero points, times scales, of as many groups as whole lanes hold where lanes hold whole groups: such as two-level
// scales have, for which a loop of its own for each group would take most of the time. How many groups that were.
static int64_t scale_in_lanes(const Coded& w, const float* scales, const float* zeros, float* out) {
  if (lanes % w.group != 0) return 0;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.group));  // a power of two, as lanes are
  int32_t picks[lanes];
  for (int i = 0; i < lanes; ++i) picks[i] = i >> shift;
  const int64_t together = lanes >> shift, done = w.columns / lanes * together;
  const Floats zero = spread(-zero_of(w)), step = spread(step_of(w)), minus = spread(-1.0f);
  for (int64_t g = 0; g < done; g += together, out += lanes) {
    const Floats away = has_zero_points(w) ? multiply(permute(zeros + g, picks), minus) : zero;
    const Floats scale = w.scales.kind == Values::none ? step : multiply(permute(scales + g, picks), step);
    store(out, multiply(add(load(out), away), scale));
  }
  return done;
}

// What codes say, one to a byte.
static void look_up_row(const float* levels, int64_t entries, const uint8_t* codes, int64_t count, float* out) {
  int64_t c = 0;
#ifdef __AVX512BW__
  if (entries <= 32) {
    const auto part_of = [&](int64_t from) {
      return _mm512_maskz_loadu_ps(static_cast<__mmask16>(entries >= from + 16 ? 0xffff : entries <= from ? 0 : (1u << (entries - from)) - 1), levels + from);
    };
    const __m512 low = part_of(0), high = part_of(16);
    for (; c + 16 <= count; c += 16) {
      const __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + c)));
      _mm512_storeu_ps(out + c, _mm512_permutex2var_ps(low, places, high));
    }
  }
#endif
  for (; c < count; ++c) out[c] = levels[codes[c]];
}

static void decode_row(const Coded& w, int64_t row, float* out, float* scratch) {
  const uint8_t* stored = codes_of_row(w, row, reinterpret_cast<uint8_t*>(scratch));
  if (w.lines) scratch += ceiling(w.row_bytes, 4);
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch);
  float* scales = scratch + rounded_up(w.columns, 8) / 4;
  float* zeros = scales + w.groups + lanes;
  float* levels = zeros + w.groups + lanes;
  const int64_t book = int64_t{1} << w.bits;
  float* rest = levels + book * (w.level_groups > 0 ? w.level_groups : 1);
  const bool evenly = w.levels.kind == Values::none, three = w.bits == base_three;
  if (evenly && !three) codes_to_floats(stored, w.bits, w.columns, out, codes);
  else unpack(stored, w.bits, w.columns, codes);
  if (three) for (int64_t c = 0; c < w.columns; ++c) out[c] = static_cast<float>(codes[c]);
  if (w.scales.kind != Values::none) read_values(w.scales, w.bits, row, scales, rest);
  if (w.levels.kind != Values::none) read_values(w.levels, w.bits, row, levels, rest);
  else if (w.zeros.kind != Values::none) read_values(w.zeros, w.bits, row, zeros, rest);
  for (int64_t g = evenly ? scale_in_lanes(w, scales, zeros, out) : 0; g < w.groups; ++g) {
    const int64_t from = g * w.group, to = least(from + w.group, w.columns);
    if (w.levels.kind != Values::none) {
      const float* found = levels + (w.level_groups > 1 ? g * book : 0);
      look_up_row(found, book, codes + from, to - from, out + from);
      if (w.scales.kind != Values::none) for (int64_t c = from; c < to; ++c) out[c] *= scales[g];
      continue;
    }
    const float zero = has_zero_points(w) ? zeros[g] : zero_of(w), scale = (w.scales.kind == Values::none ? 1.0f : scales[g]) * step_of(w);
    for (int64_t c = from; c < to; ++c) out[c] = (out[c] - zero) * scale;
  }
  for (int64_t g = 0; g < w.groups && has_offsets(w); ++g) {  // in a loop of their own: products are rounded before offsets are added
    for (int64_t c = g * w.group; c < least((g + 1) * w.group, w.columns); ++c) out[c] += zeros[g];
  }
}

static void decode(const Coded& w, int64_t first, int64_t last, void* out, Number number, float* scratch) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = (row - first) * w.columns;
    if (number == Number::f32) {
      decode_row(w, row, static_cast<float*>(out) + at, scratch);
      continue;
    }
    decode_row(w, row, scratch, scratch + w.columns);
    for_number(number, [&](auto type) { write_numbers(type, scratch, w.columns, out, at); });
  }
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits

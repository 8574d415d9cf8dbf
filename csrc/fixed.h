// Products of unsigned codes with inputs in fixed point: whole numbers cut into digits that byte products can take.
//
// A run of inputs shares a unit, a power of two: input = number * unit, number = the sum of digits times powers of two. There are
// three digits of 8 bits, |number| < 2**23, or fewer where they are asked for. Codes are multiplied with the digits as they are and
// summed in integers, exactly; only the whole is a float, which the scale times the unit multiplies. What is lost is half a unit
// of an input at most: 2**-23 of the largest of its run with three digits, 2**-15 with two, 2**-7 with one.
// An instruction set says how many columns its vectors hold and how a code is taken out of them (its bytes.h).
#pragma once
#include "grid.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace fixed {

struct Plan {
  enum Kind { broadcast, pick, spread_out };
  Kind kind;
  int64_t per_lane, block, blocks;  // columns of a lane, of a vector; vectors of a row
  int64_t block_bytes, read_bytes;  // of codes: taken, and touched by its loads
  int64_t digits_bytes;             // of a block's inputs
  int64_t span;                     // blocks that are summed before the sums are scaled
  int64_t group_blocks;             // blocks of a group, where it covers whole ones
  int64_t tile, tiles;              // vectors of a tile
  int64_t run;                      // columns that share a unit
  int digits;                       // of an input
  int32_t picks[lanes];
};

template <int Bits, int Digits>
static bool plan_for(const Coded& w, int64_t vectors, Plan& plan) {
  using Shape = Block<Bits, Digits>;
  plan.per_lane = Shape::per_lane;
  plan.block = Shape::columns;
  plan.blocks = ceiling(w.columns, plan.block);
  plan.block_bytes = Shape::bytes;
  plan.read_bytes = Shape::read_bytes;
  plan.digits_bytes = Shape::columns * Shape::digits * Shape::digit_bytes;
  plan.tile = vectors == 1 ? 1 : tile_vectors;
  plan.tiles = ceiling(vectors, plan.tile);
  plan.digits = Digits;
  plan.span = 1;
  plan.group_blocks = 1;
  plan.run = plan.block;
  if (w.groups > 1 && w.group % plan.per_lane != 0) return false;
  if (w.groups == 1 || w.group % plan.block == 0) {
    plan.kind = Plan::broadcast;
    plan.group_blocks = w.groups == 1 ? plan.blocks : w.group / plan.block;
    plan.span = least(plan.group_blocks, Shape::longest);
    plan.run = plan.group_blocks * plan.block;
  } else if (Shape::only_whole) {
    return false;
  } else if (plan.block % w.group == 0) {
    plan.kind = Plan::pick;
    for (int i = 0; i < lanes; ++i) plan.picks[i] = static_cast<int32_t>(i * plan.per_lane / w.group);
  } else {
    plan.kind = Plan::spread_out;
    plan.run = plan.blocks * plan.block;
  }
  return true;
}

// Calls a function for the width of the codes and the digits of the inputs, where the instruction set serves the width.
#define FEWBITS_WIDTH(function, width, digits, ...)                                             \
  case width:                                                                                   \
    if constexpr (Block<width, 3>::served) {                                                    \
      if (digits == 1) return function<width, 1>(__VA_ARGS__);                                  \
      if (digits == 2) return function<width, 2>(__VA_ARGS__);                                  \
      return function<width, 3>(__VA_ARGS__);                                                   \
    }                                                                                           \
    break;
#define FEWBITS_FOR_WIDTH(function, bits, digits, ...) \
  switch (bits) {                                      \
    FEWBITS_WIDTH(function, 1, digits, __VA_ARGS__)    \
    FEWBITS_WIDTH(function, 2, digits, __VA_ARGS__)    \
    FEWBITS_WIDTH(function, 3, digits, __VA_ARGS__)    \
    FEWBITS_WIDTH(function, 4, digits, __VA_ARGS__)    \
    FEWBITS_WIDTH(function, 5, digits, __VA_ARGS__)    \
    FEWBITS_WIDTH(function, 6, digits, __VA_ARGS__)    \
    FEWBITS_WIDTH(function, 7, digits, __VA_ARGS__)    \
    FEWBITS_WIDTH(function, 8, digits, __VA_ARGS__)    \
  }

static bool make_plan(const Coded& w, int64_t vectors, int digits, Plan& plan) {
  if (w.levels.kind != Values::none) return false;
  FEWBITS_FOR_WIDTH(plan_for, w.bits, digits, w, vectors, plan)
  return false;
}

// ---- inputs ---------------------------------------------------------------------------------------------------------------

static inline int64_t padded_vectors(const Plan& plan) { return plan.tile * plan.tiles; }
static inline int64_t group_stride(const Coded& w) { return rounded_up(w.groups, 16) + lanes; }

// Digits of all vectors, then for every vector the unit of each group and the sum of its inputs; room to make them behind.
static int64_t prepared_floats(const Coded& w, const Plan& plan) {
  const int64_t columns = plan.blocks * plan.block;
  return padded_vectors(plan) * (plan.blocks * plan.digits_bytes / 4 + 2 * group_stride(w) + 2 * columns);
}

// Numbers of the columns from `from` on as digits, in the order in which codes leave a block; `vector` of a tile of `tile`.
template <int Bits, int Digits>
static void lay_out(const int32_t* numbers, int64_t tile, uint8_t* to) {
  using Shape = Block<Bits, Digits>;
  constexpr int columns = Shape::columns, width = columns / Shape::fields;
  if constexpr (Shape::digit_bytes == 2) {  // two digits of 12 bits, in the columns' order
    int16_t* high = reinterpret_cast<int16_t*>(to);
    int16_t* low = high + tile * columns;
    for (int c = 0; c < columns; ++c) high[c] = static_cast<int16_t>((numbers[c] + 0x800) >> 12);
    for (int c = 0; c < columns; ++c) low[c] = static_cast<int16_t>(((numbers[c] + 0x800) & 0xfff) - 0x800);
    return;
  }
  alignas(64) uint8_t bytes[columns];
  for (int digit = 0; digit < Digits; ++digit) {
    const int shift = 8 * (Digits - 1 - digit);
    constexpr uint32_t middle = 0x808080;  // of every digit: what makes them signed
    for (int c = 0; c < columns; ++c) bytes[c] = static_cast<uint8_t>(((static_cast<uint32_t>(numbers[c]) + middle) ^ middle) >> shift);
    deal<Bits, Digits>(bytes, tile * width, to + digit * Shape::fields * tile * width);
  }
}

// The power of two that `count` inputs are whole multiples of, or are rounded to; NaN where one is not finite.
static float find_unit(const float* inputs, int64_t count, int bits) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = as_bits(inputs[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7f800000) return as_float(0x7fc00000);
  // Balanced digits end at 127 and not 128 of the highest place, so that the very largest mantissas need one bit more.
  int exponent = static_cast<int>((largest + 0x20000) >> 23) - 126;
  if (exponent < -100) exponent = -100;
  return as_float(static_cast<uint32_t>(exponent - bits + 127) << 23);
}

// Inputs that share a unit as whole numbers of it, of so many bits; zeros, and a unit that is no number, where one is not finite.
static float to_whole_numbers(const float* inputs, int64_t count, int bits, int32_t* numbers) {
  const float unit = find_unit(inputs, count, bits);
  const bool finite = unit == unit;
  to_integers(inputs, rounded_up(count, lanes), finite ? 1.0f / unit : 0.0f, numbers);
  if (!finite) std::memset(numbers, 0, static_cast<size_t>(count) * 4);
  return unit;
}

static int64_t sum_of_numbers(const int32_t* numbers, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += numbers[i];
  return sum;
}

template <int Bits, int Digits>
static void prepare_as(const Product& product, const Plan& plan, int64_t vector, float* room) {
  using Shape = Block<Bits, Digits>;
  const Coded& w = *product.matrix;
  const int64_t columns = plan.blocks * plan.block, vectors = padded_vectors(plan), digits = plan.blocks * plan.digits_bytes;
  uint8_t* to = reinterpret_cast<uint8_t*>(room) + vector / plan.tile * plan.tile * digits;
  const int64_t in_tile = vector % plan.tile, field_bytes = plan.block / Shape::fields * Shape::digit_bytes;
  float* units = room + vectors * digits / 4 + vector * 2 * group_stride(w);
  float* sums = units + group_stride(w);
  float* values = room + vectors * (digits / 4 + 2 * group_stride(w)) + vector * 2 * columns;
  int32_t* numbers = reinterpret_cast<int32_t*>(values + columns);
  const int64_t there = vector < product.vectors ? w.columns : 0;
  read_numbers(product.inputs, vector * w.columns, product.number, there, values);
  for (int64_t c = there; c < columns; ++c) values[c] = 0.0f;
  for (int64_t g = w.groups; g < group_stride(w); ++g) units[g] = sums[g] = 0.0f;
  for (int64_t from = 0; from < columns; from += plan.run) {
    const int64_t count = least(plan.run, columns - from);
    const float unit = to_whole_numbers(values + from, count, Shape::digit_bytes == 2 ? 23 : 8 * Digits - 1, numbers + from);
    for (int64_t g = ceiling(from, w.group); g < w.groups && g * w.group < from + count; ++g) {
      const int64_t first = g * w.group, last = least(first + w.group, columns);
      units[g] = unit;
      sums[g] = static_cast<float>(sum_of_numbers(numbers + first, last - first)) * unit;
    }
  }
  for (int64_t block = 0; block < plan.blocks; ++block) {
    lay_out<Bits, Digits>(numbers + block * plan.block, plan.tile, to + block * plan.tile * plan.digits_bytes + in_tile * field_bytes);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------------

struct Strip {
  const uint8_t* codes[4];
  const float* scales;  // [vectors of the tile, rows of the strip, stride], units among them
  const uint8_t* digits;
  const Plan* plan;
  int64_t stride;
  int64_t ahead;  // bytes from a row to the one that is fetched meanwhile
  const float* away;  // [vectors of the tile, 4, lanes]: what zero points take away, in any lanes
  float* sums;        // [rows, sums_stride]
  int64_t sums_stride;
};

template <int Bits, int Digits, int Rows, int Vectors, int Kind>
static void multiply_strip(const Strip& strip) {
  using Shape = Block<Bits, Digits>;
  constexpr int64_t digits = Shape::columns * Shape::digits * Shape::digit_bytes * Vectors;
  const Plan& plan = *strip.plan;
  const int64_t picked = Kind == Plan::pick ? plan.picks[lanes - 1] + 1 : 0;
  Floats totals[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) totals[r][v] = multiply(spread(-1.0f), load(strip.away + (v * 4 + r) * lanes));
  const uint8_t* codes[Rows];
  for (int r = 0; r < Rows; ++r) codes[r] = strip.codes[r];
  const uint8_t* inputs = strip.digits;
  const auto segment = [&](int64_t count, int64_t place) {
    Floats found[Rows][Vectors];
    multiply_blocks<Bits, Digits, Rows, Vectors>(codes, inputs, count, strip.ahead, found);
    for (int r = 0; r < Rows; ++r) {
      codes[r] += count * Shape::bytes;
      for (int v = 0; v < Vectors; ++v) {
        const float* scales = strip.scales + (v * 4 + r) * strip.stride;
        const Floats scale = Kind == Plan::broadcast ? spread(scales[place])
                             : Kind == Plan::pick    ? permute(scales + place * picked, plan.picks)
                                                     : load(scales + place * lanes);
        totals[r][v] = multiply_add(found[r][v], scale, totals[r][v]);
      }
    }
    inputs += count * digits;
  };
  if constexpr (Shape::longest == 1 || Kind != Plan::broadcast) {
    if (Kind != Plan::broadcast || plan.group_blocks == 1) {
      for (int64_t block = 0; block < plan.blocks; ++block) segment(1, block);
    } else {
      int64_t block = 0;
      for (int64_t group = 0; block < plan.blocks; ++group) {
        const int64_t end = least(block + plan.group_blocks, plan.blocks);
        for (; block < end; ++block) segment(1, group);
      }
    }
  } else {
    int64_t block = 0;
    for (int64_t group = 0; block < plan.blocks; ++group) {
      const int64_t end = least(block + plan.group_blocks, plan.blocks);
      while (block < end) {
        const int64_t count = least(plan.span, end - block);
        segment(count, group);
        block += count;
      }
    }
  }
  if constexpr (Vectors == 1 && Rows == 4) {
    sum_four(totals[0][0], totals[1][0], totals[2][0], totals[3][0], strip.sums);  // one vector's sums lie side by side
  } else {
    for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) strip.sums[r * strip.sums_stride + v] = sum(totals[r][v]);
  }
}

template <int Bits, int Digits, int Rows, int Vectors>
static void multiply_kind(const Strip& strip) {
  switch (strip.plan->kind) {
    case Plan::broadcast: return multiply_strip<Bits, Digits, Rows, Vectors, Plan::broadcast>(strip);
    case Plan::pick: return multiply_strip<Bits, Digits, Rows, Vectors, Plan::pick>(strip);
    default: return multiply_strip<Bits, Digits, Rows, Vectors, Plan::spread_out>(strip);
  }
}

// All rows of a strip, as many at once as registers allow. Where there are fewer the last one is taken again, and nobody reads its sums.
template <int Bits, int Digits>
static void multiply_rows(Strip strip, int64_t rows) {
  constexpr int many = Block<Bits, Digits>::rows, few = Block<Bits, Digits>::rows_of_tile;
  const bool one = strip.plan->tile == 1;
  for (const int64_t taken = one ? many : few; rows > 0; rows -= taken) {
    for (int64_t r = rows; r < taken; ++r) strip.codes[r] = strip.codes[rows - 1];
    if (one) multiply_kind<Bits, Digits, many, 1>(strip);
    else multiply_kind<Bits, Digits, few, tile_vectors>(strip);
    for (int64_t r = taken; r < rows; ++r) strip.codes[r - taken] = strip.codes[r];
    strip.scales += taken * strip.stride;
    strip.away += taken * lanes;
    strip.sums += taken * strip.sums_stride;
  }
}

static inline int64_t scales_stride(const Coded& w, const Plan& plan) {
  return plan.kind == Plan::spread_out ? plan.blocks * lanes : group_stride(w);
}

static inline int64_t copied_bytes(const Plan& plan) { return rounded_up((plan.blocks - 1) * plan.block_bytes + plan.read_bytes, 64); }

static int64_t scratch_floats(const Coded& w, const Plan& plan) {
  return 4 * (tile_vectors * scales_stride(w, plan) + 2 * group_stride(w) + padded_vectors(plan) + copied_bytes(plan) / 4) + 32 + decode_floats(w);
}

// Bytes of a row of scales or zero points.
static inline int64_t grid_bytes(const Values& values, int bits) {
  if (values.rows == 1 || values.data == nullptr) return 0;  // one row for all
  return row_bytes_of(values, bits);
}

// Asks for the scales, zero points or offsets of rows that come later. Always inline: compilers take a function that only fetches for one
// without effect.
static inline __attribute__((always_inline)) void fetch_grid(const Values& values, int64_t bytes, int64_t row, int64_t rows) {
  const char* from = static_cast<const char*>(values.data) + row * bytes;
  for (int64_t at = 0; at < rows * bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

// Whether a grid is read and scaled in one go, as the most common ones are.
static bool scales_at_once(const Coded& w, const Plan& plan) {
  const auto short_numbers = [](const Values& values) { return values.kind == Values::dense && values.number != Number::f32; };
  const bool zeros_too = w.zeros.kind == Values::none || w.zeros.kind == Values::packed || short_numbers(w.zeros);
  return w.counts != Coded::as_signs && plan.tile == 1 && plan.kind != Plan::spread_out && short_numbers(w.scales) && zeros_too;
}

// Scales of some rows times the units of one vector, into `to`, `stride` apart, and what zero points, less offsets, take away, lanes apart.
template <bool Half, Values::Kind Zeros>
static void scale_rows_as(const Coded& w, const Unpacker& unpacker, int64_t row, int64_t rows, const float* units, int64_t stride, float* to, float* away) {
  const float* sums = units + group_stride(w);
  const int64_t scale_bytes = grid_bytes(w.scales, w.bits), zero_bytes = grid_bytes(w.zeros, w.bits);
  const uint8_t* scales = static_cast<const uint8_t*>(w.scales.data) + row * scale_bytes;
  const uint8_t* zero_points = Zeros == Values::none ? nullptr : static_cast<const uint8_t*>(w.zeros.data) + row * zero_bytes;
  const bool half_zeros = w.zeros.number == Number::f16;
  const Floats fixed_zero = spread(zero_of(w));
  const bool offsets = has_offsets(w);
  for (int64_t r = 0; r < rows; ++r, scales += scale_bytes, zero_points += zero_bytes, to += stride, away += lanes) {
    Floats total = zeros();
    const auto step = [&](int64_t g, int64_t count) {
      const Floats scale = reinterpret_cast<Floats>(few_numbers(reinterpret_cast<const uint16_t*>(scales) + g, count, Half));
      Floats zero = fixed_zero;
      if constexpr (Zeros == Values::packed) zero = reinterpret_cast<Floats>(unpacker.take(zero_points, g, count));
      if constexpr (Zeros == Values::dense) zero = reinterpret_cast<Floats>(few_numbers(reinterpret_cast<const uint16_t*>(zero_points) + g, count, half_zeros));
      store(to + g, multiply(scale, load(units + g)));
      total = multiply_add(multiply(offsets ? spread(-1.0f) : scale, zero), load(sums + g), total);
    };
    int64_t g = 0;
    for (; g + lanes <= w.groups; g += lanes) step(g, lanes);
    if (g < w.groups) step(g, w.groups - g), g += lanes;
    store(to + g, zeros());
    store(away, total);
  }
}

static void scale_rows(const Coded& w, const Unpacker& unpacker, int64_t row, int64_t rows, const float* units, int64_t stride, float* to, float* away) {
  const bool half = w.scales.number == Number::f16;
  const auto kind = w.zeros.kind;
  const auto function = kind == Values::none     ? (half ? scale_rows_as<true, Values::none> : scale_rows_as<false, Values::none>)
                        : kind == Values::packed ? (half ? scale_rows_as<true, Values::packed> : scale_rows_as<false, Values::packed>)
                                                 : (half ? scale_rows_as<true, Values::dense> : scale_rows_as<false, Values::dense>);
  function(w, unpacker, row, rows, units, stride, to, away);
}

// Scales of a row times the units of one vector, and what its zero points take away.
static Floats scale_by_units(const Coded& w, const Plan& plan, const float* scales, const float* shifts, const float* units, float* to) {
  const float* sums = units + group_stride(w);
  Floats away = zeros();
  if (plan.kind == Plan::spread_out) {
    for (int64_t lane = 0; lane < plan.blocks * lanes; ++lane) {
      const int64_t column = lane * plan.per_lane;
      to[lane] = column < w.columns ? scales[column / w.group] * units[column / w.group] : 0.0f;
    }
  }
  for (int64_t g = 0; g < w.groups; g += lanes) {
    if (plan.kind != Plan::spread_out) store(to + g, multiply(load(scales + g), load(units + g)));
    away = multiply_add(load(shifts + g), load(sums + g), away);
  }
  if (plan.kind == Plan::pick) store(to + rounded_up(w.groups, lanes), zeros());
  return away;
}

template <int Bits, int Digits>
static void multiply_as(const Product& product, const Plan& plan, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const int64_t stride = scales_stride(w, plan), grid = group_stride(w), digits = plan.blocks * plan.digits_bytes, vectors = padded_vectors(plan);
  const int64_t touched = (plan.blocks - 1) * plan.block_bytes + plan.read_bytes;
  float* scaled = scratch;
  float* scales = scaled + 4 * tile_vectors * stride;
  float* shifts = scales + 4 * grid;
  float* sums = shifts + 4 * grid;
  float* copies = sums + rounded_up(4 * vectors, 16);
  float* rest = copies + copied_bytes(plan);
  const float* units = prepared + vectors * digits / 4;
  alignas(64) float away[tile_vectors * 4 * lanes];
  const bool at_once = scales_at_once(w, plan);
  const Unpacker unpacker(w.bits);
  const int64_t scale_bytes = grid_bytes(w.scales, w.bits), zero_bytes = grid_bytes(w.zeros, w.bits);
  const int64_t ahead_rows = rows_ahead(w);
  for (int64_t row = first; row < last; row += 4) {
    const int64_t rows = least(4, last - row);
    Strip strip{};
    fetch_grid(w.scales, scale_bytes, row + ahead_rows, rows);
    fetch_grid(w.zeros, zero_bytes, row + ahead_rows, rows);
    for (int64_t r = 0; r < rows; ++r) {
      if (!at_once) read_grid(w, row + r, scales + r * grid, shifts + r * grid, rest);
      strip.codes[r] = w.codes + (row + r) * w.row_bytes;
      if ((row + r) * w.row_bytes + touched > w.code_bytes) {
        uint8_t* to = reinterpret_cast<uint8_t*>(copies) + r * copied_bytes(plan);
        std::memset(to, 0, static_cast<size_t>(touched));
        std::memcpy(to, strip.codes[r], static_cast<size_t>(w.row_bytes));
        strip.codes[r] = to;
      }
    }
    strip.plan = &plan;
    strip.stride = stride;
    strip.ahead = ahead_rows * w.row_bytes;
    strip.sums_stride = plan.tile;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      for (int64_t v = 0; v < plan.tile && !at_once; ++v) {
        const float* of_vector = units + (tile * plan.tile + v) * 2 * grid;
        for (int64_t r = 0; r < rows; ++r) {
          store(away + (v * 4 + r) * lanes, scale_by_units(w, plan, scales + r * grid, shifts + r * grid, of_vector, scaled + (v * 4 + r) * stride));
        }
      }
      if (at_once) scale_rows(w, unpacker, row, rows, units, stride, scaled, away);
      strip.scales = scaled;
      strip.digits = reinterpret_cast<const uint8_t*>(prepared) + tile * plan.tile * digits;
      strip.sums = sums;
      strip.away = away;
      multiply_rows<Bits, Digits>(strip, rows);
      for (int64_t v = 0; v < plan.tile && tile * plan.tile + v < product.vectors; ++v) {
        for (int64_t r = 0; r < rows; ++r) {
          put_number(product.outputs, (tile * plan.tile + v) * w.rows + row + r, product.number, sums[r * plan.tile + v]);
        }
      }
    }
  }
}

static void prepare(const Product& product, const Plan& plan, int64_t vector, float* room) {
  FEWBITS_FOR_WIDTH(prepare_as, product.matrix->bits, plan.digits, product, plan, vector, room)
}

static void multiply(const Product& product, const Plan& plan, const float* prepared, int64_t first, int64_t last, float* scratch) {
  FEWBITS_FOR_WIDTH(multiply_as, product.matrix->bits, plan.digits, product, plan, prepared, first, last, scratch)
}

#undef FEWBITS_FOR_WIDTH
#undef FEWBITS_WIDTH

}  // namespace fixed
}  // namespace FEWBITS_ISA
}  // namespace fewbits

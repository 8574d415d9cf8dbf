// Products of codes of three values, five to a byte, with inputs in fixed point.
//
// A lane is four bytes of a row, twenty columns, and belongs to one group: where a group begins inside a byte, the byte is in the
// last lane of one group and in the first lane of the next, and the inputs of the columns that are the other group's are zero. So groups may
// be of any size. Which bytes a vector takes from a row, and in which order, is written down once for a product.
//
// Codes are 0, 1 and 2 for -1, 0 and 1. The inputs of a lane are taken away from its sum as whole numbers, where that sum begins.
// An instruction set says how codes come out of bytes and are multiplied (its trits.h).
#pragma once
#include "fixed.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace ternary {

constexpr int64_t least_group = 16;          // columns; lanes of smaller groups would be all but empty
constexpr int64_t lane_bytes = 4, trits = 5;  // bytes of a lane, codes of a byte
constexpr int64_t windows = lanes / window_lanes;

static bool serves(const Coded& w) { return w.bits == base_three && (w.groups == 1 || w.group >= least_group); }

struct Plan {
  int64_t group_lanes, blocks;  // lanes of a group, vectors of a row
  int64_t tile, tiles;          // input vectors that share the unpacking, and how many such tiles there are
  int64_t room;                 // columns that an input is kept in while it is cut into digits
  int digits;
};

static Plan make_plan(const Coded& w, int64_t vectors, int digits) {
  Plan plan{};
  const int64_t bytes = w.groups == 1 ? w.row_bytes : w.group % trits == 0 ? w.group / trits : (w.group + trits + 3) / trits;
  plan.group_lanes = ceiling(bytes, lane_bytes);
  plan.blocks = ceiling(w.groups * plan.group_lanes, lanes);
  plan.tile = vectors == 1 ? 1 : tile_vectors;
  plan.tiles = ceiling(vectors, plan.tile);
  plan.room = rounded_up(w.columns + lanes, 16);
  plan.digits = digits;
  return plan;
}

// Where the bytes of a group begin and end in a row.
static inline int64_t first_byte(const Coded& w, int64_t group) { return group * w.group / trits; }
static inline int64_t end_byte(const Coded& w, int64_t group) { return ceiling(least((group + 1) * w.group, w.columns), trits); }

// ---- inputs ---------------------------------------------------------------------------------------------------------------

// What every row is read by, for each block: the order of its bytes, each lane's scale counted from the block's first, and where its
// windows and its scales begin.
struct Table {
  uint8_t* order;  // [blocks, 4 lanes], places in a window
  int32_t* picks;  // [blocks, lanes]
  int32_t* heads;  // [blocks, 4]: the first scale, and then the byte of a row at which each window begins
};

static inline int64_t digits_bytes(const Plan& plan) { return trits * lane_bytes * lanes * plan.digits; }  // of a block and a vector

// The table, then for each tile digits, what sums begin with and units; then room for each vector to make them.
static int64_t prepared_floats(const Coded& w, const Plan& plan) {
  const int64_t each = plan.blocks * (digits_bytes(plan) / 4 + 2 * lanes);
  return plan.blocks * (2 * lanes + 4) + 16 + plan.tile * plan.tiles * (each + 2 * plan.room + w.groups);
}

static Table find_table(const Plan& plan, float* room) {
  uint8_t* order = reinterpret_cast<uint8_t*>(room);
  int32_t* picks = reinterpret_cast<int32_t*>(room + plan.blocks * lanes);
  return {order, picks, picks + plan.blocks * lanes};
}

// A tile's digits [block, digit, trit, vector, 4 lanes], what sums begin with and units, both [block, vector, lanes].
struct Inputs {
  uint8_t* digits;
  int32_t* starts;
  float* units;
};

static Inputs find_inputs(const Plan& plan, float* room, int64_t tile) {
  const int64_t digits = plan.blocks * plan.tile * digits_bytes(plan) / 4, each = plan.blocks * plan.tile * lanes;
  float* from = room + rounded_up(plan.blocks * (2 * lanes + 4), 16) + tile * (digits + 2 * each);
  return {reinterpret_cast<uint8_t*>(from), reinterpret_cast<int32_t*>(from + digits), from + digits + each};
}

static void write_table(const Coded& w, const Plan& plan, const Table& table) {
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t first = block * lanes / plan.group_lanes;
    int32_t* head = table.heads + block * 4;
    head[0] = static_cast<int32_t>(first);
    for (int64_t window = 0; window < windows; ++window) {
      int64_t base = -1;
      for (int64_t lane = window * window_lanes; lane < (window + 1) * window_lanes; ++lane) {
        const int64_t place = block * lanes + lane, group = least(place / plan.group_lanes, w.groups - 1);
        table.picks[place] = static_cast<int32_t>(group - first);
        const int64_t begin = first_byte(w, group) + (place - group * plan.group_lanes) * lane_bytes, end = end_byte(w, group);
        if (base < 0 && begin < end) base = begin;
        for (int64_t i = 0; i < lane_bytes; ++i) table.order[place * lane_bytes + i] = static_cast<uint8_t>(begin + i < end ? begin + i - base : 0);
      }
      head[1 + window] = static_cast<int32_t>(base < 0 ? 0 : base);
    }
  }
}

// The inputs of each group as whole numbers, and their units.
static void round_inputs(const Product& product, const Plan& plan, int64_t vector, float* values, int32_t* numbers, float* units) {
  const Coded& w = *product.matrix;
  const int64_t there = vector < product.vectors ? w.columns : 0;
  read_numbers(product.inputs, vector * w.columns, product.number, there, values);
  for (int64_t c = there; c < plan.room; ++c) values[c] = 0.0f;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t from = group * w.group, count = least(w.group, w.columns - from);
    units[group] = fixed::to_whole_numbers(values + from, count, 8 * plan.digits - 1, numbers + from);
  }
}

static void prepare(const Product& product, const Plan& plan, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  if (vector == 0) write_table(w, plan, find_table(plan, room));
  const Inputs inputs = find_inputs(plan, room, vector / plan.tile);
  float* values = reinterpret_cast<float*>(find_inputs(plan, room, plan.tiles).digits) + vector * (2 * plan.room + w.groups);
  int32_t* numbers = reinterpret_cast<int32_t*>(values + plan.room);
  float* units = values + 2 * plan.room;
  round_inputs(product, plan, vector, values, numbers, units);
  const int64_t in_tile = vector % plan.tile, width = lane_bytes * lanes, field = plan.tile * width;
  for (int64_t place = 0; place < plan.blocks * lanes; ++place) {
    const int64_t block = place / lanes, lane = place % lanes, group = place / plan.group_lanes;
    uint8_t* to = inputs.digits + block * plan.tile * digits_bytes(plan) + in_tile * width + lane * lane_bytes;
    int32_t sum = 0;
    const bool used = group < w.groups;
    const int64_t byte = used ? first_byte(w, group) + (place - group * plan.group_lanes) * lane_bytes : 0;
    const int64_t from = used ? group * w.group : 0, end = used ? least(from + w.group, w.columns) : 0;
    for (int64_t i = 0; i < lane_bytes; ++i) {
      for (int64_t trit = 0; trit < trits; ++trit) {
        const int64_t column = (byte + i) * trits + trit;
        const int32_t number = column >= from && column < end ? numbers[column] : 0;
        const uint32_t digits = (static_cast<uint32_t>(number) + 0x808080) ^ 0x808080;  // each of them signed
        sum += number;
        for (int digit = 0; digit < plan.digits; ++digit) {
          to[(digit * trits + trit) * field + i] = static_cast<uint8_t>(digits >> (8 * (plan.digits - 1 - digit)));
        }
      }
    }
    inputs.starts[(block * plan.tile + in_tile) * lanes + lane] = -sum;
    inputs.units[(block * plan.tile + in_tile) * lanes + lane] = used ? units[group] : 0.0f;
  }
}

// ---- products -------------------------------------------------------------------------------------------------------------

struct Strip {
  const uint8_t* codes[4];
  const float* scales[4];
  float* sums[4];  // of each row, one a vector
  int64_t ahead;   // bytes from a row to the one that is fetched meanwhile
};

template <int Digits, int Rows, int Vectors>
static void multiply_strip(const Strip& strip, const Table& table, const Inputs& inputs, int64_t blocks) {
  constexpr int64_t width = lane_bytes * lanes;
  Floats totals[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) totals[r][v] = zeros();
  for (int64_t block = 0; block < blocks; ++block) {
    const int32_t* head = table.heads + block * 4;
    Floats found[Rows][Vectors];
    if (Vectors == 1) for (int r = 0; r < Rows; ++r) __builtin_prefetch(strip.codes[r] + head[1] + strip.ahead, 0, 2);
    multiply_trits<Digits, Rows, Vectors>(strip.codes, head + 1, table.order + block * width, inputs.digits + block * (Digits * trits * Vectors * width),
                                          inputs.starts + block * Vectors * lanes, found);
    for (int r = 0; r < Rows; ++r) {
      const Floats scale = permute(strip.scales[r] + head[0], table.picks + block * lanes);
      for (int v = 0; v < Vectors; ++v) {
        totals[r][v] = multiply_add(multiply(found[r][v], load(inputs.units + (block * Vectors + v) * lanes)), scale, totals[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) strip.sums[r][v] = sum(totals[r][v]);
}

// As many rows at once as registers allow. Where there are fewer the last one is taken again.
template <int Digits>
static void multiply_rows(Strip strip, const Plan& plan, const Table& table, const Inputs& inputs, int64_t rows) {
  const bool one = plan.tile == 1;
  for (const int64_t taken = one ? rows_at_once : rows_of_tile; rows > 0; rows -= taken) {
    for (int64_t r = rows; r < taken; ++r) strip.codes[r] = strip.codes[rows - 1], strip.scales[r] = strip.scales[rows - 1], strip.sums[r] = strip.sums[rows - 1];
    if (one) multiply_strip<Digits, rows_at_once, 1>(strip, table, inputs, plan.blocks);
    else multiply_strip<Digits, rows_of_tile, tile_vectors>(strip, table, inputs, plan.blocks);
    for (int64_t r = taken; r < rows; ++r) {
      strip.codes[r - taken] = strip.codes[r];
      strip.scales[r - taken] = strip.scales[r];
      strip.sums[r - taken] = strip.sums[r];
    }
  }
}

static inline int64_t copied_bytes(const Coded& w) { return rounded_up(w.row_bytes + 64, 64); }

static int64_t scratch_floats(const Coded& w) { return 4 * (copied_bytes(w) / 4 + w.groups + lanes + tile_vectors) + decode_floats(w); }

template <int Digits>
static void multiply_as(const Product& product, const Plan& plan, float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const Table table = find_table(plan, prepared);
  uint8_t* copies = reinterpret_cast<uint8_t*>(scratch);
  float* scales = scratch + 4 * copied_bytes(w) / 4;
  float* sums = scales + 4 * (w.groups + lanes);
  float* rest = sums + 4 * tile_vectors;
  for (int64_t row = first; row < last; row += 4) {
    const int64_t rows = least(4, last - row);
    Strip strip{};
    strip.ahead = rows_ahead(w) * w.row_bytes;
    for (int64_t r = 0; r < rows; ++r) {
      float* scale = scales + r * (w.groups + lanes);
      if (w.scales.kind == Values::none) for (int64_t g = 0; g < w.groups; ++g) scale[g] = 1.0f;
      else read_values(w.scales, w.bits, row + r, scale, rest);
      for (int i = 0; i < lanes; ++i) scale[w.groups + i] = 0.0f;
      strip.scales[r] = scale;
      strip.sums[r] = sums + r * tile_vectors;
      strip.codes[r] = w.codes + (row + r) * w.row_bytes;
      if ((row + r + 1) * w.row_bytes + 64 > w.code_bytes) {  // a window may pass the end of the codes
        uint8_t* to = copies + r * copied_bytes(w);
        std::memset(to + w.row_bytes, 0, static_cast<size_t>(copied_bytes(w) - w.row_bytes));
        std::memcpy(to, strip.codes[r], static_cast<size_t>(w.row_bytes));
        strip.codes[r] = to;
      }
    }
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      multiply_rows<Digits>(strip, plan, table, find_inputs(plan, prepared, tile), rows);
      for (int64_t v = 0; v < plan.tile && tile * plan.tile + v < product.vectors; ++v) {
        for (int64_t r = 0; r < rows; ++r) put_number(product.outputs, (tile * plan.tile + v) * w.rows + row + r, product.number, strip.sums[r][v]);
      }
    }
  }
}

static void multiply(const Product& product, const Plan& plan, const float* prepared, int64_t first, int64_t last, float* scratch) {
  float* room = const_cast<float*>(prepared);  // is only read
  if (plan.digits == 1) return multiply_as<1>(product, plan, room, first, last, scratch);
  if (plan.digits == 2) return multiply_as<2>(product, plan, room, first, last, scratch);
  multiply_as<3>(product, plan, room, first, last, scratch);
}

}  // namespace ternary
}  // namespace FEWBITS_ISA
}  // namespace fewbits

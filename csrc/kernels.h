// Products in floats over an instruction set's lanes. Included once by each instruction set, whose lanes.h comes before.
//
// A lane of 32 bits holds the codes of 8 neighbouring columns (4 above 4 bits), so that a block of lanes is a run of columns
// read as it is stored. The inputs are laid out once in the order in which codes leave the lanes, divided by the power of two
// that the place in the word multiplies a code with: a code then costs one mask, one conversion and one multiply-add.
#pragma once
#include <utility>

#include "grid.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int64_t panel_floats = 1 << 12;  // inputs of a tile that stay in the first cache

// How the scales of a matrix meet the lanes.
struct Plan {
  enum Kind { broadcast, pick, spread_out, decode_rows };
  Kind kind;
  int64_t per_lane;  // columns of a lane
  int64_t block;     // columns of all lanes
  int64_t blocks;
  int64_t block_bytes, read_bytes;  // of one block: taken, and touched by its loads
  int64_t span;                     // blocks until the sums are scaled
  int64_t tile, tiles;              // vectors of a tile
  int64_t panel;                    // blocks of a panel
  int32_t picks[lanes];
};

static Plan make_plan(const Coded& w, int64_t vectors) {
  Plan plan{};
  plan.per_lane = w.bits <= 4 ? 8 : 4;
  plan.block = plan.per_lane * lanes;
  plan.blocks = ceiling(w.columns, plan.block);
  plan.block_bytes = plan.block / 8 * w.bits;
  plan.read_bytes = (lanes / 4 - 1) * (plan.per_lane / 2 * w.bits) + 16;
  plan.tile = vectors == 1 ? 1 : tile_vectors;
  plan.tiles = ceiling(vectors, plan.tile);
  plan.panel = plan.tile == 1 ? plan.blocks : panel_floats / (plan.block * plan.tile);
  if (plan.panel < 1) plan.panel = 1;
  plan.span = 1;
  const bool in_registers = w.levels.kind == Values::none || (w.level_groups == 1);
  if (!in_registers || w.bits == base_three || (w.groups > 1 && w.group % plan.per_lane != 0)) {
    plan.kind = Plan::decode_rows;
  } else if (w.groups == 1 || w.group % plan.block == 0) {
    plan.kind = Plan::broadcast;
    plan.span = w.groups == 1 ? plan.blocks : w.group / plan.block;
  } else if (plan.block % w.group == 0) {
    plan.kind = Plan::pick;
    for (int i = 0; i < lanes; ++i) plan.picks[i] = static_cast<int32_t>(i * plan.per_lane / w.group);
  } else {
    plan.kind = Plan::spread_out;
  }
  return plan;
}

// ---- inputs in the kernel's order ---------------------------------------------------------------------------------------

static int64_t padded_vectors(int64_t vectors) { return vectors == 1 ? 1 : rounded_up(vectors, tile_vectors); }

static inline int64_t sums_stride(const Coded& w) { return w.groups + lanes; }

static int64_t prepared_floats(const Product& product) {
  const Plan plan = make_plan(*product.matrix, product.vectors);
  return padded_vectors(product.vectors) * (2 * plan.blocks * plan.block + sums_stride(*product.matrix));
}

static float sum_of(const float* values, int64_t count) {
  double parts[8] = {};
  for (; count >= 8; count -= 8, values += 8) for (int i = 0; i < 8; ++i) parts[i] += values[i];
  for (int64_t i = 0; i < count; ++i) parts[i] += values[i];
  return static_cast<float>(((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7])));
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  const Plan plan = make_plan(w, product.vectors);
  const int64_t padded = plan.blocks * plan.block, vectors = padded_vectors(product.vectors), there = vector < product.vectors ? w.columns : 0;
  float* values = plan.kind == Plan::decode_rows ? room + vector * padded : room + vectors * (padded + sums_stride(w)) + vector * padded;
  read_numbers(product.inputs, vector * w.columns, product.number, there, values);
  for (int64_t c = there; c < padded; ++c) values[c] = 0.0f;
  if (plan.kind == Plan::decode_rows) return;
  float* sums = room + vectors * padded + vector * sums_stride(w);
  for (int64_t g = 0; g < w.groups; ++g) sums[g] = sum_of(values + g * w.group, least(w.group, w.columns - g * w.group));
  for (int64_t g = w.groups; g < sums_stride(w); ++g) sums[g] = 0.0f;
  float* to = room + vector / plan.tile * (padded * plan.tile) + vector % plan.tile * lanes;
  for (int64_t block = 0; block < plan.blocks; ++block, values += plan.block) {
    for (int64_t place = 0; place < plan.per_lane; ++place, to += plan.tile * lanes) {
      const bool folded = w.levels.kind == Values::none && place < plan.per_lane - 1;
      const float fold = folded ? as_float(static_cast<uint32_t>(127 - w.bits * place) << 23) : 1.0f;
      for (int lane = 0; lane < lanes; ++lane) to[lane] = values[lane * plan.per_lane + place] * fold;
    }
  }
}

// ---- products -----------------------------------------------------------------------------------------------------------

// A few rows against a tile of vectors, over a run of blocks.
struct Strip {
  const uint8_t* codes[4];
  const float* scales[4];
  const float* levels[4];
  const float* inputs;
  const Plan* plan;
  int64_t first, last;  // blocks
  int64_t ahead;        // bytes from a row to the one that is fetched meanwhile
  float* sums;          // [rows, stride], added to
  int64_t stride;
};

template <int Bits, bool Levels, int Rows, int Vectors, int Index>
static inline void multiply_column(const Words* word, const Book<Bits>* book, const float* inputs, Floats (*sums)[Rows][Vectors]) {
  constexpr int set = Rows * Vectors < 8 ? Index % 2 : 0;  // two sums a row where one would wait for itself
  Floats weight[Rows];
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Levels) weight[r] = look_up<Bits, Index>(word[r], book[r]);
    else weight[r] = field<Bits, Index>(word[r]);
  }
  for (int v = 0; v < Vectors; ++v) {
    const Floats input = load(inputs + (Index * Vectors + v) * lanes);
    for (int r = 0; r < Rows; ++r) sums[set][r][v] = multiply_add(weight[r], input, sums[set][r][v]);
  }
}

template <int Bits, bool Levels, int Rows, int Vectors, int... Index>
static inline void multiply_block(const Words* word, const Book<Bits>* book, const float* inputs, Floats (*sums)[Rows][Vectors],
                                  std::integer_sequence<int, Index...>) {
  (multiply_column<Bits, Levels, Rows, Vectors, Index>(word, book, inputs, sums), ...);
}

template <int Bits, bool Levels, int Rows, int Vectors>
static void multiply_strip(const Strip& strip) {
  constexpr int per_lane = Bits <= 4 ? 8 : 4, sets = Rows * Vectors < 8 ? 2 : 1;
  constexpr int64_t bytes = per_lane * lanes / 8 * Bits;
  const Plan& plan = *strip.plan;
  const int64_t picked = plan.kind == Plan::pick ? plan.picks[lanes - 1] + 1 : 0;
  Book<Bits> book[Rows];
  if constexpr (Levels) for (int r = 0; r < Rows; ++r) book[r] = load_book<Bits>(strip.levels[r]);
  Floats totals[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) totals[r][v] = zeros();
  int64_t segment = strip.first / plan.span;
  for (int64_t block = strip.first; block < strip.last; ++segment) {
    const int64_t end = least((segment + 1) * plan.span, strip.last);
    Floats sums[sets][Rows][Vectors];
    for (int s = 0; s < sets; ++s) for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) sums[s][r][v] = zeros();
    for (; block < end; ++block) {
      Words word[Rows];
      for (int r = 0; r < Rows; ++r) {
        word[r] = words<Bits>(strip.codes[r] + block * bytes);
        if (Vectors == 1) __builtin_prefetch(strip.codes[r] + block * bytes + strip.ahead, 0, 2);
      }
      multiply_block<Bits, Levels, Rows, Vectors>(word, book, strip.inputs + block * (per_lane * Vectors * lanes), sums,
                                                  std::make_integer_sequence<int, per_lane>{});
    }
    for (int r = 0; r < Rows; ++r) {
      const float* scales = strip.scales[r];
      const Floats scale = plan.kind == Plan::broadcast ? spread(scales[segment])
                           : plan.kind == Plan::pick    ? permute(scales + segment * picked, plan.picks)
                                                        : load(scales + segment * lanes);
      for (int v = 0; v < Vectors; ++v) {
        const Floats found = sets == 2 ? add(sums[0][r][v], sums[sets - 1][r][v]) : sums[0][r][v];
        totals[r][v] = multiply_add(found, scale, totals[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) for (int v = 0; v < Vectors; ++v) strip.sums[r * strip.stride + v] += sum(totals[r][v]);
}

// Where there are fewer rows than are taken at once the last one is taken again, and nobody reads its sums.
template <int Bits, bool Levels>
static int64_t multiply_some(Strip& strip, int64_t rows, int64_t vectors) {
  const int64_t taken = vectors == 1 ? 4 : 2;
  for (int64_t r = rows; r < taken; ++r) strip.codes[r] = strip.codes[rows - 1], strip.scales[r] = strip.scales[rows - 1], strip.levels[r] = strip.levels[rows - 1];
  if (vectors == 1) multiply_strip<Bits, Levels, 4, 1>(strip);
  else multiply_strip<Bits, Levels, 2, tile_vectors>(strip);
  return taken;
}

using Some = int64_t (*)(Strip&, int64_t rows, int64_t vectors);

template <bool Levels, int... Before>
static Some find_width(int bits, std::integer_sequence<int, Before...>) {
  constexpr Some found[] = {multiply_some<Before + 1, Levels>...};
  return found[bits - 1];
}

// The function for a width: returns how many of the rows it took.
static Some find_some(const Coded& w) {
  constexpr auto widths = std::make_integer_sequence<int, 8>{};
  return w.levels.kind == Values::none ? find_width<false>(w.bits, widths) : find_width<true>(w.bits, widths);
}

// Numbers that a row's levels take.
static inline int64_t book_stride(const Coded& w) { return w.levels.kind == Values::none ? 0 : rounded_up(int64_t{1} << w.bits, 16); }

static float dot(const float* a, const float* b, int64_t count) {
  Floats total = zeros();
  for (int64_t i = 0; i < count; i += lanes) total = multiply_add(load(a + i), load(b + i), total);
  return sum(total);
}

// Rows that a grid is read for at once: those of a strip where they are used once, else those of a chunk.
static inline int64_t grid_rows(const Plan& plan) { return plan.tile == 1 ? 4 : chunk_rows; }

static inline int64_t scales_stride(const Coded& w, const Plan& plan) {
  return plan.kind == Plan::spread_out ? plan.blocks * lanes : w.groups + lanes;
}

static int64_t scratch_floats(const Coded& w, int64_t vectors) {
  const Plan plan = make_plan(w, vectors);
  const int64_t whole = w.columns + rounded_up(w.columns, lanes) + decode_floats(w);
  const int64_t each = scales_stride(w, plan) + w.groups + lanes + book_stride(w) + padded_vectors(vectors) + (plan.blocks * plan.block_bytes + plan.read_bytes) / 4 + 4;
  return whole + grid_rows(plan) * each + w.groups + lanes;
}

// The rows first to last of a product whose inputs lie in the kernel's order.
struct Chunk {
  const Product& product;
  const Plan& plan;
  const float* prepared;
  float* scales;   // [rows, scales_stride]
  float* shifts;   // [rows, groups + lanes]
  float* levels;   // [rows, book_stride]
  float* sums;     // [rows, padded vectors]
  float* copies;   // rows whose loads would pass the end of the codes
  float* scratch;  // for reading grids
};

static void read_chunk(const Chunk& chunk, int64_t first, int64_t last, const uint8_t** codes) {
  const Coded& w = *chunk.product.matrix;
  const Plan& plan = chunk.plan;
  const int64_t stride = scales_stride(w, plan), touched = (plan.blocks - 1) * plan.block_bytes + plan.read_bytes, copy = rounded_up(touched, 4);
  for (int64_t row = first; row < last; ++row) {
    const int64_t i = row - first;
    float* shifts = chunk.shifts + i * (w.groups + lanes);
    if (plan.kind == Plan::spread_out) {
      float* grid = chunk.scratch;
      read_grid(w, row, grid, shifts, chunk.scratch + w.groups + lanes);
      for (int64_t lane = 0; lane < plan.blocks * lanes; ++lane) {
        const int64_t column = lane * plan.per_lane;
        chunk.scales[i * stride + lane] = column < w.columns ? grid[column / w.group] : 0.0f;
      }
    } else {
      read_grid(w, row, chunk.scales + i * stride, shifts, chunk.scratch);
    }
    if (w.levels.kind != Values::none) read_values(w.levels, w.bits, row, chunk.levels + i * book_stride(w), chunk.scratch);
    codes[i] = w.codes + row * w.row_bytes;
    if (row * w.row_bytes + touched > w.code_bytes) {
      uint8_t* to = reinterpret_cast<uint8_t*>(chunk.copies) + i * copy;
      std::memset(to, 0, static_cast<size_t>(copy));
      std::memcpy(to, codes[i], static_cast<size_t>(w.row_bytes));
      codes[i] = to;
    }
  }
}

static void multiply_chunk(const Chunk& chunk, int64_t first, int64_t last) {
  const Product& product = chunk.product;
  const Coded& w = *product.matrix;
  const Plan& plan = chunk.plan;
  const Some some = find_some(w);
  const int64_t rows = last - first, padded = padded_vectors(product.vectors), stride = scales_stride(w, plan);
  const uint8_t* codes[chunk_rows];
  read_chunk(chunk, first, last, codes);
  for (int64_t i = 0; i < rows * padded; ++i) chunk.sums[i] = 0.0f;
  for (int64_t block = 0; block < plan.blocks; block += plan.panel) {
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      for (int64_t row = 0; row < rows;) {
        Strip strip{};
        for (int64_t r = 0; r < least(4, rows - row); ++r) {
          strip.codes[r] = codes[row + r];
          strip.scales[r] = chunk.scales + (row + r) * stride;
          strip.levels[r] = chunk.levels + (row + r) * book_stride(w);
        }
        strip.inputs = chunk.prepared + tile * plan.blocks * plan.block * plan.tile;
        strip.plan = &plan;
        strip.first = block;
        strip.last = least(block + plan.panel, plan.blocks);
        strip.ahead = rows_ahead(w) * w.row_bytes;
        strip.sums = chunk.sums + row * padded + tile * plan.tile;
        strip.stride = padded;
        row += some(strip, rows - row, plan.tile);
      }
    }
  }
  const float* input_sums = chunk.prepared + padded * plan.blocks * plan.block;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t v = 0; v < product.vectors; ++v) {
      float value = chunk.sums[row * padded + v];
      if (w.levels.kind == Values::none) value -= dot(chunk.shifts + row * (w.groups + lanes), input_sums + v * sums_stride(w), w.groups);
      put_number(product.outputs, v * w.rows + first + row, product.number, value);
    }
  }
}

// Grids that do not meet the lanes: a row is decoded into the cache and multiplied there.
static void multiply_decoded(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const Plan plan = make_plan(w, product.vectors);
  float* weights = scratch;
  const int64_t padded = rounded_up(w.columns, lanes);
  for (int64_t c = w.columns; c < padded; ++c) weights[c] = 0.0f;
  for (int64_t row = first; row < last; ++row) {
    decode_row(w, row, weights, scratch + padded);
    for (int64_t v = 0; v < product.vectors; ++v) {
      put_number(product.outputs, v * w.rows + row, product.number, dot(weights, prepared + v * plan.blocks * plan.block, padded));
    }
  }
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const Plan plan = make_plan(w, product.vectors);
  if (plan.kind == Plan::decode_rows) return multiply_decoded(product, prepared, first, last, scratch);
  const int64_t rows = grid_rows(plan), touched = rounded_up((plan.blocks - 1) * plan.block_bytes + plan.read_bytes, 4);
  float* scales = scratch;
  float* shifts = scales + rows * scales_stride(w, plan);
  float* levels = shifts + rows * (w.groups + lanes);
  float* sums = levels + rows * book_stride(w);
  float* copies = sums + rows * padded_vectors(product.vectors);
  const Chunk chunk{product, plan, prepared, scales, shifts, levels, sums, copies, copies + rows * (touched / 4)};
  for (int64_t row = first; row < last; row += rows) multiply_chunk(chunk, row, least(row + rows, last));
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits

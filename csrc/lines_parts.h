// What products of codes that lie in lines share, whatever the instruction set: inputs as digits, levels as whole numbers, and what sixteen
// rows have beside their codes. Included after fixed.h by the lines.h of an instruction set.
#pragma once
#include <optional>

#include "fixed.h"
#include "sixteen.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace lines {

constexpr int64_t run = 32;          // columns of whole lines, whatever the width of codes: as many lines as a code has bits
constexpr int64_t most_vectors = 4;  // that share a look at the codes
constexpr int most_level_bits = 8;   // of levels that are looked up in registers, wherever that is

// Whether codes, or levels of up to `level_bits` that all rows share, lie in whole lines, and groups end with a run of them or the part that is told.
static bool fits(const Coded& w, int level_bits, int64_t part = run) {
  const bool whole = w.columns % run == 0 && (w.groups == 1 || w.group % (w.group < run ? part : run) == 0);
  const bool codes = w.levels.kind == Values::none ? w.bits <= 8 : w.bits <= level_bits && w.levels.rows == 1 && w.level_groups == 1;
  return w.form == Coded::packed && w.lines && codes && whole;
}

static inline int64_t whole_tile(int64_t vectors);  // of an instruction set: so many vectors, or more, which are then zeros
static inline int64_t tiles_of(int64_t vectors) { return ceiling(vectors, most_vectors); }
static inline int64_t tile_of(int64_t vectors) { return whole_tile(ceiling(vectors, tiles_of(vectors))); }

// ---- inputs ---------------------------------------------------------------------------------------------------------------

// What an instruction set has of its own: how many words of 32 bits hold the digits of four inputs, and all whole numbers of a vector as such
// words, in the order in which codes leave their lines, among those of the other vectors of a tile.
static int64_t words_of_four(const Product& product);
static void lay_out(const Product& product, const int32_t* numbers, int64_t tile, int64_t in_tile, int32_t* to);
struct Levels;
// What products of levels with so many whole numbers leave out on average, in units of both.
static float left_out_of(const Product& product, const Levels& levels, const int32_t* numbers, int64_t count);

// Of a tile's vectors: words of digits [columns / 4, words of four, tile], the groups' units, sums and what levels leave out [groups, tile]; and
// room to make them.
struct Inputs {
  int64_t tile, words, groups;  // of a tile: vectors, words of digits; of a vector: padded groups
  int32_t* digits;
  float *units, *sums, *left_out, *room;

  Inputs(const Product& product, float* at) {
    const Coded& w = *product.matrix;
    const int64_t tiles = tiles_of(product.vectors);
    tile = tile_of(product.vectors);
    words = w.columns / 4 * words_of_four(product) * tile;
    groups = padded_groups(w);
    digits = reinterpret_cast<int32_t*>(at);
    units = at + tiles * words;
    sums = units + tiles * tile * groups;
    left_out = sums + tiles * tile * groups;
    room = left_out + tiles * tile * groups;
  }
};

static int64_t prepared_floats(const Product& product) {
  const Coded& w = *product.matrix;
  return tiles_of(product.vectors) * tile_of(product.vectors) * (w.columns / 4 * words_of_four(product) + 3 * padded_groups(w) + 2 * w.columns);
}

// The column of a run that byte `j` of the codes' register `k` holds: of whole codes in bytes, as a mask takes them out of a line.
static constexpr int column_of(int bits, int k, int j) {
  if (8 % bits != 0) return 4 * k + j;
  const int fields = 8 / bits;
  return k / fields * 4 * fields + j * fields + k % fields;
}

// ---- levels and scales, and inputs beside them ----------------------------------------------------------------------------

// Of wide codes, as of floating point of 8 bits, the smallest levels would be lost in two.
constexpr int level_bytes(int bits, int digits) { return bits > 6 || digits == 3 ? 3 : 2; }

// Levels as whole numbers of `bytes` bytes without a sign: (number - zero) * unit. What is lost is half a unit. There are as many numbers as eight
// bits can say, narrower codes' levels more than once. One that is not finite makes all sums so; of 256, of which no code says it, it is left out.
struct Levels {
  int32_t numbers[1 << most_level_bits];
  float unit, zero;
  double lowest[3];  // of no byte, the lowest one and the lowest two: what they say on average

  Levels(const Coded& w, int bytes) : lowest{} {
    const int count = 1 << w.bits;
    float found[1 << most_level_bits], low = 0.0f, high = 0.0f;
    bool finite[1 << most_level_bits], any = false, all = true;
    for (int i = 0; i < count; ++i) {
      const float level = found[i] = number_at(w.levels.data, i, w.levels.number);
      finite[i] = level - level == 0.0f, all = all && finite[i];
      if (!finite[i]) continue;
      low = any && low < level ? low : level, high = any && high > level ? high : level, any = true;
    }
    const double most = (int64_t{1} << (8 * bytes)) - 1, step = (static_cast<double>(high) - low) / most;
    const float only = low < 0.0f ? -low : low;  // where all are the same
    unit = step > 0 ? static_cast<float>(step) : only > 0.0f ? only / static_cast<float>(most) : 1.0f;
    zero = static_cast<float>(-static_cast<double>(low) / unit);
    if (count < 256 && !all) unit = as_float(0x7fc00000);
    for (int i = 0; i < count; ++i) {
      const double place = finite[i] ? (static_cast<double>(found[i]) - low) / unit : 0.0;
      numbers[i] = place > 0 ? static_cast<int32_t>((place < most ? place : most) + 0.5) : 0;
      for (int without = 1; without < 3; ++without) lowest[without] += static_cast<double>(numbers[i] & ((1 << (8 * without)) - 1)) / count;
    }
    for (int i = count; i < 1 << most_level_bits; ++i) numbers[i] = numbers[i - count];
  }
};

static std::optional<Levels> find_levels(const Product& product) {
  const Coded& w = *product.matrix;
  if (w.levels.kind == Values::none) return std::nullopt;
  return std::optional<Levels>(std::in_place, w, level_bytes(w.bits, product.digits));
}

// What sixteen rows have beside their codes, group by group: sixteen scales, zero points and offsets, a row a lane. Those that do not lie
// so are brought there first, as float32.
struct Grid {
  const uint8_t *scales, *zeros, *offsets;  // of the first group; nullptr where there are none
  Number of_scales, of_zeros, of_offsets;
  bool packed;   // zero points of the width of the codes
  float factor, zero;  // of scales, if not 1; the zero point where none are stored
};

// What `codes` say, as an instruction set looks it up fastest: `count` numbers of sixteen rows, a multiple of 16.
static void look_up_numbers(const float* lookup, const uint8_t* codes, int64_t count, float* to);

static int64_t scratch_floats(const Coded& w) { return 48 * padded_groups(w) + sixteen_room(w); }

static Grid find_grid(const Coded& w, const Levels* levels, int64_t row, float* room) {
  const int64_t each = 16 * padded_groups(w);
  const auto find = [&](const Values& values, float* to, Number& number) -> const uint8_t* {
    if (values.kind == Values::none) return nullptr;
    number = values.number;
    const uint8_t* from = static_cast<const uint8_t*>(values.data) + row * row_bytes_of(values, w.bits);
    if (values.lines && values.kind != Values::table) return from;
    if (values.lines) look_up_numbers(values.lookup, from, line_rows * w.groups, to);
    else read_sixteen(w, values, [row](int64_t r) { return row + r; }, to, room + 3 * each);
    number = Number::f32;
    return reinterpret_cast<const uint8_t*>(to);
  };
  Grid grid{};
  grid.factor = levels != nullptr ? levels->unit : step_of(w);
  grid.zero = levels != nullptr ? levels->zero : zero_of(w);
  grid.scales = find(w.scales, room, grid.of_scales);
  const bool offsets = has_offsets(w);
  (offsets ? grid.offsets : grid.zeros) = find(w.zeros, room + each, offsets ? grid.of_offsets : grid.of_zeros);
  grid.packed = w.zeros.kind == Values::packed && w.zeros.lines;
  return grid;
}

static void prepare(const Product& product, int64_t vector, float* memory) {
  const Coded& w = *product.matrix;
  const Inputs to(product, memory);
  if (vector >= tiles_of(product.vectors) * to.tile) return;
  const std::optional<Levels> levels = find_levels(product);
  const int64_t there = vector < product.vectors ? w.columns : 0, which = vector / to.tile, in_tile = vector % to.tile;
  const int64_t of_groups = which * to.tile * to.groups + in_tile;
  float* values = to.room + vector * 2 * w.columns;
  int32_t* numbers = reinterpret_cast<int32_t*>(values + w.columns);
  read_numbers(product.inputs, vector * w.columns, product.number, there, values);
  for (int64_t c = there; c < w.columns; ++c) values[c] = 0.0f;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t first = g * w.group, count = least(w.group, w.columns - first);
    to.units[of_groups + g * to.tile] = fixed::to_whole_numbers(values + first, count, 8 * product.digits - 1, numbers + first);
    to.sums[of_groups + g * to.tile] = static_cast<float>(fixed::sum_of_numbers(numbers + first, count));  // in units
    if (levels) to.left_out[of_groups + g * to.tile] = left_out_of(product, *levels, numbers + first, count);
  }
  lay_out(product, numbers, to.tile, in_tile, to.digits + which * to.words);
}

// ---- products -------------------------------------------------------------------------------------------------------------

// Which lines are asked for into the second cache: all where a line is computed with for longer than memory takes for it; one in four where memory
// is waited for, as more come in the way of what the processor fetches by itself. Then each is also brought into the first cache as what is
// needed only once, so that inputs stay there. All as was seen to be fastest.
enum class Fetch { all, some };

// Asks for the lines that come so many bytes later. Always inline: compilers take a function that only fetches for one without effect.
template <Fetch Asks, int Lines, int64_t Ahead>
static inline __attribute__((always_inline)) void fetch(const uint8_t* from) {
  constexpr uintptr_t apart = Asks == Fetch::all ? 64 : 256, bytes = 64 * Lines;
  constexpr int64_t near = 256;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + Ahead, first = (begin + apart - 1) / apart * apart;
  if constexpr (bytes % apart == 0) {
#pragma GCC unroll 8
    for (uintptr_t at = 0; at < bytes; at += apart) __builtin_prefetch(reinterpret_cast<const char*>(first + at), 0, 2);
  } else {
    for (uintptr_t at = first; at < begin + bytes; at += apart) __builtin_prefetch(reinterpret_cast<const char*>(at), 0, 2);
  }
  if constexpr (Asks == Fetch::all) return;
#pragma GCC unroll 8
  for (int i = 0; i < Lines; ++i) __builtin_prefetch(from + 64 * i + near, 0, 0);
}

// Sums of sixteen rows as numbers of the outputs' type from place `at` on.
static void put_line(const Product& product, int64_t at, const float* sums);

// Rows first to last, whole sixteens of them. `Kernel`, an instruction set's own for a width of codes and for digits if it is `served`, is made of a
// matrix, its levels, if there are any, and how many vectors a tile has; it multiplies sixteen rows with a tile: sums [vectors, 16].
template <class Kernel>
static void multiply_as(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  const Inputs of(product, const_cast<float*>(prepared));
  const std::optional<Levels> levels = find_levels(product);
  const Levels* found = levels ? &*levels : nullptr;
  const Kernel kernel(w, found, of.tile);
  alignas(64) float sums[most_vectors * line_rows];
  for (int64_t row = first; row < last; row += line_rows) {
    const Grid grid = find_grid(w, found, row, scratch);
    for (int64_t which = 0; which < tiles_of(product.vectors); ++which) {
      kernel.multiply(w, w.codes + row * w.row_bytes, grid, of, which, sums);
      for (int64_t v = 0; v < of.tile && which * of.tile + v < product.vectors; ++v) {
        put_line(product, (which * of.tile + v) * w.rows + row, sums + v * line_rows);
      }
    }
  }
}

template <class Kernel>
static void multiply_served(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  if constexpr (Kernel::served) multiply_as<Kernel>(product, prepared, first, last, scratch);
}

template <template <int, int> class Kernel, int Digits>
static void multiply_digits(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  switch (product.matrix->bits) {
    case 1: return multiply_served<Kernel<1, Digits>>(product, prepared, first, last, scratch);
    case 2: return multiply_served<Kernel<2, Digits>>(product, prepared, first, last, scratch);
    case 3: return multiply_served<Kernel<3, Digits>>(product, prepared, first, last, scratch);
    case 4: return multiply_served<Kernel<4, Digits>>(product, prepared, first, last, scratch);
    case 5: return multiply_served<Kernel<5, Digits>>(product, prepared, first, last, scratch);
    case 6: return multiply_served<Kernel<6, Digits>>(product, prepared, first, last, scratch);
    case 7: return multiply_served<Kernel<7, Digits>>(product, prepared, first, last, scratch);
    default: return multiply_served<Kernel<8, Digits>>(product, prepared, first, last, scratch);
  }
}

template <template <int, int> class Kernel>
static void multiply_rows(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const auto function = product.digits == 1 ? multiply_digits<Kernel, 1> : product.digits == 2 ? multiply_digits<Kernel, 2> : multiply_digits<Kernel, 3>;
  function(product, prepared, first, last, scratch);
}

}  // namespace lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits

#include "matrices.h"

#include <algorithm>
#include <cmath>

#include "grids.h"

namespace comparison {

namespace {

double& weight_at(Matrix& matrix, int64_t row, int64_t column) { return matrix.weights[static_cast<size_t>(row * matrix.coded.columns + column)]; }

void begin(Matrix& matrix, int64_t rows, int64_t columns) {
  matrix.coded.rows = rows;
  matrix.coded.columns = columns;
  matrix.weights.assign(static_cast<size_t>(rows * columns), 0.0);
  matrix.reach.assign(static_cast<size_t>(rows), 0.0);
}

void reach_to(Matrix& matrix, int64_t row, double size) { matrix.reach[static_cast<size_t>(row)] = std::max(matrix.reach[static_cast<size_t>(row)], std::fabs(size)); }

Table make_scales(Random& random, const Grid& grid, int64_t groups, Matrix& matrix) {
  switch (grid.scales) {
    case Scales::numbers: return dense_table(random, grid.rows, groups, grid.number, 0.1, 1.1, matrix.memory);
    case Scales::small: return dense_table(random, grid.rows, groups, grid.number, 0.001, 0.02, matrix.memory);
    case Scales::shared: return dense_table(random, 1, groups, grid.number, 0.1, 1.1, matrix.memory);
    case Scales::table: return byte_table(random, grid.rows, groups, matrix.memory);
    case Scales::two_level: return coded_table(random, grid.rows, groups, matrix);
    default: return Table{};
  }
}

Table make_zeros(Random& random, const Grid& grid, int64_t groups, Matrix& matrix) {
  const double size = 1 << std::min(grid.bits, 8);
  switch (grid.zeros) {
    case Zeros::packed: return packed_table(random, grid.rows, groups, grid.bits, matrix.memory);
    case Zeros::numbers: return dense_table(random, grid.rows, groups, grid.number, -size, size, matrix.memory);
    case Zeros::shared: return dense_table(random, 1, groups, grid.number, -size, size, matrix.memory);
    case Zeros::two_level:
    case Zeros::two_level_minimums: return coded_table(random, grid.rows, groups, matrix);
    case Zeros::signs_and_numbers:
    case Zeros::minimums: return dense_table(random, grid.rows, groups, grid.number, -1, 1, matrix.memory);
    default: return Table{};
  }
}

Coded::Counts what_codes_count(Zeros zeros) {
  if (zeros == Zeros::signs || zeros == Zeros::signs_and_numbers) return Coded::as_signs;
  return zeros >= Zeros::from_zero ? Coded::from_zero : Coded::from_middle;
}

Table make_levels(Random& random, const Grid& grid, int64_t groups, Matrix& matrix) {
  const int64_t book = int64_t{1} << grid.bits;
  if (grid.levels == Levels::none) return {};
  if (grid.levels == Levels::shared) return dense_table(random, 1, book, grid.number, -1, 1, matrix.memory);
  if (grid.levels == Levels::rows) return dense_table(random, grid.rows, book, grid.number, -1, 1, matrix.memory);
  if (grid.levels == Levels::groups) return dense_table(random, grid.rows, book * groups, grid.number, -1, 1, matrix.memory);
  for (int64_t end = 0; end < grid.rows;) matrix.ends.push_back(end = std::min(grid.rows, end + 1 + random.below(9)));
  Table made = dense_table(random, static_cast<int64_t>(matrix.ends.size()), book, grid.number, -1, 1, matrix.memory);
  made.values.ends = matrix.ends.data();
  return made;
}

int64_t row_of_levels(const Matrix& matrix, int64_t row) {
  if (matrix.ends.empty()) return row;
  return std::upper_bound(matrix.ends.begin(), matrix.ends.end(), row) - matrix.ends.begin();
}

}  // namespace

void make_packed(Random& random, const Grid& grid, Matrix& matrix) {
  begin(matrix, grid.rows, grid.columns);
  Coded& coded = matrix.coded;
  coded.bits = grid.bits;
  coded.group = std::min(grid.group, grid.columns);
  coded.groups = (grid.columns + coded.group - 1) / coded.group;
  coded.row_bytes = fewbits::packed_bytes(grid.columns, grid.bits);
  coded.code_bytes = coded.row_bytes * grid.rows;
  const bool three = grid.bits == fewbits::base_three;
  const int64_t book = int64_t{1} << grid.bits, largest = three ? 2 : book - 1;
  const std::vector<int> codes = random_codes(random, grid.rows * grid.columns, largest + 1);
  coded.codes = three ? pack_trits(codes, grid.rows, grid.columns, matrix.memory) : pack(codes, grid.rows, grid.columns, grid.bits, matrix.memory);
  const Table scales = make_scales(random, grid, coded.groups, matrix), zeros = make_zeros(random, grid, coded.groups, matrix);
  const Table levels = make_levels(random, grid, coded.groups, matrix);
  coded.scales = scales.values, coded.zeros = zeros.values, coded.levels = levels.values;
  coded.counts = what_codes_count(grid.zeros);
  if (grid.levels != Levels::none) coded.level_groups = levels.values.columns / book;
  for (int64_t row = 0; row < grid.rows; ++row) {
    for (int64_t column = 0; column < grid.columns; ++column) {
      const int64_t g = column / coded.group;
      const int code = codes[static_cast<size_t>(row * grid.columns + column)];
      const double scale = grid.scales == Scales::none ? 1.0 : scales.of(row, g);
      double zero = three ? 1.0 : static_cast<double>(book / 2), factor = scale, size = static_cast<double>(largest), offset = 0.0;
      const double stored = coded.zeros.kind == Values::none ? 0.0 : zeros.of(row, g);
      if (coded.counts == Coded::as_signs) zero = 0.5, factor = 2 * scale, offset = stored;
      else if (coded.counts == Coded::from_zero) zero = 0.0, offset = stored;
      else if (grid.zeros != Zeros::none) zero = stored;
      double value = (code - zero) * factor + offset;
      size = (size + std::fabs(zero)) * std::fabs(factor) + std::fabs(offset);
      if (grid.levels != Levels::none) {
        value = levels.of(row_of_levels(matrix, row), (coded.level_groups > 1 ? g * book : 0) + code) * scale;
        size = std::fabs(scale);
      }
      weight_at(matrix, row, column) = value;
      reach_to(matrix, row, size);
    }
  }
}

void make_plain(Random& random, int64_t rows, int64_t columns, Number number, Matrix& matrix) {
  begin(matrix, rows, columns);
  const Table table = dense_table(random, rows, columns, number, -1, 1, matrix.memory);
  matrix.coded.form = Coded::plain;
  matrix.coded.number = number;
  matrix.coded.codes = static_cast<const uint8_t*>(table.values.data);
  matrix.weights = table.numbers;
  for (int64_t row = 0; row < rows; ++row) reach_to(matrix, row, 1.0);
}

void make_sparse(Random& random, int64_t rows, int64_t columns, int64_t index_bytes, Number number, Matrix& matrix) {
  begin(matrix, rows, columns);
  std::vector<int64_t> places;
  int32_t* pointers = matrix.memory.take<int32_t>(rows + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t one_in = row % 7 == 3 ? columns + 1 : row % 5 == 2 ? 1 : 15;  // rows without entries, and of nothing else
    for (int64_t column = 0; column < columns; ++column) {
      if (random.below(one_in) == 0) places.push_back(row * columns + column);
    }
    pointers[row + 1] = static_cast<int32_t>(places.size());
  }
  const int64_t count = static_cast<int64_t>(places.size());
  const Table table = dense_table(random, 1, count, number, -1, 1, matrix.memory);
  uint8_t* indices = matrix.memory.take<uint8_t>(count * index_bytes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = places[static_cast<size_t>(i)], column = place % columns;
    if (index_bytes == 2) reinterpret_cast<uint16_t*>(indices)[i] = static_cast<uint16_t>(column);
    else reinterpret_cast<uint32_t*>(indices)[i] = static_cast<uint32_t>(column);
    matrix.weights[static_cast<size_t>(place)] = table.numbers[static_cast<size_t>(i)];
    reach_to(matrix, place / columns, 1.0);
  }
  matrix.coded.form = Coded::sparse;
  matrix.coded.number = number;
  matrix.coded.codes = static_cast<const uint8_t*>(table.values.data);
  matrix.coded.entries = count;
  matrix.coded.indices = indices;
  matrix.coded.index_bytes = index_bytes;
  matrix.coded.pointers = pointers;
}

// Bytes of 64 rows side by side.
static const uint8_t* in_lines(const Coded& coded, int64_t rows, Memory& memory) {
  uint8_t* lines = memory.take<uint8_t>(coded.code_bytes);
  std::copy(coded.codes, coded.codes + coded.code_bytes, lines);
  for (int64_t row = 0; row < rows / 64 * 64; ++row) {
    for (int64_t i = 0; i < coded.row_bytes; ++i) lines[row / 64 * 64 * coded.row_bytes + i * 64 + row % 64] = coded.codes[row * coded.row_bytes + i];
  }
  return lines;
}

void make_codewords(Random& random, const Codewords& shape, Matrix& matrix) {
  begin(matrix, shape.rows, shape.columns);
  Coded& coded = matrix.coded;
  const int64_t along = shape.transposed ? shape.rows : shape.columns, across = shape.transposed ? shape.columns : shape.rows;
  const int64_t each = (along + shape.unit - 1) / shape.unit * shape.books, entries = (int64_t{1} << shape.bits) - random.below(2);
  const std::vector<int> codes = random_codes(random, across * each, entries);
  const Table books = dense_table(random, shape.books * entries, shape.unit, shape.number, -1, 1, matrix.memory);
  const Table scales = dense_table(random, across, 1, shape.number, 0.1, 1.1, matrix.memory);
  coded.form = Coded::vectors;
  coded.number = shape.number;
  coded.unit = shape.unit, coded.books = shape.books, coded.bits = shape.bits, coded.entries = entries;
  coded.transposed = shape.transposed;
  coded.row_bytes = (each * shape.bits + 7) / 8;
  coded.code_bytes = coded.row_bytes * across;
  coded.codes = pack(codes, across, each, shape.bits, matrix.memory);
  coded.lines = shape.lines;
  if (shape.lines) coded.codes = in_lines(coded, across, matrix.memory);
  coded.indices = books.values.data;
  coded.scales = scales.values;
  for (int64_t line = 0; line < across; ++line) {
    for (int64_t place = 0; place < along; ++place) {
      double value = 0.0;
      for (int64_t book = 0; book < shape.books; ++book) {
        const int code = codes[static_cast<size_t>(line * each + place / shape.unit * shape.books + book)];
        value += books.of(book * entries + code, place % shape.unit);
      }
      const int64_t row = shape.transposed ? place : line;
      weight_at(matrix, row, shape.transposed ? line : place) = value * scales.of(line, 0);
      reach_to(matrix, row, static_cast<double>(shape.books) * scales.of(line, 0));
    }
  }
}

void make_signed_product(Random& random, int64_t rows, int64_t columns, int64_t rank, Number number, Matrix& matrix) {
  begin(matrix, rows, columns);
  Coded& coded = matrix.coded;
  const Table left = dense_table(random, rows, rank, number, -1, 1, matrix.memory), right = dense_table(random, rank, columns, number, -1, 1, matrix.memory);
  coded.form = Coded::signed_product;
  coded.number = number;
  coded.rank = rank;
  coded.code_bytes = (rows * columns + 7) / 8;
  uint8_t* signs = matrix.memory.take<uint8_t>(coded.code_bytes);
  for (int64_t i = 0; i < coded.code_bytes; ++i) signs[i] = static_cast<uint8_t>(random.below(256));
  coded.codes = signs;
  coded.left = left.values.data, coded.right = right.values.data;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t bit = row * columns + column;
      double value = 0.0, size = 0.0;
      for (int64_t k = 0; k < rank; ++k) value += left.of(row, k) * right.of(k, column), size += std::fabs(left.of(row, k) * right.of(k, column));
      weight_at(matrix, row, column) = signs[bit / 8] >> (7 - bit % 8) & 1 ? value : -value;
      reach_to(matrix, row, size);
    }
  }
}

void make_mixed(Random& random, int64_t rows, int64_t groups, int64_t group, int bits, int wide, Matrix& matrix) {
  begin(matrix, rows, groups * group);
  Coded& coded = matrix.coded;
  coded.form = Coded::mixed;
  coded.group = group, coded.groups = groups, coded.bits = bits, coded.wide_bits = wide;
  coded.wide_groups = random.below(groups + 1);
  const int64_t narrow_count = (groups - coded.wide_groups) * group, wide_count = coded.wide_groups * group;
  const std::vector<int> narrow_codes = random_codes(random, rows * narrow_count, int64_t{1} << bits);
  const std::vector<int> wide_codes = random_codes(random, rows * wide_count, int64_t{1} << wide);
  coded.row_bytes = fewbits::packed_bytes(narrow_count, bits);
  coded.wide_row_bytes = fewbits::packed_bytes(wide_count, wide);
  coded.codes = pack(narrow_codes, rows, narrow_count, bits, matrix.memory);
  coded.wide = pack(wide_codes, rows, wide_count, wide, matrix.memory);
  uint8_t* flags = matrix.memory.take<uint8_t>(rows * ((groups + 7) / 8));
  coded.flags = flags;
  const Table scales = dense_table(random, rows, groups, Number::f16, 0.1, 1.1, matrix.memory);
  const Table zeros = dense_table(random, rows, groups, Number::f16, 0.0, 9.0, matrix.memory);
  coded.scales = scales.values, coded.zeros = zeros.values;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t taken[2] = {0, 0};
    for (int64_t g = 0; g < groups; ++g) {
      const bool is_wide = random.below(groups - g) < coded.wide_groups - taken[1];  // equally many in every row
      if (is_wide) flags[row * ((groups + 7) / 8) + g / 8] |= static_cast<uint8_t>(1 << (g % 8));
      const std::vector<int>& codes = is_wide ? wide_codes : narrow_codes;
      const int64_t first = row * (is_wide ? wide_count : narrow_count) + taken[is_wide] * group;
      for (int64_t c = 0; c < group; ++c) weight_at(matrix, row, g * group + c) = (codes[static_cast<size_t>(first + c)] - zeros.of(row, g)) * scales.of(row, g);
      reach_to(matrix, row, ((1 << (is_wide ? wide : bits)) - 1 + zeros.of(row, g)) * scales.of(row, g));
      ++taken[is_wide];
    }
  }
}

}  // namespace comparison

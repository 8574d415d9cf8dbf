// A matrix as it was described, read field by field. Every size is checked here, before a kernel reads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <list>
#include <stdexcept>
#include <vector>

#include "matrix.h"

namespace fewbits {

constexpr int64_t largest = int64_t{1} << 40;
constexpr int64_t in_lines = 6;  // in the place of a form: packed codes that lie in lines

inline void require(bool right, const char* what) {
  if (!right) throw std::invalid_argument(what);
}

inline Number to_number(int64_t code) {
  require(code >= 0 && code <= 2, "a number must be of type 0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<Number>(code);
}

inline int64_t size_of(Number number) { return number == Number::f32 ? 4 : 2; }

// A matrix as Python describes it: `layout` in the order of the fields, `buffers` an address and a size for each in turn.
class Reader {
 public:
  Reader(const std::vector<int64_t>& layout, const std::vector<uint64_t>& buffers) : layout_(layout), buffers_(buffers) {}

  const Coded& read_whole(bool others = false) {
    const Coded& found = read_coded(0, others);
    finish();
    return found;
  }

  const Coded& read_matrix() { return read_coded(0); }
  const Coded& read_any() { return read_coded(0, true); }

  void finish() const { require(at_ == layout_.size() && buffer_ == buffers_.size(), "a layout describes less than was given"); }

  int64_t next(int64_t low, int64_t high) {
    require(at_ < layout_.size(), "a layout ends too early");
    const int64_t value = layout_[at_++];
    require(value >= low && value <= high, "a size in a layout is out of range");
    return value;
  }

  const void* next_buffer(int64_t bytes, bool exactly = true) {
    require(buffer_ + 2 <= buffers_.size(), "a layout needs more buffers than were given");
    const uint64_t address = buffers_[buffer_], size = buffers_[buffer_ + 1];
    buffer_ += 2;
    require(exactly ? size == static_cast<uint64_t>(bytes) : size >= static_cast<uint64_t>(bytes), "a buffer is not of the size that its layout says");
    require(address != 0 || bytes == 0, "a buffer has no memory");
    return reinterpret_cast<const void*>(address);
  }

 private:
  // Codes in lines, numbers as they are, compressed sparse rows, codewords, a product with signs, or groups of two widths.
  const Coded& read_other(Coded& matrix, bool others) {
    const int64_t form = next(others ? 1 : in_lines, in_lines);
    if (form == in_lines) {
      matrix.bits = static_cast<int>(next(1, base_three));
      matrix.lines = true;
      return read_packed(matrix, 0);
    }
    matrix.form = static_cast<Coded::Form>(form);
    if (matrix.form == Coded::mixed) return read_mixed(matrix);
    matrix.number = to_number(next(0, 2));
    require(matrix.columns <= largest / matrix.rows, "a matrix is too large");
    if (matrix.form == Coded::vectors) return read_vectors(matrix);
    if (matrix.form == Coded::signed_product) return read_signed_product(matrix);
    if (matrix.form == Coded::plain) {
      matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.rows * matrix.columns * size_of(matrix.number)));
      return matrix;
    }
    matrix.index_bytes = next(2, 4);
    require(matrix.index_bytes != 3, "the columns of entries must be of 2 or 4 bytes");
    matrix.entries = next(0, largest);
    matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.entries * size_of(matrix.number)));
    matrix.indices = next_buffer(matrix.entries * matrix.index_bytes);
    matrix.pointers = static_cast<const int32_t*>(next_buffer((matrix.rows + 1) * 4));
    return matrix;
  }

  const Coded& read_vectors(Coded& matrix) {
    matrix.unit = next(4, 16);
    require(matrix.unit == 4 || matrix.unit == 8 || matrix.unit == 16, "codewords must be of 4, 8 or 16 numbers");
    matrix.books = next(1, 64);
    matrix.bits = static_cast<int>(next(1, 16));
    matrix.entries = next(1, int64_t{1} << matrix.bits);
    matrix.transposed = next(0, 1) == 1;
    matrix.lines = next(0, 1) == 1;
    require(!matrix.lines || matrix.bits == 8, "codes in lines must be bytes");
    const int64_t rows = matrix.transposed ? matrix.columns : matrix.rows, along = matrix.transposed ? matrix.rows : matrix.columns;
    matrix.row_bytes = ((along + matrix.unit - 1) / matrix.unit * matrix.books * matrix.bits + 7) / 8;
    require(matrix.row_bytes <= largest / rows, "a matrix is too large");
    matrix.code_bytes = matrix.row_bytes * rows;
    matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.code_bytes));
    matrix.indices = next_buffer(matrix.books * matrix.entries * matrix.unit * size_of(matrix.number));
    matrix.scales = read_values(matrix, 0);
    const bool fits = matrix.scales.kind == Values::dense && matrix.scales.rows == rows && matrix.scales.columns == 1;
    require(matrix.scales.kind == Values::none || fits, "scales of codewords must be plain numbers, one for each row of codes");
    return matrix;
  }

  const Coded& read_signed_product(Coded& matrix) {
    matrix.rank = next(1, int64_t{1} << 20);
    matrix.lines = next(0, 1) == 1;
    require(!matrix.lines || (matrix.rows % line_rows == 0 && matrix.columns % 32 == 0), "lines need sixteen rows, of whole words");
    matrix.row_bytes = matrix.columns / 8;  // where rows are of whole bytes
    matrix.code_bytes = (matrix.rows * matrix.columns + 7) / 8;
    matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.code_bytes));
    require(matrix.rank <= largest / std::max(matrix.rows, matrix.columns), "factors are too large");
    matrix.left = next_buffer(matrix.rows * matrix.rank * size_of(matrix.number));
    matrix.right = next_buffer(matrix.rank * matrix.columns * size_of(matrix.number));
    return matrix;
  }

  const Coded& read_mixed(Coded& matrix) {
    matrix.group = next(1, matrix.columns);
    matrix.groups = matrix.columns / matrix.group;
    require(matrix.groups * matrix.group == matrix.columns, "groups do not divide the columns");
    matrix.bits = static_cast<int>(next(1, 8));
    matrix.wide_bits = static_cast<int>(next(1, 8));
    matrix.wide_groups = next(0, matrix.groups);
    matrix.row_bytes = packed_bytes((matrix.groups - matrix.wide_groups) * matrix.group, matrix.bits);
    matrix.wide_row_bytes = packed_bytes(matrix.wide_groups * matrix.group, matrix.wide_bits);
    require(matrix.columns <= largest / matrix.rows, "a matrix is too large");
    matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.rows * matrix.row_bytes));
    matrix.wide = static_cast<const uint8_t*>(next_buffer(matrix.rows * matrix.wide_row_bytes));
    matrix.flags = static_cast<const uint8_t*>(next_buffer(matrix.rows * ((matrix.groups + 7) / 8)));
    matrix.scales = read_values(matrix, 0);
    matrix.zeros = read_values(matrix, 0);
    for (const Values* values : {&matrix.scales, &matrix.zeros}) {
      const bool numbers = values->kind == Values::dense || values->kind == Values::coded || values->kind == Values::table;
      require(numbers && values->ends == nullptr, "scales and zero points of groups of two widths must be numbers");
      require((values->rows == 1 || values->rows == matrix.rows) && values->columns == matrix.groups, "scales or zero points do not fit the groups of a matrix");
    }
    return matrix;
  }

  const Coded& read_coded(int depth, bool others = false) {
    require(depth < 3, "scales of scales of scales are not known");
    Coded& coded = made_.emplace_back();
    coded.rows = next(1, largest);
    coded.columns = next(1, largest);
    coded.bits = static_cast<int>(next(depth == 0 ? 0 : 1, base_three));
    return coded.bits == 0 ? read_other(coded, others) : read_packed(coded, depth);
  }

  const Coded& read_packed(Coded& coded, int depth) {
    coded.group = std::min(next(1, largest), coded.columns);
    coded.groups = (coded.columns + coded.group - 1) / coded.group;
    coded.row_bytes = packed_bytes(coded.columns, coded.bits);
    require(coded.row_bytes <= largest / coded.rows, "a matrix is too large");
    const int64_t word = coded.bits == base_three ? word_of(coded) : 4;
    require(!coded.lines || (coded.rows % line_rows == 0 && coded.row_bytes % word == 0), "lines need sixteen rows, of whole words");
    coded.code_bytes = coded.row_bytes * coded.rows;
    coded.codes = static_cast<const uint8_t*>(next_buffer(coded.code_bytes));
    coded.levels = read_values(coded, depth);
    coded.scales = read_values(coded, depth);
    coded.zeros = read_zeros(coded, depth);
    for (Values* values : {&coded.scales, &coded.zeros}) {
      const bool own = values->rows == coded.rows && values->ends == nullptr && values->data != nullptr;
      values->lines = coded.lines && own;
    }
    check(coded);
    return coded;
  }

  static bool serves_rows(const Values& values, const Coded& coded) { return values.ends != nullptr || values.rows == 1 || values.rows == coded.rows; }

  static void check(Coded& coded) {
    const auto fits = [&coded](const Values& values) {
      return values.kind == Values::none || (serves_rows(values, coded) && values.columns == coded.groups);
    };
    require(fits(coded.scales) && fits(coded.zeros), "scales or zero points do not fit the groups of a matrix");
    const bool signs = coded.counts == Coded::as_signs, middle = coded.counts == Coded::from_middle;
    require(!signs || coded.bits == 1, "signs must be of one bit");
    require(middle || coded.zeros.kind != Values::packed, "offsets cannot be packed integers");
    const bool three = coded.bits == base_three, plain = middle && coded.zeros.kind == Values::none;
    require(!three || (coded.levels.kind == Values::none && plain), "codes of three values have no levels, zero points or offsets");
    const bool told = signs || three || coded.levels.kind != Values::none || coded.scales.kind != Values::none;
    require(told, "a matrix has neither levels nor scales");
    require(coded.scales.kind != Values::packed, "scales cannot be packed integers");
    require(coded.levels.kind != Values::none || (coded.scales.ends == nullptr && coded.zeros.ends == nullptr), "runs of rows have levels");
    if (coded.levels.kind == Values::none) return;
    require(coded.levels.kind == Values::dense && plain, "levels must be plain numbers, without zero points or offsets");
    const int64_t book = int64_t{1} << coded.bits;
    coded.level_groups = coded.levels.columns / book;
    require(serves_rows(coded.levels, coded), "levels do not fit the rows of a matrix");
    require(coded.levels.columns == book || coded.levels.columns == book * coded.groups, "levels do not fit the groups of a matrix");
  }

  // How many runs, where each ends, and their numbers.
  Values read_runs(const Coded& owner) {
    Values values;
    values.kind = Values::dense;
    values.rows = next(1, 1 << 24);
    require(values.rows <= static_cast<int64_t>(layout_.size() - at_), "a layout ends too early");
    values.ends = layout_.data() + at_;
    int64_t end = 0;
    for (int64_t run = 0; run < values.rows; ++run) end = next(end, owner.rows);
    require(end == owner.rows, "runs of rows do not end with the last row");
    values.columns = next(1, largest);
    values.number = to_number(next(0, 2));
    require(values.columns <= largest / values.rows, "a table is too large");
    values.data = next_buffer(values.rows * values.columns * size_of(values.number));
    return values;
  }

  // Zero points; or what codes count from, and offsets.
  Values read_zeros(Coded& owner, int depth) {
    require(at_ < layout_.size(), "a layout ends too early");
    const int64_t kind = layout_[at_];
    if (kind != Values::signs && kind != Values::minimums) return read_values(owner, depth);
    ++at_;
    owner.counts = kind == Values::signs ? Coded::as_signs : Coded::from_zero;
    return read_values(owner, depth);
  }

  Values read_values(const Coded& owner, int depth) {
    Values values;
    values.kind = static_cast<Values::Kind>(next(0, Values::runs));
    require(values.kind != Values::signs, "what codes count from is told before offsets");
    if (values.kind == Values::none) return values;
    if (values.kind == Values::runs) return read_runs(owner);
    if (values.kind == Values::coded) {
      values.inner = &read_coded(depth + 1);
      values.rows = values.inner->rows;
      values.columns = values.inner->columns;
      return values;
    }
    values.rows = next(1, largest);
    values.columns = next(1, largest);
    values.number = to_number(next(0, 2));
    require(values.columns <= largest / values.rows, "a table is too large");
    const int64_t count = values.rows * values.columns;
    if (values.kind == Values::dense) values.data = next_buffer(count * size_of(values.number));
    else if (values.kind == Values::table) values.data = next_buffer(count);
    else values.data = next_buffer(values.rows * row_bytes_of(values, owner.bits));
    if (values.kind == Values::table) values.lookup = static_cast<const float*>(next_buffer(256 * 4));
    return values;
  }

  const std::vector<int64_t>& layout_;
  const std::vector<uint64_t>& buffers_;
  std::list<Coded> made_;  // whose addresses stay
  size_t at_ = 0, buffer_ = 0;
};

}  // namespace fewbits

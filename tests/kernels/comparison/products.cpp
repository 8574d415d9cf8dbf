// Products with one to a few vectors, and decoded rows, of every form of matrix.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "compare.h"
#include "matrices.h"

namespace comparison {

namespace {

using fewbits::Kernels;

constexpr double float32_limit = 1e-6;  // of the sum of |input| times what a weight's parts reach: that of tests/kernels/test_native.py
constexpr double digits_limit[] = {0.0, 0x1p-5, 0x1p-13, 0.0};  // of the largest input times that, for each square root of a column
constexpr Number numbers[] = {Number::f32, Number::f16, Number::bf16};

struct Asked {
  int64_t vectors;
  Number number;
  int digits;
};

void multiply(const Kernels& kernels, const Matrix& matrix, const Asked& asked, Random& random, Count& count) {
  const Coded& coded = matrix.coded;
  Memory memory;
  uint8_t* inputs = memory.take<uint8_t>(asked.vectors * coded.columns * size_of(asked.number));
  uint8_t* outputs = memory.take<uint8_t>(asked.vectors * coded.rows * size_of(asked.number));
  for (int64_t i = 0; i < asked.vectors * coded.columns; ++i) put_number(inputs, i, asked.number, random.between(-1, 1) * (random.below(50) == 0 ? 20 : 1));
  const fewbits::Product product{&coded, inputs, outputs, asked.vectors, asked.number, asked.digits};
  const std::string where = std::string(kernels.name) + ", " + matrix.name + ", vectors " + std::to_string(asked.vectors) + ", inputs " +
                            std::to_string(static_cast<int>(asked.number)) + ", digits " + std::to_string(asked.digits);
  begin(where);
  fewbits::multiply(kernels, product, 2);
  for (int64_t v = 0; v < asked.vectors; ++v) {
    std::vector<double> vector;
    double sum = 0.0, largest = 0.0;
    for (int64_t c = 0; c < coded.columns; ++c) {
      vector.push_back(number_at(inputs, v * coded.columns + c, asked.number));
      sum += std::fabs(vector.back()), largest = std::max(largest, std::fabs(vector.back()));
    }
    for (int64_t row = 0; row < coded.rows; ++row) {
      const double* weights = matrix.weights.data() + row * coded.columns;
      double expected = 0.0, reach = matrix.reach[static_cast<size_t>(row)];
      for (int64_t c = 0; c < coded.columns; ++c) expected += vector[static_cast<size_t>(c)] * weights[c];
      double limit = float32_limit * sum * reach + digits_limit[asked.digits] * std::sqrt(static_cast<double>(coded.columns)) * largest * reach;
      limit += rounding(asked.number) * (std::fabs(expected) + limit) + 1e-7;  // what is below the smallest half
      count.look(number_at(outputs, v * coded.rows + row, asked.number) - expected, limit, where);
    }
  }
  ++count.products;
}

void decode(const Kernels& kernels, const Matrix& matrix, Count& count) {
  const Coded& coded = matrix.coded;
  const int64_t first = coded.rows / 3, rows = coded.rows - first;
  for (const Number number : numbers) {
    Memory memory;
    uint8_t* outputs = memory.take<uint8_t>(rows * coded.columns * size_of(number));
    const std::string where = std::string(kernels.name) + " decodes " + matrix.name;
    begin(where);
    fewbits::decode(kernels, coded, first, coded.rows, outputs, number, 2);
    const int64_t bytes = rows * coded.columns * size_of(number);
    uint8_t* scalar = memory.take<uint8_t>(bytes);
    fewbits::decode(fewbits::find_kernels("scalar"), coded, first, coded.rows, scalar, number, 1);
    if (std::memcmp(outputs, scalar, static_cast<size_t>(bytes)) != 0) count.look(1.0, 0.0, where + ", otherwise than scalar does");
    for (int64_t i = 0; i < rows * coded.columns; ++i) {
      const int64_t row = first + i / coded.columns;
      const double expected = matrix.weights[static_cast<size_t>(first * coded.columns + i)], limit = 0x1p-22 * matrix.reach[static_cast<size_t>(row)];
      count.look(number_at(outputs, i, number) - expected, limit + rounding(number) * std::fabs(expected) + 1e-7, where);
    }
    ++count.decoded;
  }
}

void multiply_all(const Kernels& kernels, const Matrix& matrix, Random& random, Count& count) {
  const Number some = numbers[random.below(3)];
  multiply(kernels, matrix, {1, Number::f32, 3}, random, count);
  multiply(kernels, matrix, {1, some, 3}, random, count);
  multiply(kernels, matrix, {2 + random.below(8), some, 3}, random, count);
}

std::string named(const char* form, std::initializer_list<int64_t> sizes) {
  std::string name = form;
  for (const int64_t size : sizes) name += " " + std::to_string(size);
  return name;
}

void compare_grid(const Kernels& kernels, const Grid& grid, Random& random, Count& count) {
  Matrix matrix;
  make_packed(random, grid, matrix);
  matrix.name = named("grid", {grid.bits, grid.rows, grid.columns, grid.group, static_cast<int>(grid.scales), static_cast<int>(grid.zeros),
                               static_cast<int>(grid.levels), static_cast<int>(grid.number)});
  multiply_all(kernels, matrix, random, count);
  decode(kernels, matrix, count);
  if (grid.levels != Levels::none || grid.scales != Scales::numbers) return;
  for (int digits = 1; digits <= 2; ++digits) multiply(kernels, matrix, {random.maybe() ? 1 : 3, Number::f32, digits}, random, count);
}

// Every path of the lanes: whole rows, groups of many blocks, of parts of one, of neither, of single columns.
constexpr int64_t shapes[][2] = {{700, 700}, {1100, 512}, {390, 128}, {260, 64}, {260, 32}, {130, 16}, {94, 8}, {250, 24}, {70, 5}, {9, 4}, {3, 1}, {1, 1}};

void compare_packed(const Kernels& kernels, int bits, Random& random, Count& count) {
  constexpr Scales scales[] = {Scales::numbers, Scales::shared, Scales::table, Scales::two_level};
  constexpr Zeros zeros[] = {Zeros::none, Zeros::packed, Zeros::numbers, Zeros::shared, Zeros::two_level, Zeros::from_zero, Zeros::minimums, Zeros::two_level_minimums};
  constexpr Levels levels[] = {Levels::shared, Levels::rows, Levels::groups, Levels::runs};
  for (const auto& [columns, group] : shapes) {
    const auto rows = [&random] { return random.below(5) == 0 ? 70 : 1 + random.below(14); };
    for (const Zeros zero : zeros) compare_grid(kernels, {bits, rows(), columns, group, scales[random.below(4)], zero, Levels::none, numbers[random.below(3)]}, random, count);
    for (const Scales scale : scales) compare_grid(kernels, {bits, rows(), columns, group, scale, zeros[random.below(8)], Levels::none, Number::f16}, random, count);
    for (const Levels level : levels) {
      const Scales scale = random.maybe() ? Scales::none : Scales::numbers;
      compare_grid(kernels, {bits, rows(), columns, group, scale, Zeros::none, level, numbers[random.below(3)]}, random, count);
    }
    for (const Zeros zero : {Zeros::signs, Zeros::signs_and_numbers}) {
      if (bits == 1) compare_grid(kernels, {1, rows(), columns, group, Scales::numbers, zero, Levels::none, numbers[random.below(3)]}, random, count);
    }
  }
}

void compare_ternary(const Kernels& kernels, Random& random, Count& count) {
  for (const auto& [columns, group] : shapes) {
    for (const Scales scale : {Scales::none, Scales::numbers, Scales::shared, Scales::table}) {
      compare_grid(kernels, {fewbits::base_three, 1 + random.below(40), columns, group, scale, Zeros::none, Levels::none, Number::f16}, random, count);
    }
  }
}

void compare_others(const Kernels& kernels, Random& random, Count& count) {
  const auto compare = [&](Matrix& matrix, std::string name) {
    matrix.name = std::move(name);
    multiply_all(kernels, matrix, random, count);
  };
  for (const int64_t columns : {1, 7, 37, 300, 2500}) {
    for (const Number number : numbers) {
      const int64_t rows = 1 + random.below(40), rank = 1 + random.below(33);
      Matrix plain, narrow, wide, product;
      make_plain(random, rows, columns, number, plain);
      compare(plain, named("plain", {rows, columns, static_cast<int>(number)}));
      make_sparse(random, rows, columns, 2, number, narrow);
      compare(narrow, named("sparse", {rows, columns, 2, static_cast<int>(number)}));
      make_sparse(random, rows, columns, 4, number, wide);
      compare(wide, named("sparse", {rows, columns, 4, static_cast<int>(number)}));
      if (columns > 1000) continue;
      make_signed_product(random, rows, columns, rank, number, product);
      compare(product, named("signed product", {rows, columns, rank, static_cast<int>(number)}));
    }
  }
  for (int bits = 1; bits <= 8; ++bits) {
    Matrix mixed;
    const int64_t groups = 1 + random.below(9), group = 1 + random.below(40);
    make_mixed(random, 21, groups, group, bits, 1 + static_cast<int>(random.below(8)), mixed);
    compare(mixed, named("mixed", {21, groups, group, bits}));
  }
}

void compare_codewords(const Kernels& kernels, Random& random, Count& count) {
  for (int bits = 1; bits <= 12; ++bits) {
    for (const int64_t unit : {4, 8, 16}) {
      for (const bool transposed : {false, true}) {
        Matrix matrix;
        const Codewords shape{1 + random.below(50), 1 + random.below(90), unit, 1 + random.below(3), bits, transposed, numbers[random.below(3)]};
        make_codewords(random, shape, matrix);
        matrix.name = named("codewords", {shape.rows, shape.columns, unit, shape.books, bits, transposed, static_cast<int>(shape.number)});
        multiply_all(kernels, matrix, random, count);
      }
    }
  }
  for (const int64_t unit : {4, 8, 16}) {
    for (const bool transposed : {false, true}) {
      Matrix matrix;
      const int64_t across = 64 + random.below(300), along = 1 + random.below(300);
      make_codewords(random, {transposed ? along : across, transposed ? across : along, unit, 1 + random.below(4), 8, transposed, numbers[random.below(3)], true}, matrix);
      matrix.name = named("codewords in lines", {across, along, unit, matrix.coded.books, transposed});
      multiply_all(kernels, matrix, random, count);
    }
  }
}

}  // namespace

void compare_products(const fewbits::Kernels& kernels, Count& count) {
  for (int bits = 1; bits <= 8; ++bits) {
    Random random(static_cast<uint64_t>(bits));
    compare_packed(kernels, bits, random, count);
  }
  Random random(9);
  compare_ternary(kernels, random, count);
  compare_others(kernels, random, count);
  compare_codewords(kernels, random, count);
}

}  // namespace comparison

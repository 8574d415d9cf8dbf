// Random matrices of every form that kernels read, with the numbers that they stand for.
#pragma once
#include <list>
#include <string>

#include "memory.h"

namespace comparison {

using fewbits::Coded;
using fewbits::Values;

struct Matrix {
  Coded coded;
  std::vector<double> weights;  // [rows, columns]
  std::vector<double> reach;    // of a row: the largest that the parts of one weight are, each taken for itself
  std::string name;
  Memory memory;
  std::list<Coded> inner;
  std::list<Memory> kept;  // of the inner ones
  std::vector<int64_t> ends;
};

enum class Scales { none, numbers, small, shared, table, two_level };
enum class Zeros { none, packed, numbers, shared, two_level, signs, signs_and_numbers, from_zero, minimums, two_level_minimums };
enum class Levels { none, shared, rows, groups, runs };

struct Grid {
  int bits;
  int64_t rows, columns, group;  // as many columns, or more, are one group
  Scales scales;
  Zeros zeros;
  Levels levels;
  Number number;
};

void make_packed(Random& random, const Grid& grid, Matrix& matrix);
void make_plain(Random& random, int64_t rows, int64_t columns, Number number, Matrix& matrix);
void make_sparse(Random& random, int64_t rows, int64_t columns, int64_t index_bytes, Number number, Matrix& matrix);

struct Codewords {
  int64_t rows, columns, unit, books;
  int bits;
  bool transposed;
  Number number;
  bool lines = false;
};

void make_codewords(Random& random, const Codewords& shape, Matrix& matrix);
void make_signed_product(Random& random, int64_t rows, int64_t columns, int64_t rank, Number number, Matrix& matrix);
// Groups of `group` columns, some of `wide` bits.
void make_mixed(Random& random, int64_t rows, int64_t groups, int64_t group, int bits, int wide, Matrix& matrix);

}  // namespace comparison

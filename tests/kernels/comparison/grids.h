// The parts that matrices are made of: streams of codes, and tables of numbers beside them.
#pragma once
#include "matrices.h"

namespace comparison {

// Numbers of a table, and what they are.
struct Table {
  Values values;
  std::vector<double> numbers;  // [rows, columns]
  double of(int64_t row, int64_t column) const { return numbers[static_cast<size_t>((values.rows == 1 ? 0 : row) * values.columns + column)]; }
};

// Codes as little-endian streams, each row's from a byte on.
uint8_t* pack(const std::vector<int>& codes, int64_t rows, int64_t columns, int bits, Memory& memory);
// Codes of three values as the digits of bytes to the base of three; some bytes are 243 more, which means the same.
uint8_t* pack_trits(const std::vector<int>& codes, int64_t rows, int64_t columns, Memory& memory);
std::vector<int> random_codes(Random& random, int64_t count, int64_t below);

Table dense_table(Random& random, int64_t rows, int64_t columns, Number number, double low, double high, Memory& memory);
Table packed_table(Random& random, int64_t rows, int64_t columns, int bits, Memory& memory);
Table byte_table(Random& random, int64_t rows, int64_t columns, Memory& memory);
Table coded_table(Random& random, int64_t rows, int64_t columns, Matrix& owner);

}  // namespace comparison

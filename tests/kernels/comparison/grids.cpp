#include "grids.h"

#include <algorithm>

namespace comparison {

std::vector<int> random_codes(Random& random, int64_t count, int64_t below) {
  std::vector<int> codes(static_cast<size_t>(count));
  for (int& code : codes) code = static_cast<int>(random.below(below));
  return codes;
}

uint8_t* pack(const std::vector<int>& codes, int64_t rows, int64_t columns, int bits, Memory& memory) {
  const int64_t bytes = (columns * bits + 7) / 8;
  uint8_t* packed = memory.take<uint8_t>(rows * bytes);
  for (int64_t i = 0; i < rows * columns; ++i) {
    uint8_t* row = packed + i / columns * bytes;
    for (int64_t bit = 0; bit < bits; ++bit) {
      const int64_t at = i % columns * bits + bit;
      row[at / 8] = static_cast<uint8_t>(row[at / 8] | (codes[static_cast<size_t>(i)] >> bit & 1) << (at % 8));
    }
  }
  return packed;
}

uint8_t* pack_trits(const std::vector<int>& codes, int64_t rows, int64_t columns, Memory& memory) {
  constexpr int powers[] = {1, 3, 9, 27, 81};
  const int64_t bytes = (columns + 4) / 5;
  uint8_t* packed = memory.take<uint8_t>(rows * bytes);
  for (int64_t i = 0; i < rows * columns; ++i) {
    uint8_t& byte = packed[i / columns * bytes + i % columns / 5];
    byte = static_cast<uint8_t>(byte + codes[static_cast<size_t>(i)] * powers[i % columns % 5]);
  }
  for (int64_t at = 0; at < rows * bytes; at += 3) {
    if (packed[at] <= 12) packed[at] = static_cast<uint8_t>(packed[at] + 243);
  }
  return packed;
}

Table dense_table(Random& random, int64_t rows, int64_t columns, Number number, double low, double high, Memory& memory) {
  Table table;
  uint8_t* data = memory.take<uint8_t>(rows * columns * size_of(number));
  table.values.kind = Values::dense;
  table.values.number = number;
  table.values.data = data;
  table.values.rows = rows;
  table.values.columns = columns;
  for (int64_t i = 0; i < rows * columns; ++i) {
    put_number(data, i, number, random.between(low, high));
    table.numbers.push_back(number_at(data, i, number));
  }
  return table;
}

Table packed_table(Random& random, int64_t rows, int64_t columns, int bits, Memory& memory) {
  Table table;
  const std::vector<int> codes = random_codes(random, rows * columns, int64_t{1} << bits);
  table.values.kind = Values::packed;
  table.values.data = pack(codes, rows, columns, bits, memory);
  table.values.rows = rows;
  table.values.columns = columns;
  table.numbers.assign(codes.begin(), codes.end());
  return table;
}

Table byte_table(Random& random, int64_t rows, int64_t columns, Memory& memory) {
  Table table;
  float* lookup = memory.take<float>(256);
  for (int i = 0; i < 256; ++i) lookup[i] = static_cast<float>(random.between(0.1, 1.1));
  uint8_t* data = memory.take<uint8_t>(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    data[i] = static_cast<uint8_t>(random.below(256));
    table.numbers.push_back(lookup[data[i]]);
  }
  table.values.kind = Values::table;
  table.values.data = data;
  table.values.lookup = lookup;
  table.values.rows = rows;
  table.values.columns = columns;
  return table;
}

Table coded_table(Random& random, int64_t rows, int64_t columns, Matrix& owner) {
  Matrix second;
  make_packed(random, {6, rows, columns, std::min<int64_t>(columns, 5), Scales::small, Zeros::numbers, Levels::none, Number::f16}, second);
  owner.inner.push_back(second.coded);
  Table table;
  table.values.kind = Values::coded;
  table.values.inner = &owner.inner.back();
  table.values.rows = rows;
  table.values.columns = columns;
  table.numbers = second.weights;
  owner.kept.push_back(second.memory);
  return table;
}

}  // namespace comparison

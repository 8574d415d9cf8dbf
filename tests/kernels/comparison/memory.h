// Memory whose last byte is the last that may be read: a kernel that reads on ends the program. And random numbers, and numbers of 16 bits,
// written down here once more so that the kernels' own are compared with something.
#pragma once
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "matrix.h"

namespace comparison {

using fewbits::Number;

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  int64_t below(int64_t count) { return static_cast<int64_t>(bits_() % static_cast<uint64_t>(count)); }
  bool maybe() { return below(2) == 1; }
  double between(double low, double high) { return low + (high - low) * static_cast<double>(bits_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 bits_;
};

class Memory {
 public:
  // Room for `count` items, of zeros; at least one byte is asked for.
  template <typename Item>
  Item* take(int64_t count) {
    return reinterpret_cast<Item*>(take_bytes(count * static_cast<int64_t>(sizeof(Item))));
  }

 private:
  uint8_t* take_bytes(int64_t bytes);

  std::vector<std::shared_ptr<void>> pages_;
};

int64_t size_of(Number number);
double number_at(const void* data, int64_t at, Number number);
// The number nearest to 0 of those that `value` lies between.
void put_number(void* data, int64_t at, Number number, double value);
// What an output may be off by for its own rounding, relative to itself.
double rounding(Number number);

}  // namespace comparison

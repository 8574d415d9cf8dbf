#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace comparison {

uint8_t* Memory::take_bytes(int64_t bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page, all = whole + page;
  void* found = mmap(nullptr, static_cast<size_t>(all), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) throw std::runtime_error("there is no memory left");
  pages_.emplace_back(found, [all](void* at) { munmap(at, static_cast<size_t>(all)); });
  if (mprotect(static_cast<uint8_t*>(found) + whole, static_cast<size_t>(page), PROT_NONE) != 0) throw std::runtime_error("memory cannot be guarded");
  return static_cast<uint8_t*>(found) + whole - bytes;
}

int64_t size_of(Number number) { return number == Number::f32 ? 4 : 2; }

double number_at(const void* data, int64_t at, Number number) {
  if (number == Number::f32) return static_cast<const float*>(data)[at];
  const int bits = static_cast<const uint16_t*>(data)[at], sign = bits >> 15 ? -1 : 1;
  const int places = number == Number::f16 ? 10 : 7, bias = number == Number::f16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> places, mantissa = bits & ((1 << places) - 1);
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - places);
  return sign * std::ldexp((1 << places) + mantissa, exponent - bias - places);
}

void put_number(void* data, int64_t at, Number number, double value) {
  if (number == Number::f32) {
    static_cast<float*>(data)[at] = static_cast<float>(value);
    return;
  }
  const int places = number == Number::f16 ? 10 : 7, bias = number == Number::f16 ? 15 : 127;
  int exponent = 0;
  const double mantissa = std::frexp(std::fabs(value), &exponent);  // of 0.5 to 1
  int bits = 0;
  if (exponent - 1 + bias > 0) bits = ((exponent - 1 + bias) << places) | static_cast<int>((2 * mantissa - 1) * (1 << places));
  static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

double rounding(Number number) { return number == Number::f32 ? 0.0 : number == Number::f16 ? 0x1p-11 : 0x1p-8; }

}  // namespace comparison

// What norms and rotations do to vectors, for any type of number. Included after FEWBITS_ISA was defined.
#pragma once
#include <cmath>

#include "decoder_step.h"
#include "rounding.h"

namespace fewbits {
namespace FEWBITS_ISA {

template <typename Any>
static inline float mean_of_squares(Any type, const void* numbers, int64_t at, int64_t count) {
  float parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      const float value = read_number(type, numbers, at + i + lane);
      parts[lane] += value * value;
    }
  }
  double sum = 0;
  for (; i < count; ++i) sum += static_cast<double>(read_number(type, numbers, at + i)) * read_number(type, numbers, at + i);
  for (const float part : parts) sum += part;
  return static_cast<float>(sum / static_cast<double>(count));
}

// `norm.size` numbers from place `at` on of one array to the same place of another, which may be it.
template <typename Any>
static inline void normalize(Any type, const Norm& norm, const void* from, void* to, int64_t at) {
  const float factor = 1.0f / std::sqrt(mean_of_squares(type, from, at, norm.size) + norm.epsilon);
  for (int64_t i = 0; i < norm.size; ++i) {
    const float value = rounded(type, read_number(type, from, at + i) * factor);
    write_number(type, read_number(type, norm.weight, i) * value, to, at + i);
  }
}

// Turns the pairs of a head's channels, one of either half, by the angles of its position.
template <typename Any>
static inline void rotate_head(Any type, void* head, int64_t at, const void* cosine, const void* sine, int64_t angle, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; ++c) {
    const float low = read_number(type, head, at + c), high = read_number(type, head, at + half + c);
    const auto times = [&](float value, const void* factors, int64_t place) { return rounded(type, value * read_number(type, factors, angle + place)); };
    write_number(type, times(low, cosine, c) + times(-high, sine, c), head, at + c);
    write_number(type, times(high, cosine, half + c) + times(low, sine, half + c), head, at + half + c);
  }
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits

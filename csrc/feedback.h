// GPTQ's column loop on a uniform grid that stays the same for a run of columns. Included after an instruction set's lanes.h.
#pragma once
#include "feedback_job.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int64_t strip = feedback_rows;  // rows at a time, whose columns of a block stay in the first cache

// The nearest whole number, halves to even: beyond 2**23 there are no halves left, and what is far outside the grid is cut off before.
static inline float rounded(float value) {
  const float inside = value < -1e6f ? -1e6f : value > 1e6f ? 1e6f : value;
  return (inside + 12582912.0f) - 12582912.0f;
}

static void feed_back(const FeedBack& job, int64_t row, int64_t count) {
  float scale[strip], zero[strip], error[strip];
  for (int64_t r = 0; r < count; ++r) scale[r] = job.scales[row + r], zero[r] = job.zeros[row + r];
  for (int64_t j = job.first; j < job.last; ++j) {
    float* column = job.current + j * job.rows + row;
    uint8_t* codes = job.codes + j * job.rows + row;
    const float* upper = job.upper + j * job.columns;
    const float diagonal = upper[j];
    for (int64_t r = 0; r < count; ++r) {
      float code = rounded(column[r] / scale[r]) + zero[r];
      code = code < 0.0f ? 0.0f : code > job.largest ? job.largest : code;
      const float value = (code - zero[r]) * scale[r];
      error[r] = (column[r] - value) / diagonal;
      column[r] = value;
      codes[r] = static_cast<uint8_t>(code);
    }
    std::memcpy(job.errors + j * job.rows + row, error, static_cast<size_t>(count) * 4);
    for (int64_t k = j + 1; k < job.end; ++k) {
      const float share = upper[k];
      float* later = job.current + k * job.rows + row;
      if (count == strip) for (int64_t r = 0; r < strip; ++r) later[r] -= share * error[r];
      else for (int64_t r = 0; r < count; ++r) later[r] -= share * error[r];
    }
  }
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits

// GPTQ's column loop on a uniform grid that stays the same for a run of columns. Included after an instruction set's lanes.h.
#pragma once
#include "feedback_job.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int64_t strip = feedback_rows;  // rows at a time
constexpr int64_t together = 8;           // columns whose errors meet a later column at once

// The nearest whole number, halves to even: beyond 2**23 there are no halves left, and what is far outside the grid is cut off before.
static inline float rounded(float value) {
  const float inside = value < -1e6f ? -1e6f : value > 1e6f ? 1e6f : value;
  return (inside + 12582912.0f) - 12582912.0f;
}

// Column j is rounded; its error, over the factor's diagonal, is kept in `error` too.
static inline void round_column(const FeedBack& job, int64_t j, int64_t row, int64_t count, const float* scale, const float* zero, float* error) {
  float* column = job.current + j * job.rows + row;
  uint8_t* codes = job.codes + j * job.rows + row;
  const float diagonal = job.upper[j * job.columns + j];
  for (int64_t r = 0; r < count; ++r) {
    float code = rounded(column[r] / scale[r]) + zero[r];
    code = code < 0.0f ? 0.0f : code > job.largest ? job.largest : code;
    const float value = (code - zero[r]) * scale[r];
    error[r] = (column[r] - value) / diagonal;
    column[r] = value;
    codes[r] = static_cast<uint8_t>(code);
  }
  std::memcpy(job.errors + j * job.rows + row, error, static_cast<size_t>(count) * 4);
}

// Errors of columns from .. to are taken from column k, which passes through the registers once for all of them.
static inline void take_errors(const FeedBack& job, int64_t from, int64_t to, int64_t k, int64_t row, int64_t count, const float (*errors)[strip]) {
  float* later = job.current + k * job.rows + row;
  if (count < strip) {
    for (int64_t j = from; j < to; ++j)
      for (int64_t r = 0; r < count; ++r) later[r] -= job.upper[j * job.columns + k] * errors[j - from][r];
    return;
  }
  constexpr int64_t at_once = strip < 4 * lanes ? strip : 4 * lanes;
  for (int64_t r = 0; r < strip; r += at_once) {
    Floats held[at_once / lanes];
    for (int64_t i = 0; i < at_once / lanes; ++i) held[i] = load(later + r + i * lanes);
    for (int64_t j = from; j < to; ++j) {
      const Floats share = spread(-job.upper[j * job.columns + k]);
      for (int64_t i = 0; i < at_once / lanes; ++i) held[i] = multiply_add(share, load(errors[j - from] + r + i * lanes), held[i]);
    }
    for (int64_t i = 0; i < at_once / lanes; ++i) store(later + r + i * lanes, held[i]);
  }
}

static void feed_back(const FeedBack& job, int64_t row, int64_t count) {
  float scale[strip], zero[strip], errors[together][strip];
  for (int64_t r = 0; r < count; ++r) scale[r] = job.scales[row + r], zero[r] = job.zeros[row + r];
  for (int64_t from = job.first; from < job.last; from += together) {
    const int64_t to = from + together < job.last ? from + together : job.last;
    for (int64_t j = from; j < to; ++j) {
      round_column(job, j, row, count, scale, zero, errors[j - from]);
      for (int64_t k = j + 1; k < to; ++k) take_errors(job, j, j + 1, k, row, count, errors + (j - from));
    }
    for (int64_t k = to; k < job.end; ++k) take_errors(job, from, to, k, row, count, errors);
  }
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits

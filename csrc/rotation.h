// Rotations by Hadamard matrices in size * log(size) steps, in float32. Included after an instruction set's lanes.h.
#pragma once
#include <cmath>

#include "grid.h"
#include "rotation_job.h"

namespace fewbits {
namespace FEWBITS_ISA {

static void flip_signs(const uint8_t* signs, int64_t size, float* values) {
  for (int64_t i = 0; i < size; ++i) values[i] = signs[i / 8] >> (i % 8) & 1 ? -values[i] : values[i];
}

// Neighbours `step` apart become their sum and their difference, inside of a vector of lanes.
static void turn_inside(float* values, int64_t size, int step) {
  int32_t partner[lanes];
  float sign[lanes];
  for (int i = 0; i < lanes; ++i) {
    partner[i] = i ^ step;
    sign[i] = i & step ? -1.0f : 1.0f;
  }
  const Floats signs = load(sign);
  for (int64_t i = 0; i < size; i += lanes) store(values + i, multiply_add(load(values + i), signs, permute(values + i, partner)));
}

// The same for steps of whole vectors of lanes.
static void turn_across(float* values, int64_t size, int64_t step) {
  for (int64_t from = 0; from < size; from += 2 * step) {
    for (int64_t i = from; i < from + step; i += lanes) {
      const Floats first = load(values + i), second = load(values + i + step);
      store(values + i, add(first, second));
      store(values + i + step, multiply_add(second, spread(-1.0f), first));
    }
  }
}

// And for sizes that are no multiple of the lanes.
static void turn_one_by_one(float* values, int64_t size, int64_t step) {
  for (int64_t from = 0; from < size; from += 2 * step) {
    for (int64_t i = from; i < from + step; ++i) {
      const float first = values[i], second = values[i + step];
      values[i] = first + second;
      values[i + step] = first - second;
    }
  }
}

// `values [order, width]` times the seed from the left.
static void multiply_seed(const float* seed, const float* values, int64_t order, int64_t width, float* to) {
  for (int64_t i = 0; i < order; ++i) {
    float* row = to + i * width;
    for (int64_t c = 0; c < width; ++c) row[c] = seed[i * order] * values[c];
    for (int64_t j = 1; j < order; ++j) {
      const float factor = seed[i * order + j];
      const float* from = values + j * width;
      for (int64_t c = 0; c < width; ++c) row[c] += factor * from[c];
    }
  }
}

static void rotate(const Rotation& job, int64_t vector, float* scratch) {
  const int64_t size = job.size, power = size / job.order;
  float* values = scratch;
  read_numbers(job.inputs, vector * size, job.number, size, values);
  if (job.signs != nullptr && !job.signs_last) flip_signs(job.signs, size, values);
  for (int64_t step = 1; step < power; step *= 2) {
    if (size % lanes != 0) turn_one_by_one(values, size, step);
    else if (step < lanes) turn_inside(values, size, static_cast<int>(step));
    else turn_across(values, size, step);
  }
  if (job.order > 1) {
    multiply_seed(job.seed, values, job.order, power, scratch + size);
    values = scratch + size;
  }
  const float root = static_cast<float>(std::sqrt(static_cast<double>(size)));
  for (int64_t i = 0; i < size; ++i) values[i] /= root;
  if (job.signs != nullptr && job.signs_last) flip_signs(job.signs, size, values);
  for (int64_t i = 0; i < size; ++i) put_number(job.outputs, vector * size + i, job.number, values[i]);
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits

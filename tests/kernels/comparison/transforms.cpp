// Rotations by Hadamard matrices, the column loop of error feedback and sums of products of features, against sums of float64.
#include <algorithm>
#include <cmath>

#include "compare.h"
#include "feedback_job.h"
#include "gram_job.h"
#include "memory.h"

namespace comparison {

namespace {

struct Turn {
  int64_t order, power, vectors;
  bool signs, last;
  Number number;
};

void rotate(const fewbits::Kernels& kernels, const Turn& turn, Random& random, Count& count) {
  const int64_t size = turn.order * turn.power;
  Memory memory;
  fewbits::Rotation job{};
  uint8_t* inputs = memory.take<uint8_t>(turn.vectors * size * size_of(turn.number));
  uint8_t* outputs = memory.take<uint8_t>(turn.vectors * size * size_of(turn.number));
  uint8_t* signs = memory.take<uint8_t>((size + 7) / 8);
  float* seed = memory.take<float>(turn.order * turn.order);
  for (int64_t i = 0; i < turn.vectors * size; ++i) put_number(inputs, i, turn.number, random.between(-1, 1));
  for (int64_t i = 0; i < (size + 7) / 8; ++i) signs[i] = static_cast<uint8_t>(random.below(256));
  for (int64_t i = 0; i < turn.order * turn.order; ++i) seed[i] = turn.order == 1 || random.maybe() ? 1.0f : -1.0f;
  job.inputs = inputs, job.outputs = outputs, job.vectors = turn.vectors, job.size = size, job.number = turn.number;
  job.signs = turn.signs ? signs : nullptr, job.signs_last = turn.last;
  job.order = turn.order, job.seed = turn.order > 1 ? seed : nullptr;
  begin(std::string(kernels.name) + " rotates " + std::to_string(size));
  fewbits::rotate(kernels, job, 2);
  const auto sign_of = [&](int64_t i) { return turn.signs && (signs[i / 8] >> (i % 8) & 1) ? -1.0 : 1.0; };
  for (int64_t v = 0; v < turn.vectors; ++v) {
    for (int64_t i = 0; i < size; ++i) {
      double expected = 0.0, reach = 0.0;
      for (int64_t j = 0; j < size; ++j) {
        const double input = number_at(inputs, v * size + j, turn.number) * (turn.last ? 1.0 : sign_of(j));
        const bool minus = __builtin_parityll(static_cast<uint64_t>(i % turn.power & j % turn.power)) != 0;
        expected += input * seed[i / turn.power * turn.order + j / turn.power] * (minus ? -1.0 : 1.0);
        reach += std::fabs(input);
      }
      expected *= (turn.last ? sign_of(i) : 1.0) / std::sqrt(static_cast<double>(size));
      const double limit = 1e-6 * reach / std::sqrt(static_cast<double>(size)) + rounding(turn.number) * std::fabs(expected) + 1e-7;
      count.look(number_at(outputs, v * size + i, turn.number) - expected, limit, std::string(kernels.name) + " rotates " + std::to_string(size));
    }
  }
  ++count.rotated;
}

// One column: what a row becomes, from the errors that the kernel itself tells of the columns before.
void compare_column(const fewbits::FeedBack& job, const std::vector<float>& before, int64_t j, const std::string& name, Count& count) {
  for (int64_t row = 0; row < job.rows; ++row) {
    const double scale = job.scales[row], zero = job.zeros[row], diagonal = job.upper[j * job.columns + j];
    double value = before[static_cast<size_t>(j * job.rows + row)], reach = std::fabs(value);
    for (int64_t k = job.first; k < std::min(j, job.last); ++k) {
      const double part = static_cast<double>(job.upper[k * job.columns + j]) * job.errors[k * job.rows + row];
      value -= part, reach += std::fabs(part);
    }
    const double limit = 1e-6 * reach, now = job.current[j * job.rows + row];
    if (j >= job.last) {
      count.look(now - value, limit, name + " moves errors");
      continue;
    }
    const double code = job.codes[j * job.rows + row], rounded = (code - zero) * scale;
    const double nearest = std::min(std::max(std::nearbyint(value / scale) + zero, 0.0), static_cast<double>(job.largest));
    const double farther = std::fabs(value - rounded) - std::fabs(value - (nearest - zero) * scale);  // than the nearest of the grid
    count.look(farther, 2 * limit, name + " rounds to a code");
    count.look(now - rounded, 1e-6 * (std::fabs(code) + std::fabs(zero)) * scale, name + " keeps what it rounded to");
    count.look(job.errors[j * job.rows + row] - (value - rounded) / diagonal, 2 * (limit + 1e-6 * std::fabs(rounded)) / diagonal, name + " tells errors");
  }
}

}  // namespace

void compare_rotations(const fewbits::Kernels& kernels, Count& count) {
  Random random(31);
  for (const int64_t order : {1, 3, 12}) {
    for (const int64_t power : {1, 2, 4, 8, 16, 64, 256}) {
      for (const Number number : {Number::f32, Number::f16, Number::bf16}) {
        rotate(kernels, {order, power, 1 + random.below(3), random.maybe(), random.maybe(), number}, random, count);
      }
    }
  }
}

void compare_feedback(const fewbits::Kernels& kernels, Count& count) {
  Random random(37);
  for (const int64_t rows : {1, 5, 31, 32, 70}) {
    for (const int bits : {1, 2, 3, 4, 8}) {
      const int64_t columns = 40, first = random.below(8), last = first + 1 + random.below(16), end = last + random.below(columns - last + 1);
      Memory memory;
      std::vector<float> before;
      float *current = memory.take<float>(rows * columns), *errors = memory.take<float>(rows * columns), *upper = memory.take<float>(columns * columns);
      float *scales = memory.take<float>(rows), *zeros = memory.take<float>(rows);
      uint8_t* codes = memory.take<uint8_t>(rows * columns);
      for (int64_t i = 0; i < rows * columns; ++i) before.push_back(current[i] = static_cast<float>(random.between(-1, 1)));
      for (int64_t i = 0; i < columns * columns; ++i) upper[i] = static_cast<float>(i / columns == i % columns ? random.between(0.5, 2) : random.between(-0.2, 0.2));
      for (int64_t row = 0; row < rows; ++row) {
        scales[row] = static_cast<float>(random.between(1.5, 2.5) / (1 << bits));
        zeros[row] = static_cast<float>(random.below(int64_t{1} << bits));
      }
      const fewbits::FeedBack job{current, errors, codes, upper, scales, zeros, rows, columns, first, last, end, static_cast<float>((1 << bits) - 1)};
      begin(std::string(kernels.name) + " feeds errors back");
      fewbits::feed_back(kernels, job, 2);
      for (int64_t j = first; j < end; ++j) compare_column(job, before, j, kernels.name, count);
      for (int64_t i = end * rows; i < columns * rows; ++i) count.look(current[i] - before[static_cast<size_t>(i)], 0.0, "a column behind the end");
      ++count.fed_back;
    }
  }
}

void compare_sums_of_products(const fewbits::Kernels& kernels, Count& count) {
  Random random(41);
  for (const Number number : {Number::f32, Number::bf16}) {
    for (const int64_t features : {1, 7, 32, 70, 300}) {
      const int64_t tokens = features == 70 ? 2100 : 1 + random.below(300);
      Memory memory;
      uint8_t* inputs = memory.take<uint8_t>(tokens * features * size_of(number));
      float* sums = memory.take<float>(features * features);
      for (int64_t i = 0; i < tokens * features; ++i) put_number(inputs, i, number, random.between(-1, 1));
      for (int64_t i = 0; i < features * features; ++i) sums[i] = static_cast<float>(i % 5);
      const std::string name = std::string(kernels.name) + " sums " + std::to_string(features) + " features";
      begin(name);
      if (!fewbits::add_products(kernels, {inputs, sums, tokens, features, number}, 2)) continue;
      for (int64_t i = 0; i < features; ++i) {
        for (int64_t j = i; j < features; ++j) {
          double expected = static_cast<double>((i * features + j) % 5), reach = expected;
          for (int64_t t = 0; t < tokens; ++t) {
            const double part = number_at(inputs, t * features + i, number) * number_at(inputs, t * features + j, number);
            expected += part, reach += std::fabs(part);
          }
          count.look(sums[i * features + j] - expected, 1e-6 * reach, name);
        }
      }
      ++count.summed;
    }
  }
}

}  // namespace comparison

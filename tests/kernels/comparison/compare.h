// What is compared, for one instruction set each; a difference above a limit is told, and the program ends with 1.
#pragma once
#include <string>

#include "runtime.h"

namespace comparison {

// Of what is computed next, should the program end in it.
void begin(const std::string& where);

// What has been looked at, and what was wrong.
struct Count {
  int64_t products = 0, decoded = 0, attended = 0, rotated = 0, fed_back = 0, summed = 0, wrong = 0;
  double closest = 0.0;  // of all: the largest part of its limit that a difference took
  // Says so where a difference is above its limit, or is no number.
  void look(double difference, double limit, const std::string& where);
};

void compare_products(const fewbits::Kernels& kernels, Count& count);
void compare_attention(const std::string& isa, Count& count);
void compare_rotations(const fewbits::Kernels& kernels, Count& count);
void compare_feedback(const fewbits::Kernels& kernels, Count& count);
void compare_sums_of_products(const fewbits::Kernels& kernels, Count& count);

}  // namespace comparison

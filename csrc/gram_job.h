// Sums of products of features' pairs. No torch, no Python.
#pragma once
#include <cstdint>

#include "matrix.h"

namespace fewbits {

// sums += inputs^T inputs on and above the diagonal; some of what lies below it is written over.
struct Gram {
  const void* inputs;  // [tokens, features], of float32 or bfloat16
  float* sums;         // [features, features]
  int64_t tokens, features;
  Number number;
};

// What an instruction set offers for one type of inputs, which are laid out anew, block by block of tokens. Groups are of features.
struct GramKernels {
  int64_t block_tokens, group_features;
  int64_t most_tokens;  // that are laid out at a time: whole blocks
  int64_t (*prepared_words)(const Gram&);
  void (*prepare)(const Gram&, int64_t block, uint32_t* room);
  void (*add)(const Gram&, const uint32_t* prepared, int64_t group);  // products of a group's features with each other and with all that follow
};

// Blocks and groups divided among threads: results do not depend on how many there are. False, and nothing done, where the instruction
// set has no kernel for such inputs.
bool add_products(const Kernels& kernels, const Gram& job, int threads);

}  // namespace fewbits

// Rotations by Hadamard matrices, and numbers in another order. No torch, no Python.
#pragma once
#include <cstdint>

#include "matrix.h"

namespace fewbits {

// y = H D x / sqrt(size), or its transpose D H^T x / sqrt(size), for every vector: D are signs, a set bit is -1, H is the Kronecker product
// of `seed [order, order]` and Sylvester's matrix of size / order.
struct Rotation {
  const void* inputs;  // [vectors, size], of type `number`
  void* outputs;
  int64_t vectors, size;
  Number number;
  const uint8_t* signs;  // of `size` features, or nullptr
  const float* seed;     // as it is to be multiplied with, or nullptr where the order is 1
  int64_t order;
  bool signs_last;
};

// outputs[v, i] = inputs[v, order[i]], `item` bytes each.
struct Reordering {
  const uint8_t* order;  // packed indices of `bits`, a little-endian stream of `bytes`
  int64_t bytes, bits;
  const void* inputs;
  void* outputs;
  int64_t vectors, features, item;
};

// outputs[b, c, r] = inputs[b, r, c], `item` bytes each: 1, 2 or 4.
struct Transposition {
  const void* inputs;
  void* outputs;
  int64_t blocks, rows, columns, item;
};

}  // namespace fewbits

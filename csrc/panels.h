// Products with many vectors: a panel of rows is taken out of its codes once and multiplied with all vectors.
#pragma once
#include "matrix.h"

namespace fewbits {

constexpr int64_t panel_rows = 32;  // two registers of 16 lanes, a row a lane

// What an instruction set offers for one type of inputs. Sizes are in bytes; memory is aligned to 64.
struct Panels {
  int64_t tile;   // vectors that are laid out, and multiplied, together
  int64_t rows;   // of a task
  int64_t (*few_vectors)(const Product&);  // up to which codes are read as they lie in less time
  int64_t (*prepared_bytes)(const Product&);
  void (*prepare)(const Product&, int64_t tile, uint8_t* room);
  int64_t (*scratch_bytes)(const Product&, int64_t tiles);
  // The rows of a task from `row` on, with the vectors of the tiles first to last.
  void (*multiply)(const Product&, const uint8_t* prepared, int64_t row, int64_t first, int64_t last, uint8_t* scratch);
};

// Panels divided among threads. False, and nothing done, where the instruction set has none for such a product, or for so few vectors.
bool multiply_in_panels(const Kernels& kernels, const Product& product, int threads);

// Whether there are panels for matrices of codes and inputs of this type: products of any number of vectors need no decoded weights then.
bool takes_many(const Kernels& kernels, Number number);

}  // namespace fewbits

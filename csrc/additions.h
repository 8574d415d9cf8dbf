// What is added to a matrix of codes: few entries in compressed sparse rows, and the thin factors of a low-rank term.
#pragma once
#include "sparse_rows.h"
#include "thin.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace additions {

static int64_t prepared_floats(const Product& product) {
  return product.matrix->form == Coded::sparse ? sparse_rows::prepared_floats(product) : thin::prepared_floats(product);
}

static void prepare(const Product& product, int64_t vector, float* room) {
  if (vector >= product.vectors) return;
  if (product.matrix->form == Coded::sparse) return sparse_rows::prepare(product, vector, room);
  thin::prepare(product, vector, room);
}

static int64_t scratch_floats(const Coded& w) { return w.form == Coded::sparse ? sparse_rows::scratch_floats() : thin::scratch_floats(w); }

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  if (product.matrix->form == Coded::sparse) return sparse_rows::multiply(product, prepared, first, last, scratch);
  thin::multiply(product, prepared, first, last, scratch);
}

}  // namespace additions
}  // namespace FEWBITS_ISA
}  // namespace fewbits

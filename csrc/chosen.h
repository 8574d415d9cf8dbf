// What an instruction set offers: codes in fixed point where that serves, in floats elsewhere, and the other forms of matrices.
// Included once by each instruction set, after its lanes.h.
#pragma once
#include "additions.h"
#include "feedback.h"
#include "kernels.h"
#include "mixed_groups.h"
#include "rotation.h"
#include "signed_product.h"
#include "vectors.h"
#ifdef FEWBITS_FIXED
#include "fixed.h"
#include "ternary.h"
#endif

namespace fewbits {
namespace FEWBITS_ISA {
namespace chosen {

static int64_t prepared_floats(const Product& product) {
  const Coded& w = *product.matrix;
  if (w.form == Coded::vectors) return vectors::prepared_floats(product);
  if (w.form == Coded::signed_product) return signed_product::prepared_floats(product);
  if (w.form == Coded::mixed) return mixed_groups::prepared_floats(product);
  if (w.form != Coded::packed) return additions::prepared_floats(product);
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) return ternary::prepared_floats(w, ternary::make_plan(w, product.vectors, product.digits));
  fixed::Plan plan;
  if (fixed::make_plan(w, product.vectors, product.digits, plan)) return fixed::prepared_floats(w, plan);
#endif
  return FEWBITS_ISA::prepared_floats(product);
}

static void prepare(const Product& product, int64_t vector, float* room) {
  const Coded& w = *product.matrix;
  if (w.form == Coded::vectors) return vectors::prepare(product, vector, room);
  if (w.form == Coded::signed_product) return signed_product::prepare(product, vector, room);
  if (w.form == Coded::mixed) return mixed_groups::prepare(product, vector, room);
  if (w.form != Coded::packed) return additions::prepare(product, vector, room);
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) return ternary::prepare(product, ternary::make_plan(w, product.vectors, product.digits), vector, room);
  fixed::Plan plan;
  if (fixed::make_plan(w, product.vectors, product.digits, plan)) return fixed::prepare(product, plan, vector, room);
#endif
  FEWBITS_ISA::prepare(product, vector, room);
}

// For products and for decoding.
static int64_t scratch_floats(const Coded& w, int64_t vectors) {
  if (w.form == Coded::vectors) return vectors::scratch_floats(w);
  if (w.form == Coded::signed_product) return signed_product::scratch_floats(w, vectors);
  if (w.form == Coded::mixed) return mixed_groups::scratch_floats(w);
  if (w.form != Coded::packed) return additions::scratch_floats(w);
  const int64_t floats = FEWBITS_ISA::scratch_floats(w, vectors);
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) return floats + ternary::scratch_floats(w);
  fixed::Plan plan;
  if (fixed::make_plan(w, vectors, 3, plan)) return floats + fixed::scratch_floats(w, plan);
#endif
  return floats;
}

static void multiply(const Product& product, const float* prepared, int64_t first, int64_t last, float* scratch) {
  const Coded& w = *product.matrix;
  if (w.form == Coded::vectors) return vectors::multiply(product, prepared, first, last, scratch);
  if (w.form == Coded::signed_product) return signed_product::multiply(product, prepared, first, last, scratch);
  if (w.form == Coded::mixed) return mixed_groups::multiply(product, prepared, first, last, scratch);
  if (w.form != Coded::packed) return additions::multiply(product, prepared, first, last, scratch);
#ifdef FEWBITS_FIXED
  if (ternary::serves(w)) {
    return ternary::multiply(product, ternary::make_plan(w, product.vectors, product.digits), prepared, first, last, scratch);
  }
  fixed::Plan plan;
  if (fixed::make_plan(w, product.vectors, product.digits, plan)) return fixed::multiply(product, plan, prepared, first, last, scratch);
#endif
  FEWBITS_ISA::multiply(product, prepared, first, last, scratch);
}

}  // namespace chosen

constexpr Kernels make_kernels(const char* name, const Panels* (*panels)(const Product&) = nullptr) {
  return {name, chosen::prepared_floats, chosen::prepare, padded_vectors, chosen::scratch_floats, chosen::multiply, decode, feed_back, rotate, panels};
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits

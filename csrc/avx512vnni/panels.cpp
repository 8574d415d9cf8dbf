#define FEWBITS_ISA avx512vnni
#include <cpuid.h>

#include "../avx512/lanes.h"

#include "../avx512/panels.h"
#include "byte_panels.h"

namespace fewbits {

const Panels& avx512bf16_panels();

namespace {

// Whether the processor multiplies tiles of bfloat16 in one instruction. Torch does so, and no kernel here.
bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned tiles_of_bf16 = 1u << 22;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & tiles_of_bf16) != 0;
}

// For inputs of bfloat16.
const Panels* find_halves(const Panels* others) {
  if (has_tiles()) return nullptr;
#ifdef FEWBITS_AVX512BF16
  if (__builtin_cpu_supports("avx512bf16")) return &avx512bf16_panels();
#endif
  return others;
}

}  // namespace

const Panels* avx512vnni_panels(const Product& product) {
  static constexpr Panels made = avx512vnni::panels::make_panels<avx512vnni::panels::Floats32>();
  if (product.matrix->form != Coded::packed) return nullptr;
  static constexpr Panels bytes = avx512vnni::byte_panels::make_panels();
  if (product.digits == 1 && avx512vnni::byte_panels::serves(*product.matrix)) return &bytes;
  static const Panels* halves = find_halves(&made);
  if (product.number == Number::bf16) return halves;
  return &made;
}

}  // namespace fewbits

// Panels of bfloat16 for processors that multiply them; with those, `avx512vnni` takes products of many such vectors.
#define FEWBITS_ISA avx512bf16
#include "../avx512/lanes.h"

#include "../avx512/panels.h"

namespace fewbits {
const Panels& avx512bf16_panels() {
  static constexpr Panels made = avx512bf16::panels::make_panels<avx512bf16::panels::Pairs>();
  return made;
}
}  // namespace fewbits

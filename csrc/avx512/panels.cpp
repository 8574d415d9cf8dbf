#define FEWBITS_ISA avx512
#include "lanes.h"

#ifdef __AVX512BW__
#include "panels.h"
#else
#include "../panels.h"
#endif

namespace fewbits {
const Panels* avx512_panels(const Product& product) {
#ifdef __AVX512BW__
  static constexpr Panels made = avx512::panels::make_panels<avx512::panels::Floats32>();
  return product.matrix->form == Coded::packed ? &made : nullptr;
#else
  (void)product;
  return nullptr;
#endif
}
}  // namespace fewbits

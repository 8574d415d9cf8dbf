#define FEWBITS_ISA avx512
#include "lanes.h"

#include "../chosen.h"

namespace fewbits {
const Panels* avx512_panels(const Product&);

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = avx512::make_kernels("avx512", avx512_panels);
  return kernels;
}
}  // namespace fewbits

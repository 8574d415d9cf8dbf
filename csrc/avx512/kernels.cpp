#define FEWBITS_ISA avx512
#include "lanes.h"

#include "../chosen.h"

namespace fewbits {
const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = avx512::make_kernels("avx512");
  return kernels;
}
}  // namespace fewbits

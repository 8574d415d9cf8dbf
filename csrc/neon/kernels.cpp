#define FEWBITS_ISA neon
#include "lanes.h"

#include "../chosen.h"

namespace fewbits {
const Kernels& neon_kernels() {
  static constexpr Kernels kernels = neon::make_kernels("neon");
  return kernels;
}
}  // namespace fewbits

#define FEWBITS_ISA neon
#define FEWBITS_LANES 4
#include "lanes.h"

#include "../attention_kernels.h"

namespace fewbits {
const AttentionKernels& neon_attention() {
  static constexpr AttentionKernels kernels = neon::attention::make_kernels();
  return kernels;
}
}  // namespace fewbits

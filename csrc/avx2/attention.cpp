#define FEWBITS_ISA avx2
#define FEWBITS_LANES 8
#include "lanes.h"

#include "../attention_kernels.h"

namespace fewbits {
const AttentionKernels& avx2_attention() {
  static constexpr AttentionKernels kernels = avx2::attention::make_kernels();
  return kernels;
}
}  // namespace fewbits

#define FEWBITS_ISA avx512
#define FEWBITS_LANES 16
#include "lanes.h"

#include "../attention_kernels.h"

namespace fewbits {
const AttentionKernels& avx512_attention() {
  static constexpr AttentionKernels kernels = avx512::attention::make_kernels();
  return kernels;
}
}  // namespace fewbits

#define FEWBITS_ISA scalar
#define FEWBITS_LANES 4
#include "lanes.h"

#include "../attention_kernels.h"

namespace fewbits {
const AttentionKernels& scalar_attention() {
  static constexpr AttentionKernels kernels = scalar::attention::make_kernels();
  return kernels;
}
}  // namespace fewbits

#define FEWBITS_ISA avx2
#include "lanes.h"

#include "bytes.h"
#include "trits.h"
#define FEWBITS_FIXED
#define FEWBITS_LINES "avx2/lines.h"

#include "../chosen.h"

namespace fewbits {
const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = avx2::make_kernels("avx2");
  return kernels;
}
}  // namespace fewbits

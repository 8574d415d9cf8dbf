#define FEWBITS_ISA neondot
#include "../neon/lanes.h"

#include "bytes.h"
#include "trits.h"
#define FEWBITS_FIXED

#include "../chosen.h"

namespace fewbits {
const Kernels& neondot_kernels() {
  static constexpr Kernels kernels = neondot::make_kernels("neondot");
  return kernels;
}
}  // namespace fewbits

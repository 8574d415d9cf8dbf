#include "gram_job.h"

#include <algorithm>
#include <memory>

#include "threads.h"

namespace fewbits {
namespace {

struct Job {
  const GramKernels& kernels;
  Gram part;  // as many tokens as are laid out at a time
  uint32_t* room;
};

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool add_products(const Kernels& kernels, const Gram& gram, int threads) {
  const GramKernels* found = kernels.gram(gram.number);
  if (found == nullptr) return false;
  threads = std::max(threads, 1);
  Job job{*found, gram, nullptr};
  job.part.tokens = std::min(gram.tokens, found->most_tokens);
  const std::unique_ptr<uint32_t[]> room(new uint32_t[static_cast<size_t>(found->prepared_words(job.part))]);
  job.room = room.get();
  for (int64_t token = 0; token < gram.tokens; token += found->most_tokens) {
    job.part.inputs = static_cast<const uint8_t*>(gram.inputs) + token * gram.features * (gram.number == Number::f32 ? 4 : 2);
    job.part.tokens = std::min(gram.tokens - token, found->most_tokens);
    const auto prepare = [](void* context, int64_t block, int) {
      const Job& job = *static_cast<Job*>(context);
      job.kernels.prepare(job.part, block, job.room);
    };
    run_tasks(threads, ceiling(job.part.tokens, found->block_tokens), prepare, &job);
    const auto add = [](void* context, int64_t group, int) {
      const Job& job = *static_cast<Job*>(context);
      job.kernels.add(job.part, job.room, group);
    };
    run_tasks(threads, ceiling(gram.features, found->group_features), add, &job);
  }
  return true;
}

}  // namespace fewbits

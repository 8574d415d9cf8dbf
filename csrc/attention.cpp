#include "attention.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>

#include "runtime.h"
#include "threads.h"

namespace fewbits {

const AttentionKernels& scalar_attention();
const AttentionKernels& avx2_attention();
const AttentionKernels& avx512_attention();
const AttentionKernels& neon_attention();

const AttentionKernels& find_attention(const std::string& isa) {
  find_kernels(isa);  // raises where this machine has no such instructions
#if defined(FEWBITS_AVX512)
  if (isa.compare(0, 6, "avx512") == 0) return avx512_attention();
#endif
#if defined(FEWBITS_AVX2)
  if (isa == "avx2") return avx2_attention();
#endif
#if defined(FEWBITS_NEON)
  if (isa.compare(0, 4, "neon") == 0) return neon_attention();
#endif
  return scalar_attention();
}

namespace {

std::vector<Piece> cut(const Attention& attention) {
  std::vector<Piece> pieces;
  for (int64_t sequence = 0; sequence < attention.sequences; ++sequence) {
    int64_t first = 0;
    for (const Segment& keys : attention.keys[static_cast<size_t>(sequence)]) {
      for (int64_t at = 0; at < keys.tokens; at += piece_tokens) pieces.push_back({sequence, &keys, first + at, at, std::min(piece_tokens, keys.tokens - at)});
      first += keys.tokens;
    }
  }
  return pieces;
}

struct Job {
  const Attention& attention;
  const AttentionKernels& kernels;
  const std::vector<Piece>& pieces;
  float* partials;
  int64_t partial_each;
  float* scratch;
  int64_t scratch_each;
};

thread_local std::vector<float> kept;  // from one layer's call to the next, so that nothing is asked of the system

float* room(int64_t floats) {
  if (static_cast<int64_t>(kept.size()) < floats + 16) kept = std::vector<float>(static_cast<size_t>(floats + 16));
  return kept.data() + (64 - reinterpret_cast<uintptr_t>(kept.data()) % 64) % 64 / 4;
}

}  // namespace

void attend(const std::string& isa, const Attention& attention, int threads) {
  const AttentionKernels& kernels = find_attention(isa);
  const std::vector<Piece> pieces = cut(attention);
  const auto lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  const int64_t partial = lines(attention.heads * attention.rows() * (2 + attention.width)), each = lines(kernels.scratch_floats(attention));
  const int64_t count = static_cast<int64_t>(pieces.size());
  threads = std::max(threads, 1);
  float* memory = room(partial * count + each * threads);
  Job job{attention, kernels, pieces, memory, partial, memory + partial * count, each};
  const auto work = [](void* context, int64_t task, int worker) {
    const Job& job = *static_cast<Job*>(context);
    job.kernels.attend(job.attention, job.pieces[static_cast<size_t>(task)], job.partials + task * job.partial_each, job.scratch + worker * job.scratch_each);
  };
  run_tasks(threads, count, work, &job);
  const auto merge = [](void* context, int64_t task, int) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t sequence = task / job.attention.heads, head = task % job.attention.heads;
    const auto mine = [sequence](const Piece& piece) { return piece.sequence == sequence; };
    const auto first = std::find_if(job.pieces.begin(), job.pieces.end(), mine);
    const int64_t at = first - job.pieces.begin(), held = std::count_if(first, job.pieces.end(), mine);
    job.kernels.merge(job.attention, sequence, head, job.partials + at * job.partial_each, job.partial_each, held);
  };
  run_tasks(count < 64 ? 1 : threads, attention.sequences * attention.heads, merge, &job);
}

}  // namespace fewbits

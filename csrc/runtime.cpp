#include "runtime.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#endif
#if defined(FEWBITS_NEONDOT)
#include <sys/auxv.h>
#endif

#include "feedback_job.h"
#include "room.h"
#include "sum.h"
#include "threads.h"

namespace fewbits {

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512vnni_kernels();
const Kernels& neon_kernels();
const Kernels& neondot_kernels();

namespace {

std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> found;
#if defined(FEWBITS_AVX512) && defined(FEWBITS_AVX512_ANYWHERE)
  found.push_back(&avx512_kernels());
#elif defined(FEWBITS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(FEWBITS_AVX512VNNI)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) found.push_back(&avx512vnni_kernels());
#endif
    found.push_back(&avx512_kernels());
  }
#endif
#if defined(FEWBITS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_kernels());
#endif
#if defined(FEWBITS_NEONDOT)
  constexpr unsigned long dot_products = 1ul << 20;  // how Linux tells of them
  if ((getauxval(AT_HWCAP) & dot_products) != 0) found.push_back(&neondot_kernels());
#endif
#if defined(FEWBITS_NEON)  // every processor that is compiled for has it
  found.push_back(&neon_kernels());
#endif
  found.push_back(&scalar_kernels());
  return found;
}

constexpr int64_t part = 1 << 18;  // bytes that a thread reads at a time
typedef uint64_t Line __attribute__((vector_size(64)));

thread_local Room scratch_room;

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> found = find_available();
  return found;
}

const Kernels& find_kernels(const std::string& name) {
  for (const Kernels* kernels : available_kernels()) {
    if (name == kernels->name) return *kernels;
  }
  throw std::invalid_argument("instruction set " + name + " is not available");
}

void multiply(const Kernels& kernels, const Product& product, int threads) {
  Sum sum;
  sum.terms.push_back({product.matrix});
  sum.rows = product.matrix->rows;
  sum.columns = product.matrix->columns;
  multiply_sums(kernels, {sum}, product.inputs, {product.outputs}, product.vectors, product.number, threads, product.digits);
}

void decode(const Kernels& kernels, const Coded& matrix, int64_t first, int64_t last, void* out, Number number, int threads) {
  struct Job {
    const Kernels& kernels;
    const Coded& matrix;
    int64_t first, last;
    uint8_t* out;
    Number number;
    float* scratch;
    int64_t scratch_each;
  };
  if (first >= last) return;
  threads = std::max(threads, 1);
  const int64_t each = whole_lines(kernels.scratch_floats(matrix, 1));
  Job job{kernels, matrix, first, last, static_cast<uint8_t*>(out), number, scratch_room.floats(each * threads), each};
  const auto work = [](void* context, int64_t task, int worker) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t from = job.first + task * chunk_rows, to = std::min(from + chunk_rows, job.last);
    const int64_t size = job.number == Number::f32 ? 4 : 2;
    job.kernels.decode(job.matrix, from, to, job.out + (from - job.first) * job.matrix.columns * size, job.number, job.scratch + worker * job.scratch_each);
  };
  run_tasks(threads, (last - first + chunk_rows - 1) / chunk_rows, work, &job);
}

void feed_back(const Kernels& kernels, const FeedBack& given, int threads) {
  struct Job {
    const Kernels& kernels;
    const FeedBack& given;
  };
  Job job{kernels, given};
  const auto work = [](void* context, int64_t task, int) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t row = task * feedback_rows;
    job.kernels.feed_back(job.given, row, std::min(feedback_rows, job.given.rows - row));
  };
  run_tasks(std::max(threads, 1), (given.rows + feedback_rows - 1) / feedback_rows, work, &job);
}

uint64_t read_pass(const void* data, int64_t bytes, int threads) {
  struct Job {
    const uint8_t* data;
    int64_t bytes;
    std::vector<uint64_t> found;
  };
  const int64_t tasks = (bytes + part - 1) / part;
  Job job{static_cast<const uint8_t*>(data), bytes, std::vector<uint64_t>(static_cast<size_t>(tasks))};
  const auto work = [](void* context, int64_t task, int) {
    Job& job = *static_cast<Job*>(context);
    const uint8_t* from = job.data + task * part;
    Line mixed[2] = {};  // more would not stay in the registers that every processor has
    for (int64_t left = std::min(part, job.bytes - task * part); left >= 256; left -= 256, from += 256) {
      for (int i = 0; i < 4; ++i) {
        Line line;
        std::memcpy(&line, from + 64 * i, 64);
        mixed[i % 2] ^= line;
      }
    }
    const Line all = mixed[0] ^ mixed[1];
    job.found[static_cast<size_t>(task)] = all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
  };
  run_tasks(std::max(threads, 1), tasks, work, &job);
  uint64_t all = 0;
  for (uint64_t word : job.found) all ^= word;
  return all;
}

bool bring_in(const void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int populate = 22;  // MADV_POPULATE_READ, which headers from before Linux 5.14 do not name
  const uintptr_t size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = address / size * size, last = address + static_cast<uintptr_t>(bytes);
  if (bytes > 0 && madvise(reinterpret_cast<void*>(first), last - first, populate) != 0) return errno != EFAULT;
#else
  (void)data, (void)bytes;
#endif
  return true;
}

int64_t prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t size = uintptr_t{1} << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data), first = (address + size - 1) / size * size;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / size * size;
  if (last > first && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0) return static_cast<int64_t>(last - first);
#else
  (void)data, (void)bytes;
#endif
  return 0;
}

}  // namespace fewbits

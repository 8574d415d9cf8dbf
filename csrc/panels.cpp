#include "panels.h"

#include <algorithm>

#include "room.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t most_vectors = 576;  // of a task: more sums than theirs leave no room in the second cache

thread_local Room prepared_room, scratch_room;

uint8_t* bytes_of(Room& room, int64_t count) { return reinterpret_cast<uint8_t*>(room.floats((count + 3) / 4)); }

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Job {
  const Panels& panels;
  const Product& product;
  uint8_t *prepared, *scratch;
  int64_t scratch_each;
  int64_t tiles, part;  // of vectors: all, and those of a task
  int64_t runs;         // of rows
};

}  // namespace

bool multiply_in_panels(const Kernels& kernels, const Product& product, int threads) {
  const Panels* panels = kernels.panels == nullptr ? nullptr : kernels.panels(product);
  if (panels == nullptr || product.vectors <= panels->few_vectors(product) || product.matrix->rows == 0) return false;
  threads = std::max(threads, 1);
  const int64_t tiles = ceiling(product.vectors, panels->tile), runs = ceiling(product.matrix->rows, panels->rows);
  // Where there are few rows for the threads, a task takes some of the vectors and makes its panel for itself.
  const int64_t wanted = std::min(ceiling(4 * threads, runs), std::max<int64_t>(tiles / 4, 1));
  const int64_t part = std::min(ceiling(tiles, threads == 1 ? 1 : wanted), most_vectors / panels->tile);
  const int64_t each = ceiling(panels->scratch_bytes(product, part), 64) * 64;
  Job job{*panels, product, bytes_of(prepared_room, panels->prepared_bytes(product)), bytes_of(scratch_room, each * threads), each, tiles, part, runs};
  const auto prepare = [](void* context, int64_t tile, int) {
    const Job& job = *static_cast<Job*>(context);
    job.panels.prepare(job.product, tile, job.prepared);
  };
  run_tasks(threads, tiles, prepare, &job);
  const auto work = [](void* context, int64_t task, int worker) {
    const Job& job = *static_cast<Job*>(context);
    const int64_t first = task / job.runs * job.part, last = std::min(first + job.part, job.tiles);  // all rows meet the same inputs first
    job.panels.multiply(job.product, job.prepared, task % job.runs * job.panels.rows, first, last, job.scratch + worker * job.scratch_each);
  };
  run_tasks(threads, runs * ceiling(tiles, part), work, &job);
  return true;
}

bool takes_many(const Kernels& kernels, Number number) {
  const Coded matrix;
  return kernels.panels != nullptr && kernels.panels(Product{&matrix, nullptr, nullptr, 0, number}) != nullptr;
}

}  // namespace fewbits

#include "kmeans.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "threads.h"

namespace fewbits {
namespace {

constexpr int64_t rows_at_once = 32;

struct Problem {
  const double *weight, *first, *second;
  int64_t rows, n, count;
  int64_t* edges;
};

struct Row {
  const double *weight, *first, *second;

  double cost(int64_t start, int64_t end) const {
    const double mass = weight[end] - weight[start], total = first[end] - first[start];
    return std::max(second[end] - second[start] - total * total / (mass > 0 ? mass : 1.0), 0.0);
  }
};

// One level more: the least cost of the first `end` values and where the last interval starts, for every end. The best start moves
// right with the end, so that ends are decided middle first, and each bounds those on its left and right.
void extend(const Row& row, int64_t n, const double* before, double* value, int32_t* choice) {
  int64_t step = 1;
  while (step <= n) step *= 2;
  for (; step > 1; step /= 2) {
    const int64_t half = step / 2;
    for (int64_t end = half; end <= n; end += step) {
      const int64_t low = end > half ? choice[end - half] : 0;
      const int64_t high = std::min<int64_t>(end + half <= n ? choice[end + half] : n, end);
      double least = std::numeric_limits<double>::infinity();
      int64_t where = low;
      for (int64_t start = low; start <= high; ++start) {
        const double trial = before[start] + row.cost(start, end);
        if (trial < least) {
          least = trial;
          where = start;
        }
      }
      value[end] = least;
      choice[end] = static_cast<int32_t>(where);
    }
  }
  value[0] = before[0];
  choice[0] = 0;
}

void solve(void* context, int64_t task, int) {
  const Problem& problem = *static_cast<const Problem*>(context);
  const int64_t n = problem.n, count = problem.count, width = n + 1;
  std::vector<double> before(width), value(width);
  std::vector<int32_t> choices(std::max<int64_t>(count - 1, 1) * width);
  for (int64_t at = task * rows_at_once; at < std::min(problem.rows, (task + 1) * rows_at_once); ++at) {
    const Row row{problem.weight + at * width, problem.first + at * width, problem.second + at * width};
    for (int64_t end = 0; end <= n; ++end) before[end] = row.cost(0, end);
    for (int64_t level = 0; level + 1 < count; ++level) {
      extend(row, n, before.data(), value.data(), choices.data() + level * width);
      std::swap(before, value);
    }
    int64_t* edges = problem.edges + at * (count + 1);
    edges[0] = 0;
    edges[count] = n;
    for (int64_t level = count - 1; level > 0; --level) edges[level] = choices[(level - 1) * width + edges[level + 1]];
  }
}

}  // namespace

void best_edges(const double* weight, const double* first, const double* second, int64_t rows, int64_t n, int64_t count, int64_t* edges, int threads) {
  Problem problem{weight, first, second, rows, n, count, edges};
  run_tasks(threads, (rows + rows_at_once - 1) / rows_at_once, solve, &problem);
}

}  // namespace fewbits

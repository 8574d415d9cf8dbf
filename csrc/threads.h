// A pool of threads that lives as long as the process.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace fewbits {

// Calls work(context, task, worker) for every task 0..tasks-1 on at most `threads` threads, the caller's among them, and
// returns when all are done. `worker` is below `threads` and no two calls with the same one overlap. Work may not throw.
// Called while another call runs, by another thread, the work is done on the caller's thread alone.
void run_tasks(int threads, int64_t tasks, void (*work)(void* context, int64_t task, int worker), void* context);

// Memory that is read soon.
struct Stretch {
  const void* at = nullptr;
  int64_t bytes = 0;
};

// Tasks that may begin when all tasks of the stages before them are done.
struct Stage {
  int64_t tasks;
  std::function<void(int64_t task, int worker)> work;
  std::function<Stretch(int64_t task)> reads = nullptr;  // what a task will read most of, which is fetched while it has to wait
};

// Runs stages one after another, threads started once: at the end of a stage they wait a moment for the others.
void run_stages(int threads, const std::vector<Stage>& stages);

}  // namespace fewbits

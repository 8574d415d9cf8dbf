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

// Tasks that may begin when all tasks of the stages before them are done.
struct Stage {
  int64_t tasks;
  std::function<void(int64_t task, int worker)> work;
};

// Runs stages one after another as one call of `run_tasks`: threads are started once, and at the end of a stage wait a moment for the others.
void run_stages(int threads, const std::vector<Stage>& stages);

}  // namespace fewbits

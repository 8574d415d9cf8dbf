#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fewbits {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex running;  // held by the one call that has the pool
  std::mutex lock;     // guards what follows
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> round{0};
  bool open = false;  // whether a worker that comes now may join
  int limit = 0;      // workers that may join
  void (*work)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> joined{0};

  void take(int worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(context, task, worker);
  }

  [[noreturn]] void serve(int worker) {
    uint64_t seen = 0;
    for (;;) {
      // Between the products of one model there are microseconds: a short watch saves a slow waking.
      for (int i = 0; i < 4000 && round.load(std::memory_order_acquire) == seen; ++i) pause();
      {
        std::unique_lock<std::mutex> held(lock);
        wake.wait(held, [&] { return round.load(std::memory_order_relaxed) != seen; });
        seen = round.load(std::memory_order_relaxed);
        if (!open || worker > limit) continue;
        joined.fetch_add(1, std::memory_order_relaxed);
      }
      take(worker);
      joined.fetch_sub(1, std::memory_order_release);
    }
  }

  void run(int threads) {
    {
      std::lock_guard<std::mutex> held(lock);
      while (static_cast<int>(workers.size()) < threads - 1) {
        const int worker = static_cast<int>(workers.size()) + 1;
        try {
          workers.emplace_back([this, worker] { serve(worker); });
        } catch (const std::system_error&) {  // the system gives no more threads: those that there are do the work
          break;
        }
      }
      open = true;
      limit = threads - 1;
      next.store(0, std::memory_order_relaxed);
      round.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    take(0);
    std::unique_lock<std::mutex> held(lock);
    open = false;  // who has not come yet is not waited for
    held.unlock();
    for (int waits = 0; joined.load(std::memory_order_acquire) != 0; ++waits) {
      if (waits < 2000) pause();
      else std::this_thread::yield();
    }
  }
};

std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

// Threads do not survive a fork: the child starts a pool of its own, and the memory of its parent's is left as it was.
void forget() {
  pool.store(nullptr);
  forked.store(true);
}

void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static const int watched = pthread_atfork(nullptr, nullptr, forget);
  (void)watched;
#endif
}

Pool& the_pool() {
  Pool* found = pool.load();
  if (found == nullptr) {
    watch_forks();
    Pool* made = new Pool;  // never deleted: its threads sleep until the process ends
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

// Other threads are a moment away, unless the system runs something else in their place: then this one sleeps, which may be what they wait for.
// Meanwhile memory has nothing to do: what comes next is asked for, so that it is in the cache when the wait is over.
void wait_for(const std::atomic<int64_t>& left, Stretch next) {
  constexpr int64_t line = 64, most = 1 << 18, together = 8;
  const char* at = static_cast<const char*>(next.at);
  const char* end = at + std::min(next.bytes, most);
  while (at < end && left.load(std::memory_order_acquire) != 0) {
    for (int64_t i = 0; i < together; ++i, at += line) __builtin_prefetch(at, 0, 2);
  }
  for (int waits = 0; left.load(std::memory_order_acquire) != 0; ++waits) {
    if (waits < 2000) pause();
    else if (waits < 2020) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

// Stages that have tasks, and how far they are. Tasks are taken in order, and each waits for those of the stage before its own, which were
// taken before: whoever took those goes on, however few threads there are.
class Course {
 public:
  explicit Course(const std::vector<Stage>& stages, size_t begin) : left_(stages.size() - begin) {
    for (; begin < stages.size(); ++begin) {
      if (stages[begin].tasks == 0) continue;
      left_[stages_.size()].tasks.store(stages[begin].tasks, std::memory_order_relaxed);
      stages_.push_back(&stages[begin]);
      tasks_ += stages[begin].tasks;
    }
  }

  int64_t tasks() const { return tasks_; }

  // Everything that one thread does.
  void follow(int worker) {
    size_t stage = 0;
    int64_t begin = 0, done = 0;  // of the stage: its first task, and how many of it this thread has done and not told
    const auto tell = [&] {
      if (done > 0) left_[stage].tasks.fetch_sub(done, std::memory_order_release);
      done = 0;
    };
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_; ++done) {
      if (task - begin >= stages_[stage]->tasks) {
        tell();
        for (; task - begin >= stages_[stage]->tasks; ++stage) begin += stages_[stage]->tasks;
        const Stage& own = *stages_[stage];
        const std::atomic<int64_t>& before = left_[stage - 1].tasks;
        if (before.load(std::memory_order_acquire) != 0) wait_for(before, own.reads ? own.reads(task - begin) : Stretch{});
      }
      stages_[stage]->work(task - begin, worker);
    }
    tell();
  }

 private:
  struct Count {
    alignas(64) std::atomic<int64_t> tasks{0};
  };
  std::vector<Count> left_;
  std::vector<const Stage*> stages_;
  int64_t tasks_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace

void run_tasks(int threads, int64_t tasks, void (*work)(void*, int64_t, int), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
#if defined(_OPENMP)
  // Torch's own operations run on OpenMP's threads, which go on watching for work for a while: a second pool would wait for
  // their cores. After a fork OpenMP's threads are gone, and it does not know.
  watch_forks();
  if (threads > 1 && !forked.load() && omp_in_parallel() == 0) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(context, task, omp_get_thread_num());
    return;
  }
#endif
  if (threads > 1) {
    Pool& shared = the_pool();
    std::unique_lock<std::mutex> mine(shared.running, std::try_to_lock);
    if (mine.owns_lock()) {
      shared.work = work;
      shared.context = context;
      shared.tasks = tasks;
      shared.run(threads);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) work(context, task, 0);
}

void run_stages(int threads, const std::vector<Stage>& stages) {
  size_t begin = 0;
  for (; begin < stages.size() && stages[begin].tasks == 1; ++begin) stages[begin].work(0, 0);  // before anyone is asked to help
  Course course(stages, begin);
  if (course.tasks() == 0) return;
  const auto work = [](void* context, int64_t, int worker) { static_cast<Course*>(context)->follow(worker); };
  run_tasks(static_cast<int>(std::min<int64_t>(threads, course.tasks())), threads, work, &course);
}

}  // namespace fewbits

// Dynamic scheduling on torch's threads. Results do not depend on it, because every task owns its outputs.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace sgcd {

// Call `worker(next)` on each thread; `next()` returns the next task, or -1 when there is none. A thread that other
// programs slow down takes fewer tasks.
template <class Worker>
void parallel_tasks(int64_t tasks, Worker worker) {
  std::atomic<int64_t> counter{0};
  const auto next = [&]() -> int64_t {
    const int64_t task = counter.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (threads <= 1) return worker(next);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(next); });
}

}  // namespace sgcd

// What the entry points share: the processor's instruction set, threads, memory. Only for sources that are compiled for every
// processor: the inline functions here must not be compiled for a newer one.
#pragma once
#include <stdint.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif

namespace granvit {

constexpr double WORTH_A_THREAD = 2e6;  // multiplications; starting a thread takes the time of about so many

// 0 plain, 1 AVX2, 2 AVX-512: the highest that the processor has, at most `level`.
inline int usable(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma"))
    return 2;
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

inline std::atomic<int> chosen{-1};

inline int instruction_set() {
  int now = chosen.load();
  if (now < 0) chosen = now = usable(2);
  return now;
}

// OMP_NUM_THREADS when the library is loaded, or 0: another thread may set the environment later.
inline long asked_threads() {
  const char *asked = std::getenv("OMP_NUM_THREADS");
  return asked ? std::strtol(asked, nullptr, 10) : 0;
}

inline std::atomic<long> most_threads{asked_threads()};

// The processors that this process may use, or `most_threads` if that is less.
inline long allowed_threads() {
  long count = std::thread::hardware_concurrency();
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
  const long most = most_threads.load();
  if (most > 0 && most < count) count = most;
  return count < 1 ? 1 : count;
}

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};
typedef std::unique_ptr<float[], Free> Floats;

inline Floats floats(long count) {
  float *memory = (float *)std::aligned_alloc(64, ((size_t)(count < 1 ? 1 : count) * sizeof(float) + 63) / 64 * 64);
  if (!memory) throw std::bad_alloc();
  return Floats(memory);
}

// Calls work(task, scratch) for every task, on as many threads as the work is worth.
template <class Work> void parallel(long tasks, double multiplications, long scratch_floats, const Work &work) {
  long threads = allowed_threads();
  if (threads > multiplications / WORTH_A_THREAD) threads = (long)(multiplications / WORTH_A_THREAD);
  if (threads > tasks) threads = tasks;
  if (threads < 1) threads = 1;
  std::vector<Floats> scratch;
  for (long i = 0; i < threads; ++i) scratch.push_back(floats(scratch_floats));
  std::atomic<long> next{0};
  const auto run = [&](float *memory) {
    for (long task; (task = next++) < tasks;) work(task, memory);
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (long i = 1; i < threads; ++i) others.emplace_back(run, scratch[i].get());
  } catch (...) {
    // No more threads to be had: those that run do all of the work.
  }
  run(scratch[0].get());
  for (std::thread &thread : others) thread.join();
}

template <class Work> int guarded(const Work &work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc &) {
    return 1;
  } catch (...) {
    return 2;
  }
}

// Whether the first `count` dtypes that MindSpore names are `dtype`.
inline bool is(const char *const *dtypes, int count, const char *dtype) {
  for (int i = 0; i < count; ++i)
    if (std::strcmp(dtypes[i], dtype) != 0) return false;
  return true;
}

}  // namespace granvit

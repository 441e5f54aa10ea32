// Loops over threads, with the OpenMP runtime that MXNet brought.
//
// The library is not linked to OpenMP: a second runtime in the process would start threads of its own. It calls the
// entry points of the one that is loaded, and runs on one thread where there is none.
#pragma once
#include <dlfcn.h>
#include <stdint.h>

namespace gluonquant {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*thread_num)() = nullptr;

  static const OpenMP& get() {
    static const OpenMP found;
    return found;
  }

 private:
  OpenMP() {
    void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return;
    find(library, "omp_get_max_threads", &max_threads);
    find(library, "omp_get_num_threads", &num_threads);
    find(library, "omp_get_thread_num", &thread_num);
    if (max_threads && num_threads && thread_num) find(library, "GOMP_parallel", &parallel);
  }
  template <class F> static void find(void* library, const char* name, F* function) {
    *function = reinterpret_cast<F>(dlsym(library, name));
  }
};

// Calls f(i) for i in [0, count), each thread a contiguous share.
template <class F>
void parallel_for(int64_t count, const F& f) {
  const OpenMP& omp = OpenMP::get();
  const int threads = omp.parallel && count > 1 ? omp.max_threads() : 1;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct Job { const F* f; int64_t count; } job = {&f, count};
  auto work = [](void* data) {
    const Job& job = *static_cast<Job*>(data);
    const OpenMP& omp = OpenMP::get();
    const int64_t n = omp.num_threads(), i = omp.thread_num();
    for (int64_t k = job.count * i / n; k < job.count * (i + 1) / n; ++k) (*job.f)(k);
  };
  omp.parallel(work, &job, static_cast<unsigned>(threads < count ? threads : count), 0);
}

}  // namespace gluonquant

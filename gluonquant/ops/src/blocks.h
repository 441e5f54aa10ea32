// Long arrays in blocks of a fixed size, so that sums do not depend on the number of threads.
#pragma once
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace gluonquant {

constexpr int64_t kBlock = 8192;
constexpr int64_t kWorthThreads = 32768;  // elements

template <class F>
void for_blocks(int64_t n, const F& f) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  auto one = [&](int64_t b) { f(b, b * kBlock, b + 1 < blocks ? kBlock : n - b * kBlock); };
  if (n > kWorthThreads) {
    parallel_for(blocks, one);
  } else {
    for (int64_t b = 0; b < blocks; ++b) one(b);
  }
}

template <class F>
Sums sum_blocks(int64_t n, const F& f) {
  std::vector<Sums> parts((n + kBlock - 1) / kBlock);
  for_blocks(n, [&](int64_t b, int64_t start, int64_t count) { parts[b] = f(start, count); });
  Sums sums;
  for (const Sums& part : parts) sums += part;
  return sums;
}

inline void merge(Statistics* into, const Statistics& s) {
  into->min = s.min < into->min ? s.min : into->min;
  into->max = s.max > into->max ? s.max : into->max;
  into->abs += s.abs;
  into->square += s.square;
  into->finite = into->finite && s.finite;
}

constexpr Statistics kNothing = {__builtin_inff(), -__builtin_inff(), 0, 0, true};

}  // namespace gluonquant

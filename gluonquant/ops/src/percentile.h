// Two percentiles of a tensor, exact, without sorting it.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace gluonquant {

// Linear between order statistics, of min(max(a + b, clamp.low), clamp.high). False if an element is NaN or a result
// is not finite. A histogram of the upper 16 bits finds the bins that hold the wanted ranks; only those are ordered.
inline bool percentiles(const float* a, const float* b, int64_t n, const Clamp& clamp, double low_percent,
                        double high_percent, float* low, float* high) {
  auto value = [&](int64_t i) {
    const float x = b ? a[i] + b[i] : a[i];
    return std::min(std::max(x, clamp.low), clamp.high);
  };
  auto key = [&](float x) {  // orders as the floats do
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  };
  std::vector<int64_t> histogram(65536, 0);
  bool broken = false;
  for (int64_t i = 0; i < n; ++i) {
    const float x = b ? a[i] + b[i] : a[i];
    broken = broken || x != x;
    ++histogram[key(value(i)) >> 16];
  }
  if (broken) return false;
  const double places[2] = {(n - 1) * (low_percent / 100), (n - 1) * (high_percent / 100)};
  struct Wanted { int64_t rank; uint32_t bin; std::vector<float> held; float found; } wanted[4];
  for (int k = 0; k < 4; ++k) {
    wanted[k].rank = static_cast<int64_t>(k % 2 ? ceil(places[k / 2]) : floor(places[k / 2]));
    uint32_t bin = 0;
    while (wanted[k].rank >= histogram[bin]) wanted[k].rank -= histogram[bin++];
    wanted[k].bin = bin;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float x = value(i);
    const uint32_t bin = key(x) >> 16;
    for (Wanted& w : wanted)
      if (w.bin == bin) w.held.push_back(x);
  }
  for (Wanted& w : wanted) {
    std::nth_element(w.held.begin(), w.held.begin() + w.rank, w.held.end());
    w.found = w.held[w.rank];
  }
  for (int k = 0; k < 2; ++k) {
    const float weight = static_cast<float>(places[k] - floor(places[k]));
    const float below = wanted[2 * k].found, above = wanted[2 * k + 1].found;
    *(k ? high : low) = below + weight * (above - below);
  }
  return isfinite(*low) && isfinite(*high);
}

}  // namespace gluonquant

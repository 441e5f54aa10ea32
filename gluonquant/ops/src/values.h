// Small things the two roles share.
#pragma once
#include <math.h>

#include <algorithm>

#include "kernels.h"
#include "options.h"

namespace gluonquant {

constexpr float kEps = 1e-8f;  // the smallest range that becomes a scale

inline float up(float x) { return nextafterf(x, INFINITY); }
inline float down(float x) { return nextafterf(x, -INFINITY); }
inline float round_half_even(float x) { return (x + kRound) - kRound; }
inline float within(float x, float low, float high) { return std::min(std::max(x, low), high); }

// The Parameters of a node by name.
template <class Pointer>
struct Values {
  const Options& o;
  Pointer const* in;
  bool has(Input i) const { return o.has(i); }
  Pointer at(Input i) const { return in[o.at[i]]; }
  float get(Input i, int64_t row = 0) const { return has(i) ? at(i)[row] : 0; }
};

// scale * (code - zero_point), codes from low to high; low and high are relative to the zero point.
inline void uniform(Levels* levels, float scale, float low, float high) {
  levels->step = levels->scale = scale;
  levels->low = low;
  levels->high = high;
}

struct Affine { float scale, zero; };

// The range [min(low, 0), max(high, 0)] cut into `steps` steps.
inline Affine affine_levels(float low, float high, float steps) {
  low = std::min(low, 0.0f);
  high = std::max(high, 0.0f);
  const float scale = std::max(high - low, kEps) / steps;
  return {scale, round_half_even(within(-low / scale, 0, steps))};
}

}  // namespace gluonquant

// Quantizers of activations: one scale for the tensor, known before the tensor is.
#include <vector>

#include "blocks.h"
#include "percentile.h"
#include "quantizers.h"
#include "values.h"

namespace gluonquant {
namespace {

Clamp clamp_of(const Options& o) {
  Clamp c;
  c.low = o.low;
  c.high = o.high;
  c.open_low = o.relu ? up(o.low) : o.low;  // the gradient of a ReLU at 0 is 0, that of a clip at its edge 1
  c.open_high = o.high;
  return c;
}

Statistics measure(const Forward& f, const Extent& extent, const Clamp& clamp, bool moments) {
  std::vector<Statistics> parts((extent.count + kBlock - 1) / kBlock, kNothing);
  for_blocks(extent.count, [&](int64_t b, int64_t start, int64_t count) {
    parts[b] = kernels().statistics(f.a + start, f.b ? f.b + start : f.b, count, clamp, moments);
  });
  Statistics all = kNothing;
  for (const Statistics& part : parts) merge(&all, part);
  return all;
}

float moved(float old, float batch, double decay, bool unset) {
  return unset ? batch : static_cast<float>(decay) * old + static_cast<float>(1.0 - decay) * batch;
}

struct Plan {
  Levels levels;
  Gate gate;
  float slope = 1;
  bool on = true;
};

// Follows the data; returns whether this batch was measured.
bool advance(const Values<float*>& v, const Forward& f, const Extent& extent) {
  const Options& o = v.o;
  Clamp clamp = clamp_of(o);
  if (o.method == kInt8) {
    if (!o.is_signed) clamp.low = std::max(clamp.low, 0.0f);
    const Statistics s = measure(f, extent, clamp, false);
    const float batch = std::max(fabsf(s.min), fabsf(s.max));
    float* amax = v.at(kAmax);
    if (s.finite) *amax = moved(*amax, batch, o.decay, *amax <= 0);
    return s.finite;
  }
  if (o.method == kGdrq) {
    const Statistics s = measure(f, extent, clamp, true);
    const float batch = static_cast<float>(o.ktimes) * static_cast<float>(s.abs / extent.real);
    float* threshold = v.at(kThreshold);
    if (s.finite) *threshold = moved(*threshold, batch, o.decay, *threshold <= 0);
    return s.finite;
  }
  float low, high;
  bool finite;
  if (o.percentile < 100) {
    finite = percentiles(f.a, f.b, extent.count, clamp, 100 - o.percentile, o.percentile, &low, &high);
  } else {
    const Statistics s = measure(f, extent, clamp, false);
    low = s.min, high = s.max, finite = s.finite;
  }
  if (!finite) return false;
  float *lo = v.at(kLo), *hi = v.at(kHi), *initialized = v.at(kInitialized);
  const bool unset = *initialized <= 0;
  *lo = moved(*lo, low, o.decay, unset);
  *hi = moved(*hi, high, o.decay, unset);
  *initialized = std::max(*initialized, 1.0f);
  return true;
}

bool tracks(const Options& o) { return o.method == kInt8 || o.method == kAffine || o.method == kGdrq; }

template <class Pointer>
bool has_range(const Values<Pointer>& v, bool measured) {
  switch (v.o.method) {
    case kInt8: return v.get(kAmax) > 0 || measured;  // an empty unsigned range is a range, too
    case kGdrq: return v.get(kThreshold) > 0;
    case kAffine: case kLsq: case kLsqPlus: case kQil: return v.get(kInitialized) > 0;
    default: return true;
  }
}

template <class Pointer>
Plan plan(const Values<Pointer>& v, bool on) {
  const Options& o = v.o;
  Plan p;
  p.on = on;
  if (!on) return p;
  p.levels.round = kRound;
  switch (o.method) {
    case kInt8: {
      const float reach = std::max(v.get(kAmax), kEps);
      uniform(&p.levels, reach / o.qmax, o.qmin, o.qmax);
      if (o.gate) p.gate.low = o.is_signed ? -reach : 0, p.gate.high = reach;
      break;
    }
    case kAffine: {
      const Affine a = affine_levels(v.get(kLo), v.get(kHi), o.qmax);
      uniform(&p.levels, a.scale, o.qmin - a.zero, o.qmax - a.zero);
      if (o.gate) p.gate.low = p.levels.low * a.scale, p.gate.high = p.levels.high * a.scale;
      break;
    }
    case kPact: {
      const float reach = std::max(v.get(kAlpha), kEps);
      uniform(&p.levels, reach / o.qmax, o.qmin, o.qmax);
      p.gate.low = o.is_signed ? up(-reach) : 0;
      p.gate.high = down(reach);
      p.gate.above = reach;
      p.gate.below = -reach;
      break;
    }
    case kDorefa:
      p.levels.low = 0;
      p.levels.high = 1;
      p.levels.steps = o.qmax;
      p.levels.scale = 1.0f / o.qmax;
      p.gate.low = 0, p.gate.high = 1;
      break;
    case kClipRelu:
      uniform(&p.levels, v.get(kThreshold) / o.qmax, o.qmin, o.qmax);
      p.gate.low = 0, p.gate.high = v.get(kThreshold);
      break;
    case kLsq:
      uniform(&p.levels, std::max(v.get(kScale), kEps), o.qmin, o.qmax);
      p.gate.code_low = up(o.qmin), p.gate.code_high = down(o.qmax);
      break;
    case kLsqPlus: {
      const float scale = std::max(v.get(kScale), kEps);
      const float zero = round_half_even(within(-v.get(kOffset) / scale, 0, o.qmax));
      uniform(&p.levels, scale, o.qmin, o.qmax);
      if (v.get(kNudged) > 0) {
        p.levels.shift = -zero * scale;
        p.levels.zero = zero;
      } else {
        p.levels.shift = p.levels.offset = v.get(kOffset);
      }
      p.gate.code_low = up(o.qmin), p.gate.code_high = down(o.qmax);
      break;
    }
    case kQil: {
      const float c = v.get(kCenter), d = v.get(kDistance);
      p.levels.shift = c - d;
      p.levels.step = 2 * d;
      p.levels.low = 0;
      p.levels.high = 1;
      p.levels.steps = o.qmax;
      p.levels.scale = (o.rescale ? c + d : 1.0f) / o.qmax;
      p.gate.low = c - d, p.gate.high = c + d;
      p.slope = p.levels.scale * o.qmax * 0.5f / d;
      break;
    }
    case kGdrq: {
      const float reach = std::max(v.get(kThreshold), kEps);
      if (v.get(kPhase) > 0) {
        uniform(&p.levels, reach / o.qmax, o.qmin, o.qmax);
      } else {  // reshaping: clip only
        p.levels.round = 0;
        p.levels.low = o.is_signed ? -reach : 0;
        p.levels.high = reach;
      }
      if (o.gate) p.gate.low = o.is_signed ? -reach : 0, p.gate.high = reach;
      break;
    }
    default: break;
  }
  return p;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = [] {
#ifdef GLUONQUANT_X86
    const char* limit = getenv("GLUONQUANT_ISA");
    const bool any = limit == nullptr || strcmp(limit, "avx512") == 0;
    if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      return &kernels_avx512;
    if ((any || strcmp(limit, "avx2") == 0) && __builtin_cpu_supports("avx2")) return &kernels_avx2;
#endif
    return &kernels_baseline;
  }();
  return *chosen;
}

Planes planes_at(const Options& o, uint8_t* memory, int64_t plane_bytes) {
  Planes p;
  auto next = [&](bool wanted) {
    if (!wanted) return static_cast<uint8_t*>(nullptr);
    uint8_t* plane = memory;
    memory += plane_bytes;
    return plane;
  };
  p.pass = next(o.has_pass());
  p.open = next(o.has_open());
  p.above = next(o.sided() > 0);
  p.below = next(o.sided() > 1);
  return p;
}

void activation_forward(const Options& o, float* const* in, const Forward& f, const Extent& extent, bool training) {
  const Values<float*> v = {o, in};
  const bool learning = training && v.get(kMode) > 0 && !(v.get(kFrozen) > 0) && extent.count > 0;
  const bool measured = learning && tracks(o) && advance(v, f, extent);
  bool on = v.get(kMode) > 1 && has_range(v, measured);
  if (v.has(kSteps)) {
    on = on && v.get(kSteps) >= o.delay;
    if (learning) *v.at(kSteps) += 1;
  }
  const Plan p = plan(v, on);
  const Clamp clamp = clamp_of(o);
  for_blocks(extent.count, [&](int64_t, int64_t start, int64_t count) {
    kernels().forward(f.from(start), count, p.levels, clamp, p.gate);
  });
}

void activation_backward(const Options& o, const float* const* in, const Backward& f, const Extent& extent,
                         const Gradients& gradients) {
  const Values<const float*> v = {o, in};
  if (!o.residual()) {
    Backward from = f;
    if (from.gk && !from.planes.open && o.clamp) from.planes.open = from.planes.pass;
    const Sums s = sum_blocks(extent.count, [&](int64_t start, int64_t count) {
      return kernels().route(from.from(start), count);
    });
    if (o.method == kPact && !(v.get(kFrozen) > 0)) gradients.add(kAlpha, 0, s.above - s.below);
    return;
  }
  const Plan p = plan(v, v.get(kMode) > 1 && has_range(v, false));
  const Clamp clamp = clamp_of(o);
  const Sums s = sum_blocks(extent.count, [&](int64_t start, int64_t count) {
    return o.method == kQil ? kernels().interval(f.from(start), count, p.levels, clamp, p.gate, p.slope)
                            : kernels().learned(f.from(start), count, p.levels, clamp, p.gate);
  });
  if (!p.on || v.get(kFrozen) > 0) return;
  if (o.method == kQil) {
    const double grow = o.rescale ? s.code / o.qmax : 0.0;
    gradients.add(kCenter, 0, grow - p.slope * s.inside);
    gradients.add(kDistance, 0, grow - p.slope * (2 * s.place - s.inside));
    return;
  }
  const double factor = 1 / sqrt(static_cast<double>(extent.real) / extent.batch * o.qmax);
  gradients.add(kScale, 0, factor * s.residual);
  gradients.add(kOffset, 0, factor * s.outside);
}

bool activation_needs_exact_extent(const Options& o) {
  // Zeros of padding move percentiles, a positive minimum and a count; LSQ+ would write its offset into the padding.
  return o.method == kAffine || o.method == kLsqPlus;
}

bool activation_passes_gradient(const Options& o) { return !o.residual() && o.planes() == 0 && !o.keep; }

}  // namespace gluonquant

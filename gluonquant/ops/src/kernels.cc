// The loops over elements. Compiled once per instruction set: GLUONQUANT_ISA is baseline, avx2 or avx512.
#include "kernels.h"
#include "simd.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

namespace gluonquant {
namespace {

constexpr int64_t W = kWidth;

inline Bits bits_at(const uint8_t* plane, int64_t i) {
  Bits b;
  __builtin_memcpy(&b, plane + i / 8, sizeof b);
  return b;
}

inline void put_bits(uint8_t* plane, int64_t i, Mask m) {
  const Bits b = to_bits(m);
  __builtin_memcpy(plane + i / 8, &b, sizeof b);
}

// A whole vector, padded with zeros, in place of the last elements.
struct Tail {
  float lane[W] = {};
  const float* in(const float* p, int64_t count) {
    if (p == nullptr) return nullptr;
    __builtin_memcpy(lane, p, count * sizeof(float));
    return lane;
  }
};

template <bool kAdd, bool kClamp>
struct Input {
  const float *a, *b;
  Vec low, high, open_low, open_high;
  Input(const float* a, const float* b, const Clamp& c)
      : a(a), b(b), low(splat(c.low)), high(splat(c.high)), open_low(splat(c.open_low)),
        open_high(splat(c.open_high)) {}
  Vec raw(int64_t i) const { return kAdd ? load(a + i) + load(b + i) : load(a + i); }
  Vec clamped(Vec x) const { return kClamp ? smaller(high, larger(low, x)) : x; }
  Mask open(Vec x) const { return both(at_least(x, open_low), at_most(x, open_high)); }
};

struct Coder {
  Vec shift, step, bias, gain, low, high, steps, round, zero, scale, offset;
  explicit Coder(const Levels& l)
      : shift(splat(l.shift)), step(splat(l.step)), bias(splat(l.bias)), gain(splat(l.gain)), low(splat(l.low)),
        high(splat(l.high)), steps(splat(l.steps)), round(splat(l.round)), zero(splat(l.zero)),
        scale(splat(l.scale)), offset(splat(l.offset)) {}
  Vec place(Vec x) const { return smaller(high, larger(low, ((x - shift) / step + bias) * gain)); }
  Vec place_plain(Vec x) const { return smaller(high, larger(low, (x - shift) / step)); }  // bias 0, gain 1
  Vec code(Vec u) const { return (u * steps + round) - round; }
  Vec value(Vec q) const { return (q - zero) * scale + offset; }
};

template <bool kAdd, bool kClamp, bool kPlanes>
void forward(const Forward& f, int64_t n, const Levels& levels, const Clamp& clamp, const Gate& gate) {
  const Coder coder(levels);
  const Vec low = splat(gate.low), high = splat(gate.high), above = splat(gate.above), below = splat(gate.below);
  auto step = [&](const Input<kAdd, kClamp>& in, float* y, float* kept, const Planes& p, int64_t i) {
    const Vec raw = in.raw(i), x = in.clamped(raw);
    store(y + i, coder.value(coder.code(coder.place(x))) + (x - x));
    if (kept) store(kept + i, x);
    if (!kPlanes) return;
    if (p.pass) {
      const Mask inside = both(at_least(x, low), at_most(x, high));
      put_bits(p.pass, i, kClamp ? both(inside, in.open(raw)) : inside);
    }
    if (p.open) put_bits(p.open, i, in.open(raw));
    if (p.above) put_bits(p.above, i, at_least(x, above));
    if (p.below) put_bits(p.below, i, at_most(x, below));
  };
  const Input<kAdd, kClamp> in(f.a, f.b, clamp);
  int64_t i = 0;
  for (; i + W <= n; i += W) step(in, f.y, f.kept, f.planes, i);
  if (i < n) {
    Tail a, b, y, kept;
    const Input<kAdd, kClamp> rest(a.in(f.a + i, n - i), b.in(f.b ? f.b + i : f.b, n - i), clamp);
    step(rest, y.lane, f.kept ? kept.lane : nullptr, f.planes.from(i), 0);
    __builtin_memcpy(f.y + i, y.lane, (n - i) * sizeof(float));
    if (f.kept) __builtin_memcpy(f.kept + i, kept.lane, (n - i) * sizeof(float));
  }
}

// Writes or adds vectors of gradients; `step(in, i)` makes one.
template <class Step>
void each(const Backward& f, int64_t n, Step step) {
  int64_t i = 0;
  auto put = [&](float* to, Vec d) { store(to, f.accumulate ? load(to) + d : d); };
  for (; i + W <= n; i += W) {
    const Vec d = step(f, i);
    if (f.dx) put(f.dx + i, d);
  }
  if (i < n) {
    Tail g, gk, a, b, dx;
    Backward rest = f.from(i);
    rest.g = g.in(rest.g, n - i);
    rest.gk = gk.in(rest.gk, n - i);
    rest.a = a.in(rest.a, n - i);
    rest.b = b.in(rest.b, n - i);
    const Vec d = step(rest, 0);
    if (f.dx) {
      dx.in(f.dx + i, n - i);
      put(dx.lane, d);
      __builtin_memcpy(f.dx + i, dx.lane, (n - i) * sizeof(float));
    }
  }
}

Sums route(const Backward& f, int64_t n) {
  Sum above, below;
  int64_t left = kRun;
  each(f, n, [&](const Backward& in, int64_t i) {
    const Planes& p = in.planes;
    const Vec g = load(in.g + i);
    Vec d = p.pass ? where(from_bits(bits_at(p.pass, i)), g) : g;
    if (in.gk) {
      const Vec gk = load(in.gk + i);
      d = d + (p.open ? where(from_bits(bits_at(p.open, i)), gk) : gk);
    }
    if (p.above) above.add(where(from_bits(bits_at(p.above, i)), g));
    if (p.below) below.add(where(from_bits(bits_at(p.below, i)), g));
    if (--left == 0) { above.flush(); below.flush(); left = kRun; }
    return d;
  });
  Sums sums;
  sums.above = above.value();
  sums.below = below.value();
  return sums;
}

// kInterval: the sums that QIL needs, otherwise those of LSQ.
template <bool kAdd, bool kClamp, bool kInterval>
Sums residual(const Backward& f, int64_t n, const Levels& levels, const Clamp& clamp, const Gate& gate, float slope) {
  const Coder coder(levels);
  const Vec low = splat(gate.low), high = splat(gate.high), slopes = splat(slope);
  const Vec code_low = splat(gate.code_low), code_high = splat(gate.code_high);
  Sum first, second, third;
  int64_t left = kRun;
  each(f, n, [&](const Backward& at, int64_t i) {
    const Input<kAdd, kClamp> in(at.a, at.b, clamp);
    const Vec raw = in.raw(i), x = in.clamped(raw), g = load(at.g + i);
    const Vec u = coder.place_plain(x), v = kInterval ? u * coder.steps : u, q = (v + coder.round) - coder.round;
    const Mask inside = kInterval ? both(at_least(x, low), at_most(x, high))
                                  : both(at_least(v, code_low), at_most(v, code_high));
    const Vec middle = where(inside, g);
    if (kInterval) {
      first.add(middle);
      second.add(g * q);
      third.add(middle * u);
    } else {
      first.add(g * (q - where(inside, v)));
      second.add(g - middle);
    }
    if (--left == 0) {
      first.flush();
      second.flush();
      if (kInterval) third.flush();
      left = kRun;
    }
    Vec d = kInterval ? middle * slopes : middle;
    if (at.gk) d = d + load(at.gk + i);
    return kClamp ? where(in.open(raw), d) : d;
  });
  Sums sums;
  (kInterval ? sums.inside : sums.residual) = first.value();
  (kInterval ? sums.code : sums.outside) = second.value();
  if (kInterval) sums.place = third.value();
  return sums;
}

template <bool kAdd, bool kClamp, bool kMoments>
Statistics statistics(const float* a, const float* b, int64_t n, const Clamp& clamp) {
  const Vec infinity = splat(__builtin_inff());
  Vec min = infinity, max = splat(-__builtin_inff()), broken = splat(0);
  Moments sums;
  const Input<kAdd, kClamp> in(a, b, clamp);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vec x = in.clamped(in.raw(i));
    min = smaller(x, min);
    max = larger(x, max);
    broken = broken + (x - x);
    if (kMoments) sums.add(x);
  }
  float lane_min[W], lane_max[W], lane_broken[W];
  store(lane_min, min);
  store(lane_max, max);
  store(lane_broken, broken);
  Statistics s = {__builtin_inff(), -__builtin_inff(), sums.abs(), sums.square(), true};
  for (int k = 0; k < W; ++k) {
    s.min = lane_min[k] < s.min ? lane_min[k] : s.min;
    s.max = lane_max[k] > s.max ? lane_max[k] : s.max;
    s.finite = s.finite && lane_broken[k] == 0;
  }
  for (; i < n; ++i) {  // padding would be taken for data
    float x = kAdd ? a[i] + b[i] : a[i];
    if (kClamp) { x = clamp.low > x ? clamp.low : x; x = clamp.high < x ? clamp.high : x; }
    s.min = x < s.min ? x : s.min;
    s.max = x > s.max ? x : s.max;
    s.finite = s.finite && x - x == 0;
    if (kMoments) s.abs += __builtin_fabsf(x), s.square += static_cast<double>(x) * x;
  }
  return s;
}

bool clamps(const Clamp& c) { return c.low != -__builtin_inff() || c.high != __builtin_inff(); }

// The versions of a kernel that a call needs, by b, the clamp and one more flag.
#define PICK(kernel, b, clamp, flag, ...)                                                                  \
  ((b) ? (clamps(clamp) ? kernel<true, true, flag>(__VA_ARGS__) : kernel<true, false, flag>(__VA_ARGS__)) \
       : (clamps(clamp) ? kernel<false, true, flag>(__VA_ARGS__) : kernel<false, false, flag>(__VA_ARGS__)))

void pick_forward(const Forward& f, int64_t n, const Levels& l, const Clamp& c, const Gate& g) {
  if (f.planes.any()) {
    PICK(forward, f.b, c, true, f, n, l, c, g);
  } else {
    PICK(forward, f.b, c, false, f, n, l, c, g);
  }
}
Sums pick_learned(const Backward& f, int64_t n, const Levels& l, const Clamp& c, const Gate& g) {
  return PICK(residual, f.b, c, false, f, n, l, c, g, 1);
}
Sums pick_interval(const Backward& f, int64_t n, const Levels& l, const Clamp& c, const Gate& g, float slope) {
  return PICK(residual, f.b, c, true, f, n, l, c, g, slope);
}
Statistics pick_statistics(const float* a, const float* b, int64_t n, const Clamp& c, bool moments) {
  return moments ? PICK(statistics, b, c, true, a, b, n, c) : PICK(statistics, b, c, false, a, b, n, c);
}

}  // namespace

extern const Kernels JOIN(kernels_, GLUONQUANT_ISA);
const Kernels JOIN(kernels_, GLUONQUANT_ISA) = {STRING(GLUONQUANT_ISA), pick_forward, route, pick_learned,
                                                pick_interval, pick_statistics};

}  // namespace gluonquant

// Quantizers of weights: one scale for the tensor or for each row, most of them made from the present weight.
#include <vector>

#include "blocks.h"
#include "quantizers.h"
#include "values.h"

namespace gluonquant {
namespace {

// Calls f(start, count) for the pieces of a row that lie together.
template <class F>
void for_pieces(const Rows& rows, int64_t row, const F& f) {
  for (int64_t i = 0; i < rows.outer; ++i) f((i * rows.rows + row) * rows.inner, rows.inner);
}

// Calls f(row); a tensor that is a single row is cut into blocks elsewhere.
template <class F>
void for_rows(const Rows& rows, const F& f) {
  if (rows.rows > 1 && rows.outer * rows.rows * rows.inner > kWorthThreads) {
    parallel_for(rows.rows, f);
  } else {
    for (int64_t row = 0; row < rows.rows; ++row) f(row);
  }
}

// f(start, count) over one row, in blocks.
template <class F>
void for_row(const Rows& rows, int64_t row, const F& f) {
  for_pieces(rows, row, [&](int64_t at, int64_t n) {
    if (rows.rows > 1) {
      f(at, n);
    } else {
      for_blocks(n, [&](int64_t, int64_t start, int64_t count) { f(at + start, count); });
    }
  });
}

Statistics measure(const float* x, const Rows& rows, int64_t row, bool moments) {
  Statistics all = kNothing;
  for_pieces(rows, row, [&](int64_t at, int64_t n) {
    std::vector<Statistics> parts((n + kBlock - 1) / kBlock, kNothing);
    auto one = [&](int64_t b, int64_t start, int64_t count) {
      parts[b] = kernels().statistics(x + at + start, nullptr, count, Clamp(), moments);
    };
    if (rows.rows > 1) {
      for (int64_t b = 0; b * kBlock < n; ++b) one(b, b * kBlock, std::min(kBlock, n - b * kBlock));
    } else {
      for_blocks(n, one);
    }
    for (const Statistics& part : parts) merge(&all, part);
  });
  return all;
}

struct Plan {
  Levels levels;
  Gate gate;
};

using In = Values<const float*>;

// A scale that follows the weight, or what was held in its place since it was frozen.
float held(const In& v, Input name, int64_t row, float present) {
  return v.get(kFrozen) > 0 && v.has(name) ? v.get(name, row) : present;
}

Plan plan(const In& v, const float* x, const Rows& rows, int64_t row) {
  const Options& o = v.o;
  Plan p;
  p.levels.round = kRound;
  if (o.method == kLsq || o.method == kLsqPlus) {
    uniform(&p.levels, std::max(v.get(kScale, row), kEps), o.qmin, o.qmax);
    p.gate.code_low = up(o.qmin), p.gate.code_high = down(o.qmax);
    return p;
  }
  const Statistics s = measure(x, rows, row, o.method == kSawb || o.method == kGdrq);
  const double count = static_cast<double>(rows.outer * rows.inner);
  const float broken = s.finite ? 0 : NAN;  // a weight that is not finite makes its whole row NaN
  const float largest = std::max(fabsf(s.min), fabsf(s.max)) + broken;
  const float mean = static_cast<float>(s.abs / count) + broken;
  switch (o.method) {
    case kInt8:
      uniform(&p.levels, held(v, kHeldScale, row, std::max(largest, kEps) / o.qmax), o.qmin, o.qmax);
      break;
    case kAffine: {
      const Affine a = affine_levels(s.min + broken, s.max + broken, o.qmax);
      const float zero = held(v, kHeldZero, row, a.zero);
      uniform(&p.levels, held(v, kHeldScale, row, a.scale), o.qmin - zero, o.qmax - zero);
      break;
    }
    case kSawb: {
      const float rms = sqrtf(static_cast<float>(s.square / count));
      const float fit = static_cast<float>(o.c1) * rms + static_cast<float>(o.c2) * mean;
      const float alpha = std::max(std::min(std::max(fit, mean), largest), kEps);
      const float scale = held(v, kHeldScale, row, alpha / o.qmax);
      uniform(&p.levels, scale, o.qmin, o.qmax);
      if (o.midrise) {  // k = R((w / scale + L) / 2), value (2 k - L) * scale
        p.levels.bias = o.qmax;
        p.levels.gain = 0.5f;
        p.levels.low = 0;
        p.levels.zero = o.qmax / 2;
        p.levels.scale = 2 * scale;
      }
      if (o.gate) p.gate.low = o.qmin * scale, p.gate.high = o.qmax * scale;
      break;
    }
    case kGdrq: {
      const float scale = held(v, kHeldScale, row, std::max(mean * v.get(kRatio, row), kEps) / o.qmax);
      if (v.get(kPhase) > 0) {
        uniform(&p.levels, scale, o.qmin, o.qmax);
      } else {
        p.levels.round = 0;
        p.levels.low = o.qmin * scale;
        p.levels.high = o.qmax * scale;
      }
      if (o.gate) p.gate.low = o.qmin * scale, p.gate.high = o.qmax * scale;
      break;
    }
    default: break;
  }
  return p;
}

bool is_on(const In& v) { return v.get(kMode) > 1 && (!v.has(kInitialized) || v.get(kInitialized) > 0); }

// Sums over the elements of a row, f(i, sums) for each; in blocks, so that threads do not change them.
struct Three {
  double first = 0, second = 0, third = 0;
};

template <class F>
Three sum_elements(int64_t n, const F& f) {
  std::vector<Three> parts((n + kBlock - 1) / kBlock);
  for_blocks(n, [&](int64_t b, int64_t start, int64_t count) {
    for (int64_t i = start; i < start + count; ++i) f(i, &parts[b]);
  });
  Three sums;
  for (const Three& part : parts) {
    sums.first += part.first;
    sums.second += part.second;
    sums.third += part.third;
  }
  return sums;
}

// DoReFa: y = r (2 R(L v) - L) / L, v = tanh(w) / (2 max|tanh w|) + 1/2; one row.
namespace dorefa {

float largest_of(const Statistics& s) { return std::max(fabsf(s.min), fabsf(s.max)); }

float scale_of(const Options& o, float largest) { return (o.rescale ? largest : largest > 0) / o.qmax; }

void squash(const float* x, float* t, int64_t n) {  // NaN where x is not finite
  for_blocks(n, [&](int64_t, int64_t start, int64_t count) {
    for (int64_t i = start; i < start + count; ++i) t[i] = tanhf(x[i]) + (x[i] - x[i]);
  });
}

void forward(const Options& o, const float* x, float* y, const Rows& rows) {
  const int64_t n = rows.inner;
  if (o.qmax == 1) {  // one bit
    const float mean = static_cast<float>(measure(x, rows, 0, true).abs / n);
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] >= 0 ? mean : -mean) + (x[i] - x[i]);
    return;
  }
  squash(x, y, n);
  Levels levels;
  levels.round = kRound;
  levels.step = 2 * std::max(largest_of(measure(y, rows, 0, false)), kEps);
  levels.bias = 0.5f;
  levels.gain = o.qmax;
  levels.low = 0;
  levels.high = o.qmax;
  levels.zero = o.qmax / 2;
  levels.scale = 2 * scale_of(o, largest_of(measure(x, rows, 0, false)));
  for_blocks(n, [&](int64_t, int64_t start, int64_t count) {
    kernels().forward({y + start, nullptr, y + start, nullptr, {}}, count, levels, Clamp(), Gate());
  });
}

void backward(const Options& o, const float* g, const float* x, float* dx, bool accumulate, const Rows& rows) {
  const int64_t n = rows.inner;
  std::vector<float> t(n);
  squash(x, t.data(), n);
  const float largest = largest_of(measure(t.data(), rows, 0, false));
  const double m = std::max(largest, kEps);
  const double r = static_cast<double>(scale_of(o, largest_of(measure(x, rows, 0, false)))) * o.qmax;
  const Three s = sum_elements(n, [&](int64_t i, Three* sum) {
    sum->first += r * g[i] * t[i];
    sum->second += fabsf(t[i]) == largest;  // tied maxima share the gradient of the maximum
  });
  const double share = o.detach || largest < kEps ? 0 : -s.first / (m * m * s.second);
  for_blocks(n, [&](int64_t, int64_t start, int64_t count) {
    for (int64_t i = start; i < start + count; ++i) {
      double dt = r * g[i] / m;
      if (fabsf(t[i]) == largest) dt += t[i] > 0 ? share : t[i] < 0 ? -share : 0;
      const float d = static_cast<float>(dt * (1 - static_cast<double>(t[i]) * t[i]));
      dx[i] = accumulate ? dx[i] + d : d;
    }
  });
}

}  // namespace dorefa

// QIL: y = r sign(w) R(hat q) / q, hat = clip((|w| - p) / 2d, 0, 1) ** gamma; one row.
struct Interval {
  float c, d, gamma, scale, qmax;
  bool rescale;
  explicit Interval(const In& v)
      : c(v.get(kCenter)), d(v.get(kDistance)), gamma(v.get(kGamma)), qmax(v.o.qmax), rescale(v.o.rescale) {
    scale = (rescale ? c + d : 1.0f) / qmax;
  }
  float place(float w) const { return (fabsf(w) - (c - d)) / (2 * d); }
  float powered(float place) const { return gamma == 1 ? place : powf(place, gamma); }
  float sign(float w) const { return static_cast<float>((w > 0) - (w < 0)); }
  float code(float w) const { return sign(w) * round_half_even(powered(within(place(w), 0, 1)) * qmax); }
  bool interior(float w) const { return fabsf(w) >= c - d && fabsf(w) <= c + d; }
};

void qil_backward(const In& v, const float* g, const float* x, float* dx, bool accumulate, int64_t n,
                  const Gradients& gradients) {
  const Interval q(v);
  const double r = static_cast<double>(q.scale) * q.qmax;
  const Three s = sum_elements(n, [&](int64_t i, Three* sum) {
    const double grow = q.rescale ? g[i] * static_cast<double>(q.code(x[i]) / q.qmax) : 0;
    sum->first += grow;
    sum->second += grow;
    double slope = 0;
    if (q.interior(x[i])) {
      const float place = std::max(q.place(x[i]), 1e-6f);
      const double powered = q.powered(place), pull = q.sign(x[i]) * g[i];
      slope = r * q.gamma * powered / place * 0.5 / q.d;
      sum->first -= pull * slope;
      sum->second -= pull * slope * (fabsf(x[i]) - q.c) / q.d;
      sum->third += pull * r * powered * logf(place);
    }
    const float d = static_cast<float>(slope * g[i]);
    if (dx) dx[i] = accumulate ? dx[i] + d : d;
  });
  if (v.get(kFrozen) > 0) return;
  gradients.add(kCenter, 0, s.first);
  gradients.add(kDistance, 0, s.second);
  gradients.add(kGamma, 0, s.third);
}

void pass(const float* g, float* dx, bool accumulate, int64_t n) {
  const Backward f = {g, nullptr, nullptr, nullptr, dx, accumulate, {}};
  for_blocks(n, [&](int64_t, int64_t start, int64_t count) { kernels().route(f.from(start), count); });
}

}  // namespace

Rows rows_of(const Options& o, const int64_t* shape, int ndim) {
  int64_t outer = 1, inner = 1;
  for (int i = 0; i < ndim; ++i) (i < o.axis ? outer : inner) *= shape[i];
  if (o.axis < 0) return {1, 1, inner};
  const int64_t rows = shape[o.axis] / o.group;
  return {outer, rows, rows ? inner / rows : 0};
}

void weight_forward(const Options& o, const float* const* in, const float* x, float* y, const Rows& rows) {
  const In v = {o, in};
  const int64_t n = rows.outer * rows.rows * rows.inner;
  if (!is_on(v)) {
    for_blocks(n, [&](int64_t, int64_t start, int64_t count) {
      kernels().forward({x + start, nullptr, y + start, nullptr, {}}, count, Levels(), Clamp(), Gate());
    });
  } else if (o.method == kDorefa) {
    dorefa::forward(o, x, y, rows);
  } else if (o.method == kQil) {
    const Interval q(v);
    for_row(rows, 0, [&](int64_t start, int64_t count) {
      for (int64_t i = start; i < start + count; ++i) y[i] = q.code(x[i]) * q.scale + (x[i] - x[i]);
    });
  } else {
    for_rows(rows, [&](int64_t row) {
      const Plan p = plan(v, x, rows, row);
      for_row(rows, row, [&](int64_t at, int64_t count) {
        kernels().forward({x + at, nullptr, y + at, nullptr, {}}, count, p.levels, Clamp(), p.gate);
      });
    });
  }
}

void weight_backward(const Options& o, const float* const* in, const float* g, const float* x, float* dx,
                     bool accumulate, const Rows& rows, const Gradients& gradients) {
  const In v = {o, in};
  const int64_t n = rows.outer * rows.rows * rows.inner;
  const bool bit = o.method == kDorefa && o.qmax == 1;
  if (!is_on(v) || weight_passes_gradient(o) || bit) {
    if (dx) pass(g, dx, accumulate, n);
  } else if (o.method == kDorefa) {
    if (dx) dorefa::backward(o, g, x, dx, accumulate, rows);
  } else if (o.method == kQil) {
    qil_backward(v, g, x, dx, accumulate, n, gradients);
  } else {
    const double factor = 1 / sqrt(static_cast<double>(rows.outer * rows.inner) * o.qmax);
    for_rows(rows, [&](int64_t row) {
      const Plan p = plan(v, x, rows, row);
      const Backward f = {g, nullptr, x, nullptr, dx, accumulate, {}};
      Sums sums;
      for_pieces(rows, row, [&](int64_t at, int64_t count) {
        auto block = [&](int64_t start, int64_t length) {
          return o.method == kLsq || o.method == kLsqPlus
                     ? kernels().learned(f.from(at + start), length, p.levels, Clamp(), p.gate)
                     : kernels().interval(f.from(at + start), length, p.levels, Clamp(), p.gate, 1);
        };
        if (rows.rows > 1) {
          for (int64_t start = 0; start < count; start += kBlock)
            sums += block(start, std::min(kBlock, count - start));
        } else {
          sums += sum_blocks(count, block);
        }
      });
      if (!(v.get(kFrozen) > 0)) gradients.add(kScale, row, factor * sums.residual);
    });
  }
}

bool weight_passes_gradient(const Options& o) {
  return o.method == kInt8 || o.method == kAffine || ((o.method == kSawb || o.method == kGdrq) && !o.gate);
}

}  // namespace gluonquant

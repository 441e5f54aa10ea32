// What the kernels compute, and the table through which the fastest version for this processor is called.
#pragma once
#include <stdint.h>

namespace gluonquant {

constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: (v + kRound) - kRound rounds |v| < 2**22 half to even

// Every fake quantizer of this library, element by element:
//   u = min(max(((x - shift) / step + bias) * gain, low), high)
//   q = (u * steps + round) - round                              round = 0: no rounding
//   y = (q - zero) * scale + offset                              NaN where x is not finite
// The defaults are the identity.
struct Levels {
  float shift = 0, step = 1, bias = 0, gain = 1;
  float low = -__builtin_inff(), high = __builtin_inff();
  float steps = 1, round = 0, zero = 0, scale = 1, offset = 0;
};

// What happens to x before: x = a + b, then min(max(x, low), high); gradients pass where open_low <= x <= open_high.
struct Clamp {
  float low = -__builtin_inff(), high = __builtin_inff();
  float open_low = -__builtin_inff(), open_high = __builtin_inff();
};

// Where gradients go, decided on the clamped x (closed interval) and on u * steps (closed interval).
struct Gate {
  float low = -__builtin_inff(), high = __builtin_inff();
  float code_low = -__builtin_inff(), code_high = __builtin_inff();
  float above = __builtin_inff(), below = -__builtin_inff();  // saturated: x >= above, x <= below
};

// One bit for each element, in the order of memory; a null plane is not written, or passes everything.
struct Planes {
  uint8_t* pass = nullptr;   // the gradient of y reaches x
  uint8_t* open = nullptr;   // the clamp lets gradients through
  uint8_t* above = nullptr;  // saturated
  uint8_t* below = nullptr;
  bool any() const { return pass || open || above || below; }
  Planes from(int64_t element) const {
    const int64_t byte = element / 8;
    return {pass ? pass + byte : pass, open ? open + byte : open, above ? above + byte : above,
            below ? below + byte : below};
  }
};

struct Statistics {
  float min, max;          // of the elements that are numbers
  double abs, square;      // sums of |x| and x * x, if `moments` were asked for
  bool finite;             // no element is NaN or infinite
};

// Sums over elements, from which the gradients of parameters are made; g is the gradient of y.
struct Sums {
  double above = 0, below = 0;  // of g where saturated
  double residual = 0;          // of g * (q - u * steps inside the gate, q outside)
  double outside = 0;           // of g outside the gate
  double inside = 0;            // of g inside the gate
  double code = 0;              // of g * q
  double place = 0;             // of g * u inside the gate
  void operator+=(const Sums& s) {
    above += s.above; below += s.below; residual += s.residual; outside += s.outside;
    inside += s.inside; code += s.code; place += s.place;
  }
};

// Pointers that may be null: b (no sum), kept (the clamped x is not wanted), gk (gradient of kept), dx (not wanted).
struct Forward {
  const float* a; const float* b; float* y; float* kept; Planes planes;
  Forward from(int64_t i) const {
    return {a + i, b ? b + i : b, y + i, kept ? kept + i : kept, planes.from(i)};
  }
};
struct Backward {
  const float* g; const float* gk; const float* a; const float* b; float* dx; bool accumulate; Planes planes;
  Backward from(int64_t i) const {
    return {g + i, gk ? gk + i : gk, a ? a + i : a, b ? b + i : b, dx ? dx + i : dx, accumulate, planes.from(i)};
  }
};

struct Kernels {
  const char* name;
  void (*forward)(const Forward&, int64_t n, const Levels&, const Clamp&, const Gate&);
  // dx from the planes alone. Sums: above, below.
  Sums (*route)(const Backward&, int64_t n);
  // dx from x, which was kept, for levels without bias, gain and steps: g where the code is inside the gate. Sums:
  // residual, outside.
  Sums (*learned)(const Backward&, int64_t n, const Levels&, const Clamp&, const Gate&);
  // dx from x, which was kept, for levels without bias and gain: g * slope where x is inside the gate. Sums: inside,
  // code, place.
  Sums (*interval)(const Backward&, int64_t n, const Levels&, const Clamp&, const Gate&, float slope);
  Statistics (*statistics)(const float* a, const float* b, int64_t n, const Clamp&, bool moments);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace gluonquant

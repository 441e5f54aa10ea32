// The quantizers in terms of the kernels: levels from Parameters and statistics, gradients of Parameters from sums.
//
// Pointers `in` are the node's inputs in its own order. Formulas follow gluonquant/quantizers/<method>.py, in the same
// precision and order, so that codes are equal.
#pragma once
#include "kernels.h"
#include "options.h"

namespace gluonquant {

// The kernels for this processor; environment variable GLUONQUANT_ISA = baseline or avx2 asks for less.
const Kernels& kernels();

// Where gradients of the Parameters are added up; null = not wanted.
struct Gradients {
  float* to[kInputs] = {};
  void add(Input input, int64_t row, double value) const {
    if (to[input]) to[input][row] += static_cast<float>(value);
  }
};

// A tensor in memory: `count` elements, of which `real` belong to it (blocked layouts pad with zeros).
struct Extent {
  int64_t count, real, batch;
};

Planes planes_at(const Options&, uint8_t* memory, int64_t plane_bytes);

// Updates the state among `in` when training; f.planes are set by the caller (`planes_at`).
void activation_forward(const Options&, float* const* in, const Forward& f, const Extent&, bool training);
void activation_backward(const Options&, const float* const* in, const Backward& f, const Extent&, const Gradients&);
// Whether padding would change the statistics or the sums.
bool activation_needs_exact_extent(const Options&);
// Whether the gradient of the tensor is that of the output.
bool activation_passes_gradient(const Options&);

// A weight as `outer` blocks of `rows` rows of `inner` elements; a row has one scale.
struct Rows {
  int64_t outer, rows, inner;
};
Rows rows_of(const Options&, const int64_t* shape, int ndim);
void weight_forward(const Options&, const float* const* in, const float* x, float* y, const Rows&);
void weight_backward(const Options&, const float* const* in, const float* g, const float* x, float* dx,
                     bool accumulate, const Rows&, const Gradients&);
bool weight_passes_gradient(const Options&);

}  // namespace gluonquant

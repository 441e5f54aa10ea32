// Shapes and roles of an operator's inputs and outputs.
#pragma once
#include <vector>

#include "options.h"

namespace gluonquant {

// Bytes of one bit plane for a tensor in any layout: oneDNN's blocked ones round the channels up to 16. Two whole
// cache lines at the end make room for the last vector.
inline int64_t plane_bytes(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (size_t i = 0; i < shape.size(); ++i) count *= i == 1 && shape.size() > 2 ? (shape[i] + 15) / 16 * 16 : shape[i];
  return (count + 511) / 512 * 64;
}

// Where an activation's outputs are: y is the first, then the planes if there are any, then the input if it is kept.
struct Outputs {
  int planes, kept, count;
  explicit Outputs(const Options& o) {
    planes = o.planes() ? 1 : -1;
    kept = o.keep ? 1 + (planes > 0) : -1;
    count = 1 + (planes > 0) + (kept > 0);
  }
};

// The inputs that the forward pass writes.
inline std::vector<Input> states(const Options& o) {
  std::vector<Input> names;
  auto state = [&](Input name) { if (o.has(name)) names.push_back(name); };
  if (o.method == kInt8) state(kAmax);
  if (o.method == kGdrq) state(kThreshold);
  if (o.method == kAffine) { state(kLo); state(kHi); state(kInitialized); }
  state(kSteps);
  return names;
}

// Whether a Parameter of a weight quantizer has one value for each row.
inline bool per_row(Input name) {
  return name == kScale || name == kRatio || name == kHeldScale || name == kHeldZero;
}

}  // namespace gluonquant

// The portable tier: operators through MXNet's extension interface.
//
// Each is registered twice, as _gluonquant_<role> and as _gluonquant_blocked_<role>: the layout tier (layout.cc)
// takes over the twin inside the process, and never touches what the portable tier runs.
#include <mxnet/lib_api.h>

#include <algorithm>

#include "quantizers.h"
#include "shapes.h"

using namespace mxnet::ext;

namespace {

using gluonquant::Options;
using gluonquant::Outputs;
using gluonquant::read_options;
typedef std::unordered_map<std::string, std::string> Attributes;
typedef std::vector<std::vector<unsigned>> Shapes;

// An exception must not leave through the interface: it becomes MXNet's error.
template <class F>
MXReturnValue guarded(const F& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    MX_ERROR_MSG << "gluonquant: " << error.what();
    return MX_FAIL;
  }
}

struct Call {  // the tensors of a call as plain pointers
  std::vector<float*> in;
  std::vector<int64_t> shape;
  int64_t count = 1;
  Call(std::vector<MXTensor>* tensors, int first, int inputs) {
    for (int i = 0; i < inputs; ++i) in.push_back((*tensors)[first + i].data<float>());
    shape = (*tensors)[first].shape;
    for (int64_t size : shape) count *= size;
  }
  gluonquant::Extent extent() const { return {count, count, shape.empty() ? 1 : shape[0]}; }
};

gluonquant::Gradients zeroed(const Options& o, std::vector<MXTensor>* outputs) {
  gluonquant::Gradients gradients;
  for (int k = 0; k < gluonquant::kInputs; ++k) {
    if (o.at[k] < 0 || k == gluonquant::kData || k == gluonquant::kOther) continue;
    MXTensor& tensor = (*outputs)[o.at[k]];
    gradients.to[k] = tensor.data<float>();
    std::fill_n(gradients.to[k], tensor.size(), 0.0f);
  }
  return gradients;
}

MXReturnValue types(const Attributes&, std::vector<int>* inputs, std::vector<int>* outputs) {
  for (int& type : *inputs) {
    if (type != kFloat32 && type != -1) {
      MX_ERROR_MSG << "gluonquant: the fused operators take float32, not MXNet type " << type
                   << "; cast the quantizer with the network, it converts its input";
      return MX_FAIL;
    }
    type = kFloat32;
  }
  for (int& type : *outputs) type = kFloat32;
  return MX_SUCCESS;
}

MXReturnValue mutable_inputs(const Attributes& attributes, std::vector<int>* indices) {
  return guarded([&] {
    const Options o = read_options(attributes);
    for (int k : gluonquant::states(o)) indices->push_back(o.at[k]);
    return MX_SUCCESS;
  });
}

// ---- activations

MXReturnValue activation_parse(const Attributes& attributes, int* inputs, int* outputs) {
  return guarded([&] {
    const Options o = read_options(attributes);
    *inputs = o.inputs;
    *outputs = Outputs(o).count;
    return MX_SUCCESS;
  });
}

MXReturnValue activation_shape(const Attributes& attributes, Shapes* inputs, Shapes* outputs) {
  return guarded([&] {
    const Options o = read_options(attributes);
    for (auto& shape : *inputs)
      if (&shape != &(*inputs)[0]) shape = {1};
    std::vector<unsigned>& data = (*inputs)[0];
    if (o.add) (*inputs)[o.at[gluonquant::kOther]] = data;
    const Outputs at(o);
    (*outputs)[0] = data;
    if (at.planes > 0) {
      const int64_t bytes = gluonquant::plane_bytes(std::vector<int64_t>(data.begin(), data.end()));
      (*outputs)[at.planes] = {static_cast<unsigned>(o.planes()), static_cast<unsigned>(bytes / sizeof(float))};
    }
    if (at.kept > 0) (*outputs)[at.kept] = data;
    return MX_SUCCESS;
  });
}

gluonquant::Planes planes(const Options& o, const Call& call, std::vector<MXTensor>* tensors, int index) {
  if (index < 0) return gluonquant::Planes();
  return gluonquant::planes_at(o, reinterpret_cast<uint8_t*>((*tensors)[index].data_ptr),
                               gluonquant::plane_bytes(call.shape));
}

MXReturnValue activation_forward(const Attributes& attributes, std::vector<MXTensor>* inputs,
                                 std::vector<MXTensor>* outputs, const OpResource&) {
  return guarded([&] {
    const Options o = read_options(attributes);
    const Call call(inputs, 0, o.inputs);
    const Outputs at(o);
    const gluonquant::Forward f = {call.in[0], o.add ? call.in[o.at[gluonquant::kOther]] : nullptr,
                                   (*outputs)[0].data<float>(),
                                   o.keep ? (*outputs)[at.kept].data<float>() : nullptr,
                                   planes(o, call, outputs, at.planes)};
    const bool training = o.has(gluonquant::kTraining) && *call.in[o.at[gluonquant::kTraining]] > 0;
    gluonquant::activation_forward(o, call.in.data(), f, call.extent(), training);
    return MX_SUCCESS;
  });
}

// Inputs: gradients of the outputs, the inputs, the outputs.
MXReturnValue activation_backward(const Attributes& attributes, std::vector<MXTensor>* inputs,
                                  std::vector<MXTensor>* outputs, const OpResource&) {
  return guarded([&] {
    const Options o = read_options(attributes);
    const Outputs at(o);
    const Call call(inputs, at.count, o.inputs);
    const int first = at.count + o.inputs;
    float* dx = (*outputs)[0].data<float>();
    const gluonquant::Backward f = {(*inputs)[0].data<float>(), o.keep ? (*inputs)[at.kept].data<float>() : nullptr,
                                    call.in[0], o.add ? call.in[o.at[gluonquant::kOther]] : nullptr, dx, false,
                                    planes(o, call, inputs, at.planes < 0 ? -1 : first + at.planes)};
    gluonquant::activation_backward(o, call.in.data(), f, call.extent(), zeroed(o, outputs));
    if (o.add) std::copy_n(dx, call.count, (*outputs)[o.at[gluonquant::kOther]].data<float>());
    return MX_SUCCESS;
  });
}

// ---- weights: one output

MXReturnValue weight_parse(const Attributes& attributes, int* inputs, int* outputs) {
  return guarded([&] {
    *inputs = read_options(attributes).inputs;
    *outputs = 1;
    return MX_SUCCESS;
  });
}

MXReturnValue weight_shape(const Attributes& attributes, Shapes* inputs, Shapes* outputs) {
  return guarded([&] {
    const Options o = read_options(attributes);
    const std::vector<unsigned>& data = (*inputs)[0];
    (*outputs)[0] = data;
    const unsigned rows = o.axis < 0 || data.empty() ? 1 : data[o.axis] / o.group;
    for (int k = 1; k < gluonquant::kInputs; ++k)
      if (o.at[k] >= 0) (*inputs)[o.at[k]] = {gluonquant::per_row(static_cast<gluonquant::Input>(k)) ? rows : 1};
    return MX_SUCCESS;
  });
}

MXReturnValue weight_forward(const Attributes& attributes, std::vector<MXTensor>* inputs,
                             std::vector<MXTensor>* outputs, const OpResource&) {
  return guarded([&] {
    const Options o = read_options(attributes);
    const Call call(inputs, 0, o.inputs);
    const gluonquant::Rows rows = gluonquant::rows_of(o, call.shape.data(), call.shape.size());
    gluonquant::weight_forward(o, call.in.data(), call.in[0], (*outputs)[0].data<float>(), rows);
    return MX_SUCCESS;
  });
}

MXReturnValue weight_backward(const Attributes& attributes, std::vector<MXTensor>* inputs,
                              std::vector<MXTensor>* outputs, const OpResource&) {
  return guarded([&] {
    const Options o = read_options(attributes);
    const Call call(inputs, 1, o.inputs);
    const gluonquant::Rows rows = gluonquant::rows_of(o, call.shape.data(), call.shape.size());
    gluonquant::weight_backward(o, call.in.data(), (*inputs)[0].data<float>(), call.in[0],
                                (*outputs)[0].data<float>(), false, rows, zeroed(o, outputs));
    return MX_SUCCESS;
  });
}

}  // namespace

#define ACTIVATION(name)                                                                                      \
  REGISTER_OP(name).setForward(activation_forward, "cpu").setBackward(activation_backward, "cpu")             \
      .setParseAttrs(activation_parse).setInferType(types).setInferShape(activation_shape)                    \
      .setMutateInputs(mutable_inputs)
#define WEIGHT(name)                                                                                          \
  REGISTER_OP(name).setForward(weight_forward, "cpu").setBackward(weight_backward, "cpu")                     \
      .setParseAttrs(weight_parse).setInferType(types).setInferShape(weight_shape)

ACTIVATION(_gluonquant_activation);
ACTIVATION(_gluonquant_blocked_activation);
WEIGHT(_gluonquant_weight);
WEIGHT(_gluonquant_blocked_weight);

// Read before the library is given to MXNet: is it ours, and made for this version?
extern "C" __attribute__((visibility("default"))) const char* gluonquant_build() {
  return "gluonquant " GLUONQUANT_VERSION " for mxnet " GLUONQUANT_MXNET;
}

extern "C" __attribute__((visibility("default"))) const char* gluonquant_isa() { return gluonquant::kernels().name; }

// MXNet asks each time the library is loaded, and refuses operators that it already has: it is told of ours once.
extern "C" int registered_operators();
int _opRegSize() {
  static bool asked = false;
  const bool first = !asked;
  asked = true;
  return first ? registered_operators() : 0;
}

MXReturnValue initialize(int version) {
  if (version >= 10700 && version < 20000) return MX_SUCCESS;
  MX_ERROR_MSG << "gluonquant: MXNet version " << version << " is not 1.7 to 1.9";
  return MX_FAIL;
}

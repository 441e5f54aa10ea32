// The layout tier: operators that take oneDNN's blocked arrays as they are.
//
// An operator made through the extension interface always gets arrays in the default layout, so MXNet reorders what a
// convolution wrote, and reorders it back for the next convolution; and it keeps all inputs and outputs for the
// backward pass. Elementwise kernels do not care about the order of elements. This file tells MXNet so.
//
// What it touches: in MXNet's operator registry, the entries of the four operators
//
//     _gluonquant_blocked_activation   _backward__gluonquant_blocked_activation
//     _gluonquant_blocked_weight       _backward__gluonquant_blocked_weight
//
// which operators.cc registered a moment before and which nobody else uses. Nothing of MXNet's own operators changes.
// It gives them: FComputeEx<cpu> (the code below), TIsMKLDNN (do not reorder the inputs), FGradient (what the backward
// pass needs, so that the rest is freed), FInplaceOption (outputs may take the memory of inputs), and the number of
// outputs of the backward activation.
//
// Why it is safe: this is C++ against C++, and the wheel was made by GCC 4.8 with the old std::string. It is valid for
// exactly one libmxnet.so, whose SHA-256 the loader has compared before this library is opened; that wheel is the last
// of its line and will not change. Three differences between the compilers matter, and each has its one place below:
// the calling convention of std::function (`Registry`), the size of std::unordered_map inside nnvm::Node
// (`inputs_of`), and the string (a compiler flag). A self-test compares results before the tier is used.
#include <mkldnn.hpp>
#include <mxnet/ndarray.h>
#include <mxnet/op_attr_types.h>
#include <nnvm/node.h>
#include <nnvm/op.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "quantizers.h"
#include "shapes.h"

namespace mxnet {  // as in MXNet's src/operator/nn/mkldnn/mkldnn_base-inl.h, which the wheel does not carry
class MKLDNNMemory {
 public:
  std::shared_ptr<mkldnn::memory> mem;
  mkldnn::memory::desc desc;
  size_t size;
};
class MKLDNNStream {
 public:
  static MKLDNNStream* Get();
  void Submit(bool cleanup = true);
};
}  // namespace mxnet

namespace {

using gluonquant::Options;
using gluonquant::Outputs;
using mxnet::NDArray;
using nnvm::NodeAttrs;
using nnvm::NodeEntry;
using nnvm::ObjectPtr;
typedef std::vector<NDArray> Arrays;
typedef std::vector<mxnet::OpReqType> Requests;
typedef std::vector<NodeEntry> Entries;

// ---- arrays in any layout

bool blocked(const NDArray& a) { return a.IsMKLDNNData(); }

const mkldnn::memory::desc& layout(const NDArray& a) { return a.ptr_->mkl_mem_->desc; }

bool same_layout(const NDArray& a, const NDArray& b) {
  if (blocked(a) != blocked(b)) return false;
  return !blocked(a) || memcmp(&layout(a).data, &layout(b).data, sizeof layout(a).data) == 0;
}

float* memory(const NDArray& a) {
  a.CheckAndAlloc();
  return reinterpret_cast<float*>(static_cast<char*>(a.ptr_->shandle.dptr) + a.byte_offset_);
}

// Elements in memory, padding included; 0 if they do not lie densely.
int64_t elements(const NDArray& a) {
  if (!blocked(a)) return a.shape().Size();
  const mkldnn_memory_desc_t& desc = layout(a).data;
  const auto& blocking = desc.format_desc.blocking;
  if (desc.format_kind != mkldnn_blocked || desc.offset0 != 0) return 0;
  int64_t count = 1, last = 0, block = 1, sizes[MKLDNN_MAX_NDIMS];
  std::fill_n(sizes, MKLDNN_MAX_NDIMS, 1);
  for (int i = 0; i < blocking.inner_nblks; ++i) {
    sizes[blocking.inner_idxs[i]] *= blocking.inner_blks[i];
    block *= blocking.inner_blks[i];
  }
  for (int i = 0; i < desc.ndims; ++i) {
    count *= desc.padded_dims[i];
    last += (desc.padded_dims[i] / sizes[i] - 1) * blocking.strides[i];
  }
  return last + block == count ? count : 0;
}

std::vector<int64_t> shape_of(const NDArray& a) { return std::vector<int64_t>(a.shape().begin(), a.shape().end()); }

// `a`, or a copy in the default layout where its blocked one is of no use here.
NDArray usable(const NDArray& a, bool exact) {
  if (!blocked(a)) return a;
  const int64_t count = elements(a);
  const bool fits = count > 0 && count <= 8 * gluonquant::plane_bytes(shape_of(a));
  return a.IsView() || !fits || (exact && count != static_cast<int64_t>(a.shape().Size())) ? a.Reorder2Default() : a;
}

// `a` in the layout of `like`, copied only if it has another.
NDArray in_layout_of(const NDArray& like, const NDArray& a) {
  if (same_layout(a, like) && !(blocked(a) && a.IsView())) return a;
  if (!blocked(like)) return a.Reorder2Default();
  NDArray copy(a.shape(), a.ctx(), false, a.dtype());
  copy.CreateMKLDNNData(layout(like));
  copy.CopyFrom(*a.GetMKLDNNData());
  mxnet::MKLDNNStream::Get()->Submit();
  return copy;
}

// Memory of the output `out` in the layout of `like`; null if it cannot take that layout.
float* output(const NDArray& out, const NDArray& like) {
  NDArray& a = const_cast<NDArray&>(out);
  if (a.ptr_ == like.ptr_) return memory(a);
  if (!blocked(like)) {
    a.InvalidateMKLDNNData();
    return memory(a);
  }
  return a.IsView() || !a.CreateMKLDNNData(layout(like)) ? nullptr : memory(a);
}

float* parameter(const NDArray& a) { return a.data().dptr<float>(); }

std::vector<float*> parameters(const Options& o, const Arrays& arrays, int first) {
  std::vector<float*> in(o.inputs, nullptr);
  for (int k = 0; k < gluonquant::kInputs; ++k)
    if (o.at[k] >= 0 && k != gluonquant::kData && k != gluonquant::kOther) in[o.at[k]] = parameter(arrays[first + o.at[k]]);
  return in;
}

gluonquant::Gradients gradients_of(const Options& o, const Requests& req, const Arrays& out) {
  gluonquant::Gradients gradients;
  for (int k = 0; k < gluonquant::kInputs; ++k) {
    if (o.at[k] < 0 || k == gluonquant::kData || k == gluonquant::kOther || req[o.at[k]] == mxnet::kNullOp) continue;
    const NDArray& array = out[o.at[k]];
    gradients.to[k] = parameter(array);
    if (req[o.at[k]] != mxnet::kAddTo) std::fill_n(gradients.to[k], array.shape().Size(), 0.0f);
  }
  return gradients;
}

// ---- the gradient of a tensor, however MXNet wants it delivered

// Calls write(dx, accumulate) with memory in the layout of `like`, then brings the result where it belongs.
// `reuse` shares its memory with `out` when MXNet works in place.
template <class Write>
void deliver(const NDArray& out, mxnet::OpReqType req, const NDArray& like, const NDArray& reuse, const Write& write) {
  if (req == mxnet::kNullOp) return write(static_cast<float*>(nullptr), false);
  if (req == mxnet::kAddTo && same_layout(out, like) && !(blocked(out) && out.IsView())) return write(memory(out), true);
  if (req != mxnet::kAddTo) {
    float* dx = out.ptr_ == reuse.ptr_ && same_layout(reuse, like) ? memory(out) : output(out, like);
    if (dx != nullptr) return write(dx, false);
  }
  NDArray made(out.shape(), out.ctx(), false, out.dtype());
  if (blocked(like)) made.CreateMKLDNNData(layout(like));
  write(memory(made), false);
  const NDArray plain = blocked(made) ? made.Reorder2Default() : made;
  const NDArray old = req == mxnet::kAddTo && blocked(out) ? out.Reorder2Default() : out;
  const float *from = memory(plain), *before = memory(old);
  const int64_t n = out.shape().Size();
  std::vector<float> sum(from, from + n);
  if (req == mxnet::kAddTo)
    for (int64_t i = 0; i < n; ++i) sum[i] += before[i];
  const_cast<NDArray&>(out).InvalidateMKLDNNData();
  std::copy(sum.begin(), sum.end(), memory(out));
}

// ---- activations

void activation_forward(const NodeAttrs& attrs, const mxnet::OpContext& context, const Arrays& in, const Requests& req,
                        const Arrays& out) {
  const Options o = gluonquant::read_options(attrs.dict);
  const Outputs at(o);
  const bool exact = gluonquant::activation_needs_exact_extent(o);
  NDArray a = usable(in[0], exact), b;
  if (o.add) {
    b = usable(in[o.at[gluonquant::kOther]], exact);
    if (blocked(b) && !blocked(a)) std::swap(a, b);  // the sum takes the blocked one's layout
    b = in_layout_of(a, b);
  }
  CHECK(req[0] != mxnet::kAddTo) << "gluonquant: the output of a quantizer cannot be added to an array";
  float *y = output(out[0], a), *kept = o.keep ? output(out[at.kept], a) : nullptr;
  if (y == nullptr || (o.keep && kept == nullptr)) {
    a = a.Reorder2Default();
    if (o.add) b = in_layout_of(a, b);
    y = output(out[0], a);
    if (o.keep) kept = output(out[at.kept], a);
  }
  gluonquant::Forward f = {memory(a), o.add ? memory(b) : nullptr, y, kept, {}};
  if (at.planes > 0)
    f.planes = gluonquant::planes_at(o, reinterpret_cast<uint8_t*>(parameter(out[at.planes])),
                                     gluonquant::plane_bytes(shape_of(in[0])));
  const int64_t real = a.shape().Size();
  gluonquant::activation_forward(o, parameters(o, in, 0).data(), f, {elements(a), real, a.shape()[0]},
                                 context.is_train);
}

// Inputs as the extension interface orders them: gradients of the outputs, the inputs, the outputs. `activation_gradient`
// has put the output, or for methods that read it again the input, in the place of every tensor that is not needed.
void activation_backward(const NodeAttrs& attrs, const mxnet::OpContext&, const Arrays& in, const Requests& req,
                         const Arrays& out) {
  const Options o = gluonquant::read_options(attrs.dict);
  const Outputs at(o);
  const int first = at.count, outputs = at.count + o.inputs;
  const bool exact = gluonquant::activation_needs_exact_extent(o);
  NDArray a = usable(in[o.residual() ? first : outputs], exact), b;
  if (o.residual() && o.add) {
    b = usable(in[first + o.at[gluonquant::kOther]], exact);
    if (blocked(b) && !blocked(a)) std::swap(a, b);
    b = in_layout_of(a, b);
  }
  const NDArray g = in_layout_of(a, in[0]), gk = o.keep ? in_layout_of(a, in[at.kept]) : NDArray();
  gluonquant::Planes planes;
  if (at.planes > 0)
    planes = gluonquant::planes_at(o, reinterpret_cast<uint8_t*>(parameter(in[outputs + at.planes])),
                                   gluonquant::plane_bytes(shape_of(a)));
  const gluonquant::Gradients gradients = gradients_of(o, req, out);
  const std::vector<float*> values = parameters(o, in, first);
  const int64_t real = a.shape().Size();
  deliver(out[0], req[0], a, g, [&](float* dx, bool accumulate) {
    gluonquant::activation_backward(o, values.data(),
                                    {memory(g), o.keep ? memory(gk) : nullptr, o.residual() ? memory(a) : nullptr,
                                     o.residual() && o.add ? memory(b) : nullptr, dx, accumulate, planes},
                                    {elements(a), real, a.shape()[0]}, gradients);
  });
}

// ---- weights: seldom blocked, and then put in order, since their rows matter

void weight_forward(const NodeAttrs& attrs, const mxnet::OpContext&, const Arrays& in, const Requests& req,
                    const Arrays& out) {
  if (req[0] == mxnet::kNullOp) return;
  CHECK(req[0] != mxnet::kAddTo) << "gluonquant: the output of a quantizer cannot be added to an array";
  const Options o = gluonquant::read_options(attrs.dict);
  const NDArray x = blocked(in[0]) ? in[0].Reorder2Default() : in[0];
  const std::vector<int64_t> shape = shape_of(x);
  gluonquant::weight_forward(o, parameters(o, in, 0).data(), memory(x), output(out[0], x),
                             gluonquant::rows_of(o, shape.data(), shape.size()));
}

// Inputs: gradient of the output, the inputs, the output.
void weight_backward(const NodeAttrs& attrs, const mxnet::OpContext&, const Arrays& in, const Requests& req,
                     const Arrays& out) {
  const Options o = gluonquant::read_options(attrs.dict);
  const NDArray x = blocked(in[1]) ? in[1].Reorder2Default() : in[1], g = in_layout_of(x, in[0]);
  const std::vector<int64_t> shape = shape_of(x);
  const gluonquant::Gradients gradients = gradients_of(o, req, out);
  const std::vector<float*> values = parameters(o, in, 1);
  deliver(out[0], req[0], x, g, [&](float* dx, bool accumulate) {
    gluonquant::weight_backward(o, values.data(), memory(g), memory(x), dx, accumulate,
                                gluonquant::rows_of(o, shape.data(), shape.size()), gradients);
  });
}

// ---- what the backward pass needs

// nnvm::Node as GCC 4.8 laid it out: its std::unordered_map is 8 bytes smaller than today's.
Entries& inputs_of(nnvm::Node* node) {
  return *reinterpret_cast<Entries*>(reinterpret_cast<char*>(node) + offsetof(nnvm::Node, inputs) - 8);
}

nnvm::FGradient activation_interface, weight_interface;  // the extension interface's own, which make the nodes

Entries activation_gradient(const ObjectPtr& node, const Entries& gradients) {
  const Options o = gluonquant::read_options(node->attrs.dict);
  const Outputs at(o);
  Entries made = activation_interface(node, gradients);
  Entries& in = inputs_of(made[0].node.get());
  const int first = at.count, outputs = at.count + o.inputs;
  CHECK_EQ(in.size(), static_cast<size_t>(outputs + at.count));
  const NodeEntry needed = in[o.residual() ? first : outputs];
  if (at.planes > 0) in[at.planes] = needed;  // the gradient of bits
  if (at.kept > 0) in[outputs + at.kept] = needed;
  if (o.residual()) {
    in[outputs] = needed;
  } else {
    in[first] = needed;
    if (o.add) in[first + o.at[gluonquant::kOther]] = needed;
  }
  const NodeEntry dx = gluonquant::activation_passes_gradient(o) ? gradients[0] : made[0];
  made[0] = dx;
  if (o.add) made.push_back(dx);  // the interface made one entry for each output, `other` is behind them
  return made;
}

Entries weight_gradient(const ObjectPtr& node, const Entries& gradients) {
  Entries made = weight_interface(node, gradients);
  Entries& in = inputs_of(made[0].node.get());
  in.back() = in[1];  // the output is not needed
  if (gluonquant::weight_passes_gradient(gluonquant::read_options(node->attrs.dict))) made[0] = gradients[0];
  return made;
}

// One output for the two gradients of a sum; shapes of outputs that no gradient refers to could not be inferred.
uint32_t activation_backward_outputs(const NodeAttrs& attrs) {
  const Options o = gluonquant::read_options(attrs.dict);
  return o.inputs - o.add;
}

std::vector<std::pair<int, int>> first_in_place(const NodeAttrs&) { return {{0, 0}}; }

// ---- the registry of operators

class Registry {
 public:
  template <class Value> static void set(const nnvm::Op* op, const char* name, Value value) {
    with_map(name, [&](dmlc::any* any) {
      nnvm::OpMap<Value>& map = map_of<Value>(any, name);
      if (map.data_.size() <= op->index_) map.data_.resize(op->index_ + 1, std::make_pair(Value(), 0));
      map.data_[op->index_] = std::make_pair(value, 12);  // a priority above that of the extension interface
    });
  }
  template <class Value> static Value get(const nnvm::Op* op, const char* name) {
    Value value;
    with_map(name, [&](dmlc::any* any) { value = map_of<Value>(any, name).data_.at(op->index_).first; });
    return value;
  }

 private:
  template <class Value> static nnvm::OpMap<Value>& map_of(dmlc::any* any, const char* name) {
    CHECK(!any->empty()) << "no operator has the attribute " << name;
    return *reinterpret_cast<nnvm::OpMap<Value>*>(any->data_.pheap);
  }
  // UpdateAttrMap takes a std::function<void(any*)>. GCC 4.8 calls it with the pointer itself, today's compilers with a
  // reference to the pointer; so the entry that it calls is replaced by one that takes the pointer.
  static void with_map(const char* name, const std::function<void(dmlc::any*)>& body) {
    static const std::function<void(dmlc::any*)>* current;
    current = &body;
    struct Entry {
      static void call(const std::_Any_data&, dmlc::any* map) { (*current)(map); }
    };
    std::function<void(dmlc::any*)> function = [](dmlc::any*) {};
    static_assert(sizeof function == 32, "std::function: 16 bytes of data, the manager, the entry");
    void* entry = reinterpret_cast<void*>(&Entry::call);
    std::copy_n(reinterpret_cast<char*>(&entry), sizeof entry, reinterpret_cast<char*>(&function) + 24);
    const_cast<nnvm::Op*>(nnvm::Op::Get("Activation"))->UpdateAttrMap(name, function);
  }
};

typedef std::function<std::vector<std::pair<int, int>>(const NodeAttrs&)> InplaceOption;

nnvm::FGradient take_over(const char* name, const char* backward_name, mxnet::FComputeEx forward,
                          mxnet::FComputeEx backward, nnvm::FGradient gradient) {
  const nnvm::Op *op = nnvm::Op::Get(name), *backward_op = nnvm::Op::Get(backward_name);
  const nnvm::FGradient interface = Registry::get<nnvm::FGradient>(op, "FGradient");
  for (const nnvm::Op* each : {op, backward_op}) {
    Registry::set<bool>(each, "TIsMKLDNN", true);
    Registry::set<InplaceOption>(each, "FInplaceOption", first_in_place);
  }
  Registry::set(op, "FComputeEx<cpu>", forward);
  Registry::set(backward_op, "FComputeEx<cpu>", backward);
  Registry::set(op, "FGradient", gradient);
  return interface;
}

std::string error;

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

PUBLIC const char* gluonquant_build() { return "gluonquant " GLUONQUANT_VERSION " for mxnet " GLUONQUANT_MXNET; }

PUBLIC const char* gluonquant_layout_error() { return error.c_str(); }

// 0, or 1 and an error. Once in a process.
PUBLIC int gluonquant_layout_enable() {
  static bool done = false;
  if (done) return 0;
  try {
    activation_interface = take_over("_gluonquant_blocked_activation", "_backward__gluonquant_blocked_activation",
                                     activation_forward, activation_backward, activation_gradient);
    const_cast<nnvm::Op*>(nnvm::Op::Get("_backward__gluonquant_blocked_activation"))->get_num_outputs =
        activation_backward_outputs;
    weight_interface = take_over("_gluonquant_blocked_weight", "_backward__gluonquant_blocked_weight", weight_forward,
                                 weight_backward, weight_gradient);
    done = true;
    return 0;
  } catch (const std::exception& problem) {
    error = problem.what();
    return 1;
  }
}

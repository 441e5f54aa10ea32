// The attributes of an operator node, read once per call into plain values.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

namespace gluonquant {

// Inputs besides the tensor: the quantizer's Parameters by name, and `training`, a flag made in the graph.
enum Input {
  kData, kOther, kTraining, kMode, kFrozen, kSteps, kAmax, kLo, kHi, kInitialized, kAlpha, kThreshold, kPhase, kScale,
  kOffset, kNudged, kCenter, kDistance, kGamma, kStart, kRatio, kHeldScale, kHeldZero, kInputs
};
static const char* const kInputNames[kInputs] = {
  "data", "other", "training", "mode", "frozen", "steps", "amax", "lo", "hi", "initialized", "alpha", "threshold",
  "phase", "scale", "offset", "nudged", "center", "distance", "gamma", "start", "ratio", "held_scale", "held_zero"
};

enum Method { kInt8, kAffine, kPact, kDorefa, kClipRelu, kLsq, kLsqPlus, kQil, kGdrq, kSawb, kMethods };
static const char* const kMethodNames[kMethods] = {
  "int8", "affine", "pact", "dorefa", "cliprelu", "lsq", "lsqplus", "qil", "gdrq", "sawb"
};

struct Options {
  Method method = kInt8;
  int at[kInputs];              // place of each input of the node, -1 = absent
  int inputs = 0;
  float qmin = 0, qmax = 0;
  bool is_signed = false, midrise = false, gate = false, rescale = false, detach = false;
  double decay = 0, percentile = 100, ktimes = 0, c1 = 0, c2 = 0, delay = 0;
  // Written by the graph pass that merges neighbours into the node.
  bool add = false, clamp = false, relu = false, keep = false;
  float low = -__builtin_inff(), high = __builtin_inff();
  // Rows of weights: consecutive groups along an axis; -1 = one row.
  int axis = -1, group = 1;

  bool has(Input i) const { return at[i] >= 0; }
  // Methods whose backward pass reads x again; the others get along with bits.
  bool residual() const { return method == kLsq || method == kLsqPlus || method == kQil; }
  bool has_pass() const { return !residual() && (gate || method == kPact || clamp); }
  bool has_open() const { return !residual() && (gate || method == kPact) && clamp && keep; }
  int sided() const { return method != kPact ? 0 : is_signed ? 2 : 1; }
  int planes() const { return has_pass() + has_open() + sided(); }
};

inline int find_name(const char* const* names, int count, const char* name, size_t length) {
  for (int i = 0; i < count; ++i)
    if (strlen(names[i]) == length && memcmp(names[i], name, length) == 0) return i;
  return -1;
}

// std::invalid_argument names an attribute that is missing or unknown. `Map` is a map of strings.
template <class Map>
Options read_options(const Map& attributes) {
  auto text = [&](const char* key) -> const char* {
    auto found = attributes.find(key);
    return found == attributes.end() ? nullptr : found->second.c_str();
  };
  auto number = [&](const char* key, double otherwise) {
    const char* value = text(key);
    return value ? strtod(value, nullptr) : otherwise;
  };
  auto required = [&](const char* key) {
    const char* value = text(key);
    if (value == nullptr) throw std::invalid_argument(std::string("attribute '") + key + "' is missing");
    return value;
  };
  Options o;
  const char* method = required("method");
  const int which = find_name(kMethodNames, kMethods, method, strlen(method));
  if (which < 0) throw std::invalid_argument(std::string("unknown method '") + method + "'");
  o.method = static_cast<Method>(which);
  for (int& place : o.at) place = -1;
  for (const char* name = required("inputs"); *name;) {
    const size_t length = strcspn(name, ",");
    const int input = find_name(kInputNames, kInputs, name, length);
    if (input < 0) throw std::invalid_argument("unknown input '" + std::string(name, length) + "'");
    o.at[input] = o.inputs++;
    name += length + (name[length] == ',');
  }
  if (o.at[kData] != 0) throw std::invalid_argument("the first input must be 'data'");
  if (o.has(kOther) && o.at[kOther] != o.inputs - 1) throw std::invalid_argument("'other' must be the last input");
  o.qmin = static_cast<float>(number("qmin", 0));
  o.qmax = static_cast<float>(number("qmax", 0));
  o.is_signed = number("signed", 0) != 0;
  o.midrise = number("midrise", 0) != 0;
  o.gate = number("gate", 0) != 0;
  o.rescale = number("rescale", 0) != 0;
  o.detach = number("detach", 0) != 0;
  o.decay = number("decay", 0);
  o.percentile = number("percentile", 100);
  o.ktimes = number("ktimes", 0);
  o.c1 = number("c1", 0);
  o.c2 = number("c2", 0);
  o.delay = number("delay", 0);
  o.add = o.has(kOther);
  o.low = static_cast<float>(number("low", -__builtin_inf()));
  o.high = static_cast<float>(number("high", __builtin_inf()));
  o.clamp = text("low") != nullptr || text("high") != nullptr;
  o.relu = number("relu", 0) != 0;
  o.keep = number("keep", 0) != 0;
  o.axis = static_cast<int>(number("axis", -1));
  o.group = static_cast<int>(number("group", 1));
  return o;
}

}  // namespace gluonquant

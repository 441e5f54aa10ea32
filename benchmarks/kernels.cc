// Times kernels and quantizers beside a triad, a[i] = b[i] + s * c[i], that moves as many bytes.
//
//     program                     prints the instruction set of the kernels
//     program ELEMENTS ROUNDS     prints a line for each round of each row: name, what moves, bytes per element,
//                                 seconds, seconds of the triad; tensors of ELEMENTS, a multiple of kRow
//
// What moves is a list of tensors that are read or written, each once for every pass that the method demands (a scale
// made of the whole tensor takes a pass of its own): 4 bytes per element, a plane of bits 1/8. A second pass over a row
// of a weight, where rows have their own scales, finds it in the cache and does not count. Nor do lines of memory that
// a store reads first, here as in the triad.
#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "quantizers.h"

namespace {

using namespace gluonquant;

constexpr int64_t kRow = 4096;       // elements of a weight that share a scale
constexpr int64_t kGap = 1024 + 16;  // elements between arrays, which would share cache sets otherwise
constexpr int64_t kWorthTiming = 1 << 22;

// One triad per instruction set; the compiler makes the vectors.
#define TRIAD(isa, ...)                                                                                       \
  __VA_ARGS__ void triad_##isa(float* __restrict a, const float* __restrict b, const float* __restrict c,     \
                               int64_t n) {                                                                   \
    for (int64_t i = 0; i < n; ++i) a[i] = b[i] + 3.0f * c[i];                                                \
  }
TRIAD(baseline)
#ifdef GLUONQUANT_X86
TRIAD(avx2, __attribute__((target("avx2"))))
TRIAD(avx512, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif

auto choose_triad() {
#ifdef GLUONQUANT_X86
  if (&kernels() == &kernels_avx512) return triad_avx512;
  if (&kernels() == &kernels_avx2) return triad_avx2;
#endif
  return triad_baseline;
}

double seconds(int64_t repeats, const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i) run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats;
}

using Words = std::vector<std::pair<std::string, std::string>>;

// "key=value key=value"; a word without a value stands for itself.
Words words(const std::string& text) {
  Words found;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) {
    const size_t end = word.find('=');
    found.emplace_back(word.substr(0, end), end == std::string::npos ? "" : word.substr(end + 1));
  }
  return found;
}

double bytes_of(const char* moves) {
  double bytes = 0;
  for (const auto& word : words(moves)) bytes += word.first == "plane" ? 0.125 : 4;
  return bytes;
}

// A node of the graph: options, and `rows` values of every Parameter.
struct Node {
  Options options;
  std::vector<std::vector<float>> values;
  std::vector<float*> in = {nullptr};
  Gradients gradients;
  Node(const char* attributes, const char* parameters, int64_t rows) {
    std::map<std::string, std::string> all;
    for (const auto& word : words(attributes)) all[word.first] = word.second;
    all["inputs"] = "data";
    for (const auto& word : words(parameters)) {
      all["inputs"] += "," + word.first;
      values.emplace_back(rows, strtof(word.second.c_str(), nullptr));
    }
    for (auto& value : values) in.push_back(value.data());
    options = read_options(all);
    spare.resize(rows);
    for (float*& to : gradients.to) to = spare.data();
  }

 private:
  std::vector<float> spare;
};

struct Row { std::string name; const char* moves; std::function<void()> run; };

class Bench {
 public:
  explicit Bench(int64_t n) : n_(n), memory_(new float[12 * (n + kGap)]) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> tile(std::min<int64_t>(n, 1 << 20) + 7);
    for (float& value : tile) value = normal(random);
    const int64_t all = 12 * (n + kGap), step = tile.size();
    for (int64_t i = 0; i < all; i += step) std::copy_n(tile.data(), std::min(step, all - i), &memory_[i]);
    add_kernels();
    add_activations();
    add_weights();
  }

  void run(int rounds) {
    const auto triad = choose_triad();
    const int64_t repeats = std::max<int64_t>(1, kWorthTiming / n_);
    for (int round = 0; round < rounds; ++round) {
      for (const Row& row : rows_) {
        const double bytes = bytes_of(row.moves);
        const int64_t m = static_cast<int64_t>(bytes * n_ / 12);  // up to 2 n: two slots for each array
        const double yardstick = seconds(repeats, [&] { triad(slot(6), slot(8), slot(10), m); });
        printf("%s\t%s\t%g\t%.9f\t%.9f\n", row.name.c_str(), row.moves, bytes, seconds(repeats, row.run), yardstick);
      }
    }
  }

 private:
  float* slot(int i) { return memory_.get() + i * (n_ + kGap); }
  uint8_t* plane(int i) { return reinterpret_cast<uint8_t*>(slot(5)) + i * (n_ / 8); }

  void add(const std::string& name, const char* moves, std::function<void()> run) {
    rows_.push_back({name, moves, std::move(run)});
  }

  void add_kernels() {
    const float *x = slot(0), *other = slot(1), *g = slot(2), *gk = slot(4);
    float *y = slot(3), *kept = slot(4);
    Levels levels;  // 4 bits, unsigned
    levels.round = kRound, levels.step = levels.scale = 0.2f, levels.low = 0, levels.high = 15;
    Clamp relu;
    relu.low = 0, relu.open_low = 1e-45f;
    Gate pact;
    pact.low = 0, pact.high = 3, pact.above = 3;
    Gate lsq;
    lsq.code_low = 0, lsq.code_high = 15;
    const Planes none, one = {plane(0), nullptr, nullptr, nullptr}, open = {plane(0), plane(1), nullptr, nullptr},
                 sided = {plane(0), nullptr, plane(1), nullptr};
    auto forward = [=](const char* name, const char* moves, Forward f, Clamp clamp) {
      add(name, moves, [=] { kernels().forward(f, n_, levels, clamp, pact); });
    };
    forward("forward", "x y", {x, nullptr, y, nullptr, none}, Clamp());
    forward("forward, clamp", "x y", {x, nullptr, y, nullptr, none}, relu);
    forward("forward, clamp, pass", "x y plane", {x, nullptr, y, nullptr, one}, relu);
    forward("forward, pass, above", "x y plane plane", {x, nullptr, y, nullptr, sided}, Clamp());
    forward("forward, add, clamp, kept", "x other y kept", {x, other, y, kept, none}, relu);
    forward("forward, add, clamp, kept, pass, open", "x other y kept plane plane", {x, other, y, kept, open}, relu);
    auto route = [=](const char* name, const char* moves, const float* gk, Planes planes) {
      const Backward f = {g, gk, nullptr, nullptr, y, false, planes};
      add(name, moves, [=] { kernels().route(f, n_); });
    };
    route("route, pass", "g dx plane", nullptr, one);
    route("route, pass, above", "g dx plane plane", nullptr, sided);
    route("route, kept, pass, open", "g gk dx plane plane", gk, open);
    auto residual = [=](const char* name, const char* moves, Backward f, Clamp clamp) {
      add(name, moves, [=] { kernels().learned(f, n_, levels, clamp, lsq); });
    };
    residual("residual", "g x dx", {g, nullptr, x, nullptr, y, false, none}, Clamp());
    residual("residual, add, clamp, kept", "g gk x other dx", {g, gk, x, other, y, false, none}, relu);
    add("statistics", "x", [=] { kernels().statistics(x, nullptr, n_, Clamp(), false); });
    add("statistics, moments", "x", [=] { kernels().statistics(x, nullptr, n_, Clamp(), true); });
  }

  // As the operators call them in training; a null `back` has no backward pass that moves anything.
  void activation(const std::string& name, const char* there, const char* back, const char* attributes,
                  const char* parameters) {
    auto node = std::make_shared<Node>(attributes, parameters, 1);
    const Extent extent = {n_, n_, 8};
    const Planes planes = planes_at(node->options, plane(0), n_ / 8);
    const Forward f = {slot(0), nullptr, slot(3), nullptr, planes};
    const Backward b = {slot(2), nullptr, slot(0), nullptr, slot(3), false, planes};
    add(name + " activation", there, [=] { activation_forward(node->options, node->in.data(), f, extent, true); });
    if (back)
      add(name + " activation, backward", back,
          [=] { activation_backward(node->options, node->in.data(), b, extent, node->gradients); });
  }

  void add_activations() {
    activation("pact", "x y plane plane", "g dx plane plane", "method=pact qmin=0 qmax=15",
               "mode=2 frozen=0 alpha=3 initialized=1");
    activation("lsq", "x y", "g x dx", "method=lsq qmin=0 qmax=15", "mode=2 frozen=0 scale=0.2 initialized=1");
    activation("int8", "x x y", nullptr, "method=int8 qmin=-7 qmax=7 signed=1 decay=0.99",
               "mode=2 frozen=0 amax=3");
    const std::string affine = "method=affine qmin=0 qmax=15 decay=0.99 gate=1";
    const char* state = "mode=2 frozen=0 lo=-3 hi=3 initialized=1";
    activation("affine", "x x y plane", "g dx plane", affine.c_str(), state);
    activation("affine, percentile 99.9,", "x x x y plane", nullptr, (affine + " percentile=99.9").c_str(), state);
  }

  void weight(const std::string& name, const char* there, const char* back, bool per_row, const char* attributes,
              const char* parameters) {
    const Rows rows = per_row ? Rows{1, n_ / kRow, kRow} : Rows{1, 1, n_};
    auto node = std::make_shared<Node>(attributes, parameters, rows.rows);
    float *x = slot(0), *g = slot(2), *y = slot(3);
    add(name + " weight", there, [=] { weight_forward(node->options, node->in.data(), x, y, rows); });
    if (back)
      add(name + " weight, backward", back,
          [=] { weight_backward(node->options, node->in.data(), g, x, y, false, rows, node->gradients); });
  }

  void add_weights() {
    weight("int8", "x y", nullptr, true, "method=int8 qmin=-7 qmax=7", "mode=2 frozen=0");
    weight("sawb", "x x y", nullptr, false, "method=sawb qmin=-15 qmax=15 midrise=1 c1=12.68 c2=-12.8",
           "mode=2 frozen=0");
    weight("lsq", "x y", "g x dx", true, "method=lsq qmin=-8 qmax=7", "mode=2 frozen=0 scale=0.2 initialized=1");
    weight("dorefa", "x x y", "x g x g dx", false, "method=dorefa qmin=-15 qmax=15 rescale=1", "mode=2");
    weight("qil", "x y", "g x dx", false, "method=qil qmin=-7 qmax=7 rescale=1",
           "mode=2 frozen=0 center=1.5 distance=1.5 gamma=1 initialized=1");
    weight("gdrq", "x x y", nullptr, false, "method=gdrq qmin=-7 qmax=7", "mode=2 frozen=0 phase=1 ratio=4");
  }

  int64_t n_;
  std::unique_ptr<float[]> memory_;  // slots 0 to 5 for the rows, 6 to 11 for the triad
  std::vector<Row> rows_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count == 3) {
    Bench(atoll(arguments[1])).run(atoi(arguments[2]));
  } else {
    puts(kernels().name);
  }
}

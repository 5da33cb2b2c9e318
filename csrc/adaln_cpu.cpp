// A norm with a modulation per sample, the gated residual before it, and both in one pass, on the CPU.
//
// x_new = x + gate * y and out = norm(x_new) * (1 + scale) + shift; either part may be absent, and the shift. The norm is
// LayerNorm, or RMSNorm, x / sqrt(variance + mean^2 + eps). All arithmetic is in float32, every result is rounded once.
// Statistics are those of x_new as stored: mean and variance with either norm.
//
// Gradients of gate, shift and scale are summed over chunks of 64 tokens in float32, chunks are added in float64 in
// order. Threads only take different chunks, so results have the same bits for any thread count, and on AVX2 and
// AVX-512 alike (see simd.h).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "native.h"
#include "simd.h"

namespace dit_fast::adaln {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kChunk = 64;     // tokens per float32 sum: part of the definition
constexpr int64_t kGrain = 32768;  // elements below which a thread of its own does not pay
constexpr int64_t kScratchRows = 8;

// [N, T, D] with unit stride along D; without data it is an absent part.
struct Stream {
  char* data = nullptr;
  int64_t sample_stride = 0, token_stride = 0;
  Type type = Type::kFloat;
  char* at(int64_t n, int64_t token) const {
    return data + (n * sample_stride + token * token_stride) * element_size(type);
  }
};

struct Shape {
  int64_t samples, tokens, width, padded;
  int64_t chunks() const { return (tokens + kChunk - 1) / kChunk; }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / (kChunk * width)); }
};

// Vectors of one sample in float32, [padded]; factor = 1 + scale.
struct Modulation {
  const float *gate, *shift, *factor, *zeros;
};

struct Forward {
  int64_t tokens, width, padded;
  float eps;
  bool rms;
  Stream x, y, x_new, out;
  const float *known_mean, *known_variance;  // [N, T] or null
  float *mean, *variance;                    // [N, T] or null
};

struct Backward {
  int64_t tokens, width, padded;
  float eps;
  bool rms;
  Stream grad_x_new, grad_out, x_new, y, grad_x, grad_y;
  const float *mean, *variance;  // [N, T]
};

#define DIT_FAST_KERNEL "adaln_kernel.inc"
#include "each_level.inc"

Shape read_shape(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 3, what, " must be [N, T, D]");
  const int64_t width = tensor.size(2);
  STD_TORCH_CHECK(width > 0, what, " has no channels");
  return {tensor.size(0), tensor.size(1), width, (width + kLanes - 1) / kLanes * kLanes};
}

Stream read_stream(const Maybe& tensor, const Shape& shape, const char* what) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->is_cpu(), what, " must be a CPU tensor");
  const bool fits = tensor->dim() == 3 && tensor->size(0) == shape.samples && tensor->size(1) == shape.tokens &&
                    tensor->size(2) == shape.width;
  STD_TORCH_CHECK(fits, what, " must be [", shape.samples, ", ", shape.tokens, ", ", shape.width, "]");
  STD_TORCH_CHECK(tensor->stride(2) == 1 || shape.width == 1, what, " must have a contiguous last dimension");
  return {static_cast<char*>(tensor->data_ptr()), tensor->stride(0), tensor->stride(1), read_type(*tensor, what)};
}

// A vector per sample, [N, D], as a stream of one token.
Stream read_vectors(const Maybe& tensor, const Shape& shape, const char* what) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->is_cpu(), what, " must be a CPU tensor");
  const bool fits = tensor->dim() == 2 && tensor->size(0) == shape.samples && tensor->size(1) == shape.width;
  STD_TORCH_CHECK(fits, what, " must be [", shape.samples, ", ", shape.width, "]");
  STD_TORCH_CHECK(tensor->stride(1) == 1 || shape.width == 1, what, " must have a contiguous last dimension");
  return {static_cast<char*>(tensor->data_ptr()), tensor->stride(0), 0, read_type(*tensor, what)};
}

float* read_row_floats(const Maybe& tensor, const Shape& shape, const char* what) {
  return tensor ? read_floats(*tensor, shape.samples * shape.tokens, what) : nullptr;
}

float load_one(Type type, const char* from, int64_t index) {
  if (type == Type::kFloat) return reinterpret_cast<const float*>(from)[index];
  const uint16_t narrow = reinterpret_cast<const uint16_t*>(from)[index];
  return type == Type::kBfloat16 ? float_from_bits(static_cast<uint32_t>(narrow) << 16) : float_from_half(narrow);
}

void store_one(Type type, char* to, int64_t index, float value) {
  if (type == Type::kFloat)
    reinterpret_cast<float*>(to)[index] = value;
  else
    reinterpret_cast<uint16_t*>(to)[index] =
        type == Type::kBfloat16 ? bfloat16_from_float(value) : half_from_float(value);
}

// Memory of one thread: the vectors of the sample last asked for, in float32, and a few rows.
class Scratch {
 public:
  Scratch(const Shape& shape, const Stream& gate, const Stream& shift, const Stream& scale)
      : shape_(shape), vectors_{gate, shift, scale}, values_((4 + kScratchRows) * shape.padded) {}

  Modulation modulation(int64_t n) {
    if (n != sample_) {
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t d = 0; vectors_[i].data != nullptr && d < shape_.width; ++d)
          at(i)[d] = load_one(vectors_[i].type, vectors_[i].at(n, 0), d);
      for (int64_t d = 0; vectors_[2].data != nullptr && d < shape_.width; ++d) at(2)[d] += 1.0f;
      sample_ = n;
    }
    return {at(0), at(1), at(2), at(3)};
  }

  float* rows() { return at(4); }

 private:
  float* at(int64_t row) { return values_.data() + row * shape_.padded; }

  const Shape shape_;
  const Stream vectors_[3];
  std::vector<float> values_;
  int64_t sample_ = -1;
};

// Fills x_new (with y and gate), out (with scale; shift may be absent), mean and variance [N, T], each where it is given.
// known_mean and known_variance replace the statistics of x; they exclude y.
void adaln_forward(Tensor x, Maybe y, Maybe gate, Maybe shift, Maybe scale, Maybe known_mean, Maybe known_variance,
                   double eps, bool rms, Maybe x_new, Maybe out, Maybe mean, Maybe variance, int64_t level) {
  const Shape shape = read_shape(x, "x");
  STD_TORCH_CHECK(y.has_value() == gate.has_value() && y.has_value() == x_new.has_value(),
                  "y, gate and x_new go together");
  STD_TORCH_CHECK(scale.has_value() == out.has_value() && (out || !shift), "shift goes with scale, scale with out");
  STD_TORCH_CHECK(mean.has_value() == variance.has_value() && known_mean.has_value() == known_variance.has_value(),
                  "mean and variance go together");
  STD_TORCH_CHECK(!known_mean || (!y && !mean), "known statistics are those of x itself and are not measured again");
  const Forward pass{shape.tokens,
                     shape.width,
                     shape.padded,
                     static_cast<float>(eps),
                     rms,
                     read_stream(x, shape, "x"),
                     read_stream(y, shape, "y"),
                     read_stream(x_new, shape, "x_new"),
                     read_stream(out, shape, "out"),
                     read_row_floats(known_mean, shape, "known_mean"),
                     read_row_floats(known_variance, shape, "known_variance"),
                     read_row_floats(mean, shape, "mean"),
                     read_row_floats(variance, shape, "variance")};
  const Stream gates = read_vectors(gate, shape, "gate"), shifts = read_vectors(shift, shape, "shift"),
               scales = read_vectors(scale, shape, "scale");
  const Level isa = resolve(level);
  const int64_t chunks = shape.chunks();
  torch::stable::parallel_for(0, shape.samples * chunks, shape.grain(), [&](int64_t first, int64_t last) {
    Scratch scratch(shape, gates, shifts, scales);
    for (int64_t task = first; task < last; ++task) {
      const int64_t n = task / chunks, begin = task % chunks * kChunk, end = std::min(shape.tokens, begin + kChunk);
      DIT_FAST_AT_LEVEL(isa, forward_chunk(pass, scratch.modulation(n), n, begin, end, scratch.rows()));
    }
  });
}

// Writes column sums [N, chunks, 3, padded] into the gradients of gate, shift and scale, where they are wanted.
void add_chunks(const Shape& shape, const float* partials, const Stream* grads) {
  torch::stable::parallel_for(0, shape.samples, kGrain, [&](int64_t first, int64_t last) {
    std::vector<double> sums(shape.width);
    for (int64_t n = first; n < last; ++n)
      for (int64_t row = 0; row < 3; ++row) {
        if (grads[row].data == nullptr) continue;
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t chunk = 0; chunk < shape.chunks(); ++chunk) {
          const float* partial = partials + ((n * shape.chunks() + chunk) * 3 + row) * shape.padded;
          for (int64_t d = 0; d < shape.width; ++d) sums[d] += partial[d];
        }
        for (int64_t d = 0; d < shape.width; ++d)
          store_one(grads[row].type, grads[row].at(n, 0), d, static_cast<float>(sums[d]));
      }
  });
}

// Fills, with y, grad_y and grad_gate, with grad_out grad_x, grad_scale and, where it is given, grad_shift. Without
// grad_out the gradient of x is grad_x_new.
// At least one of grad_x_new and grad_out is given; x_new, scale, mean and variance are read with grad_out only.
void adaln_backward(Maybe grad_x_new, Maybe grad_out, Maybe x_new, Maybe y, Maybe gate, Maybe scale, Maybe mean,
                    Maybe variance, double eps, bool rms, Maybe grad_x, Maybe grad_y, Maybe grad_gate, Maybe grad_shift,
                    Maybe grad_scale, int64_t level) {
  STD_TORCH_CHECK(grad_x_new || grad_out, "grad_x_new and grad_out are both absent");
  STD_TORCH_CHECK(!grad_out || (x_new && scale && mean && variance), "grad_out needs x_new, scale, mean and variance");
  const Shape shape = grad_out ? read_shape(*x_new, "x_new") : read_shape(*grad_x_new, "grad_x_new");
  STD_TORCH_CHECK(grad_x.has_value() == grad_out.has_value(), "grad_x goes with grad_out");
  STD_TORCH_CHECK(y.has_value() == gate.has_value() && y.has_value() == grad_y.has_value() &&
                      y.has_value() == grad_gate.has_value(),
                  "y, gate, grad_y and grad_gate go together");
  STD_TORCH_CHECK(grad_scale.has_value() == grad_out.has_value() && (grad_out || !grad_shift),
                  "grad_shift goes with grad_scale, grad_scale with grad_out");
  const Backward pass{shape.tokens,
                      shape.width,
                      shape.padded,
                      static_cast<float>(eps),
                      rms,
                      read_stream(grad_x_new, shape, "grad_x_new"),
                      read_stream(grad_out, shape, "grad_out"),
                      read_stream(x_new, shape, "x_new"),
                      read_stream(y, shape, "y"),
                      read_stream(grad_x, shape, "grad_x"),
                      read_stream(grad_y, shape, "grad_y"),
                      read_row_floats(mean, shape, "mean"),
                      read_row_floats(variance, shape, "variance")};
  const Stream gates = read_vectors(gate, shape, "gate"), scales = read_vectors(scale, shape, "scale");
  const Stream grads[3] = {read_vectors(grad_gate, shape, "grad_gate"), read_vectors(grad_shift, shape, "grad_shift"),
                           read_vectors(grad_scale, shape, "grad_scale")};
  const Level isa = resolve(level);
  const int64_t chunks = shape.chunks(), tasks = shape.samples * chunks, columns = 3 * shape.padded;
  const auto partials = std::make_unique_for_overwrite<float[]>(tasks * columns);
  torch::stable::parallel_for(0, tasks, shape.grain(), [&](int64_t first, int64_t last) {
    Scratch scratch(shape, gates, {}, scales);
    for (int64_t task = first; task < last; ++task) {
      const int64_t n = task / chunks, begin = task % chunks * kChunk, end = std::min(shape.tokens, begin + kChunk);
      float* sums = partials.get() + task * columns;
      std::fill(sums, sums + columns, 0.0f);
      DIT_FAST_AT_LEVEL(isa, backward_chunk(pass, scratch.modulation(n), n, begin, end, scratch.rows(), sums));
    }
  });
  add_chunks(shape, partials.get(), grads);
}

}  // namespace dit_fast::adaln

STABLE_TORCH_LIBRARY_FRAGMENT(dit_fast_native, m) {
  m.def(
      "adaln_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? known_mean, "
      "Tensor? known_variance, float eps, bool rms, Tensor(a!)? x_new, Tensor(b!)? out, Tensor(c!)? mean, "
      "Tensor(d!)? variance, int level) -> ()");
  m.def(
      "adaln_backward(Tensor? grad_x_new, Tensor? grad_out, Tensor? x_new, Tensor? y, Tensor? gate, Tensor? scale, "
      "Tensor? mean, Tensor? variance, float eps, bool rms, Tensor(a!)? grad_x, Tensor(b!)? grad_y, Tensor(c!)? grad_gate, "
      "Tensor(d!)? grad_shift, Tensor(e!)? grad_scale, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CPU, m) {
  m.impl("adaln_forward", TORCH_BOX(&dit_fast::adaln::adaln_forward));
  m.impl("adaln_backward", TORCH_BOX(&dit_fast::adaln::adaln_backward));
}

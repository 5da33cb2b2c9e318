// GELU (tanh form), its gradient with the activation and the bias's gradient in one pass, and sums of columns, on the CPU.
//
// All arithmetic is in float32, every result is rounded once. Columns are summed over chunks of 64 rows in float32, and
// chunks are added in float64 in order: the same bits for any thread count, on AVX2 and AVX-512 alike (see simd.h).

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

namespace dit_fast::gelu {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kChunk = 64;     // rows per float32 sum: part of the definition
constexpr int64_t kGrain = 32768;  // elements below which a thread of its own does not pay

struct Backward {
  Type type;
  int64_t width;
  const char *hidden, *grad;
  char *grad_hidden, *activation;  // activation may be null
};

#define DIT_FAST_KERNEL "gelu_kernel.inc"
#include "each_level.inc"

char* read_like(const Tensor& tensor, const Tensor& hidden, const char* what) {
  const bool same = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == hidden.scalar_type() &&
                    tensor.numel() == hidden.numel();
  STD_TORCH_CHECK(same, what, " must be a contiguous CPU tensor of hidden's size and type");
  return static_cast<char*>(tensor.data_ptr());
}

// Calls add(first row, last row, sums of a chunk) for every chunk of rows, and writes the columns' sums, if wanted.
template <typename Add>
void by_chunks(int64_t rows, int64_t width, float* columns, const Add& add) {
  const int64_t chunks = (rows + kChunk - 1) / kChunk, padded = (width + kLanes - 1) / kLanes * kLanes;
  const auto partials = std::make_unique<float[]>(columns ? chunks * padded : 0);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kChunk * width));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      add(chunk * kChunk, std::min(rows, (chunk + 1) * kChunk), columns ? partials.get() + chunk * padded : nullptr);
  });
  if (columns == nullptr) return;
  std::vector<double> sums(width);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t d = 0; d < width; ++d) sums[d] += partials[chunk * padded + d];
  for (int64_t d = 0; d < width; ++d) columns[d] = static_cast<float>(sums[d]);
}

void gelu_forward(Tensor hidden, Tensor activation, int64_t level) {
  const Type type = read_type(hidden, "hidden");
  const char* from = read_like(hidden, hidden, "hidden");
  char* to = read_like(activation, hidden, "activation");
  const Level isa = resolve(level);
  const int64_t size = hidden.numel(), tasks = (size + kGrain - 1) / kGrain;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kGrain, end = std::min(size, last * kGrain);
    DIT_FAST_AT_LEVEL(isa, forward(type, from, to, begin, end));
  });
}

// Fills grad_hidden, which may be grad itself, and, where they are given, activation and grad_bias [F] in float32.
void gelu_backward(Tensor hidden, Tensor grad, Tensor grad_hidden, Maybe activation, Maybe grad_bias, int64_t level) {
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) > 0, "hidden must be [M, F]");
  const int64_t width = hidden.size(1);
  const Backward pass{read_type(hidden, "hidden"),
                      width,
                      read_like(hidden, hidden, "hidden"),
                      read_like(grad, hidden, "grad"),
                      read_like(grad_hidden, hidden, "grad_hidden"),
                      activation ? read_like(*activation, hidden, "activation") : nullptr};
  float* columns = grad_bias ? read_floats(*grad_bias, width, "grad_bias") : nullptr;
  const Level isa = resolve(level);
  by_chunks(hidden.size(0), width, columns, [&](int64_t begin, int64_t end, float* sums) {
    DIT_FAST_AT_LEVEL(isa, backward_rows(pass, begin, end, sums));
  });
}

// Sums of the columns of x [M, F], rows contiguous, into [F] in float32.
void column_sums(Tensor x, Tensor sums, int64_t level) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) > 0, "x must be a CPU tensor [M, F]");
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "x must have a contiguous last dimension");
  const Type type = read_type(x, "x");
  const char* from = static_cast<const char*>(x.data_ptr());
  const int64_t width = x.size(1), stride = x.stride(0);
  const Level isa = resolve(level);
  by_chunks(x.size(0), width, read_floats(sums, width, "sums"), [&](int64_t begin, int64_t end, float* chunk) {
    DIT_FAST_AT_LEVEL(isa, add_rows(type, from, stride, width, begin, end, chunk));
  });
}

}  // namespace dit_fast::gelu

STABLE_TORCH_LIBRARY_FRAGMENT(dit_fast_native, m) {
  m.def("gelu_forward(Tensor hidden, Tensor(a!) activation, int level) -> ()");
  m.def(
      "gelu_backward(Tensor hidden, Tensor grad, Tensor(a!) grad_hidden, Tensor(b!)? activation, "
      "Tensor(c!)? grad_bias, int level) -> ()");
  m.def("column_sums(Tensor x, Tensor(a!) sums, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&dit_fast::gelu::gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&dit_fast::gelu::gelu_backward));
  m.impl("column_sums", TORCH_BOX(&dit_fast::gelu::column_sums));
}

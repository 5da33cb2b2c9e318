// Products of many rows with a weight, in float32, on the CPU.
//
// The weight is packed once into panels of sixteen columns, a block of its rows at a time, so that the inner loop reads
// it in order from the L1 cache. A result is one sum, term after term in the order of the inner dimension: the same bits
// for any thread count, on AVX2 and AVX-512 alike (see simd.h).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "native.h"
#include "simd.h"

namespace dit_fast::product {

using torch::stable::Tensor;

constexpr int64_t kBlockDepth = 320;  // a panel of so many rows, 20 KiB, stays in the L1 cache
constexpr int64_t kBlockRows = 48;    // of a, which stay in the L2 cache

// c [rows, columns] = a [rows, depth] b [depth, columns] + bias; strides of a and b in elements, a's rows contiguous.
struct Factors {
  const float *a, *b, *bias;
  float* c;
  int64_t rows, columns, depth, a_row, b_step, b_column;
};

#define DIT_FAST_KERNEL "product_kernel.inc"
#include "each_level.inc"

const float* read_matrix(const Tensor& tensor, const char* what) {
  const bool fits = tensor.is_cpu() && tensor.dim() == 2 && read_type(tensor, what) == Type::kFloat;
  STD_TORCH_CHECK(fits, what, " must be a float32 CPU matrix");
  return static_cast<const float*>(tensor.data_ptr());
}

void product(Tensor a, Tensor b, std::optional<Tensor> bias, Tensor c, int64_t level) {
  const Factors all{read_matrix(a, "a"),
                    read_matrix(b, "b"),
                    bias ? read_floats(*bias, b.size(1), "bias") : nullptr,
                    read_floats(c, a.size(0) * b.size(1), "c"),
                    a.size(0),
                    b.size(1),
                    a.size(1),
                    a.stride(0),
                    b.stride(0),
                    b.stride(1)};
  STD_TORCH_CHECK(a.stride(1) == 1 && all.depth > 0, "a must have contiguous rows");
  STD_TORCH_CHECK(b.size(0) == all.depth && all.columns % kLanes == 0, "b must be [", all.depth, ", a multiple of ",
                  kLanes, "]");
  const Level isa = resolve(level);
  const auto packed = std::make_unique_for_overwrite<float[]>(all.depth * all.columns);
  torch::stable::parallel_for(0, all.columns / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < all.depth; first += kBlockDepth) {
      const int64_t depth = std::min(kBlockDepth, all.depth - first);
      float* block = packed.get() + first * all.columns;
      for (int64_t panel = begin; panel < end; ++panel)
        DIT_FAST_AT_LEVEL(isa, pack(all, first, depth, panel * kLanes, block + panel * depth * kLanes));
    }
  });
  torch::stable::parallel_for(0, (all.rows + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(all.rows, end * kBlockRows);
    DIT_FAST_AT_LEVEL(isa, multiply_rows(all, packed.get(), begin * kBlockRows, last));
  });
}

}  // namespace dit_fast::product

STABLE_TORCH_LIBRARY_FRAGMENT(dit_fast_native, m) {
  m.def("product(Tensor a, Tensor b, Tensor? bias, Tensor(a!) c, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CPU, m) { m.impl("product", TORCH_BOX(&dit_fast::product::product)); }

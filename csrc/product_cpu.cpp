// Matrix products in float32 on the CPU: of many rows with a weight, and the gradients of weights, sums over many rows.
//
// The second factor is packed into panels of sixteen columns, so that the inner loop reads it in order from the L1
// cache. So is the first one where its columns are contiguous. A result is a sum over blocks of the inner dimension, in
// order, of sums term after term: the same bits for any thread count, on AVX2 and AVX-512 alike (see simd.h), and
// errors that grow with a block's depth, not with thousands of rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "native.h"
#include "simd.h"

namespace dit_fast::product {

using torch::stable::Tensor;

constexpr int64_t kBlockDepth = 320;  // terms of a sum: part of the definition; a panel, 20 KiB, stays in the L1 cache
constexpr int64_t kBlockRows = 24;    // of a where it lies
constexpr int64_t kPackedRows = 96;   // of a as packed, for all panels of b: 120 KiB, in the L2 cache

// c [rows, columns] = a [rows, depth] b [depth, columns] + bias; strides of a and b in elements.
struct Factors {
  const float *a, *b, *bias;
  float* c;
  int64_t rows, columns, depth, a_row, a_step, b_step, b_column;
};

#define DIT_FAST_KERNEL "product_kernel.inc"
#include "each_level.inc"

// Where a vector lies in one line of the cache: two lines cost two loads.
struct alignas(kLanes * sizeof(float)) Line {
  float lanes[kLanes];
};

auto lines(int64_t floats) { return std::make_unique_for_overwrite<Line[]>((floats + kLanes - 1) / kLanes); }

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
                    a.stride(1),
                    b.stride(0),
                    b.stride(1)};
  STD_TORCH_CHECK(all.a_row == 1 || all.a_step == 1, "a must have contiguous rows or columns");
  const bool fits = all.depth > 0 && b.size(0) == all.depth && all.columns % kLanes == 0;
  STD_TORCH_CHECK(fits, "b must be [", all.depth, ", a multiple of ", kLanes, "]");
  const Level isa = resolve(level);
  // A weight is packed whole, and a block of rows stays in the cache until it is done. Thousands of rows are packed
  // block by block into the same memory, and c is what comes by again.
  const bool whole = all.a_step == 1;
  const int64_t pass = whole ? all.depth : kBlockDepth, rows = whole ? kBlockRows : kPackedRows;
  const auto packed = lines(std::min(pass, all.depth) * all.columns);
  for (int64_t begin = 0; begin < all.depth; begin += pass) {
    const auto each_block = [&](const auto& work) {
      for (int64_t first = begin; first < std::min(all.depth, begin + pass); first += kBlockDepth)
        work(first, std::min(kBlockDepth, all.depth - first), packed[0].lanes + (first - begin) * all.columns);
    };
    torch::stable::parallel_for(0, all.columns / kLanes, 1, [&](int64_t panel, int64_t last) {
      each_block([&](int64_t first, int64_t depth, float* to) {
        DIT_FAST_AT_LEVEL(isa, pack(all, first, depth, panel, last, to));
      });
    });
    torch::stable::parallel_for(0, (all.rows + rows - 1) / rows, 1, [&](int64_t task, int64_t last) {
      const auto scratch = lines(whole ? 0 : rows * kBlockDepth);
      for (; task < last; ++task)
        each_block([&](int64_t first, int64_t depth, const float* from) {
          const int64_t row = task * rows, end = std::min(all.rows, row + rows);
          DIT_FAST_AT_LEVEL(isa, multiply_rows(all, first, depth, from, scratch[0].lanes, row, end));
        });
    });
  }
}

}  // namespace dit_fast::product

STABLE_TORCH_LIBRARY_FRAGMENT(dit_fast_native, m) {
  m.def("product(Tensor a, Tensor b, Tensor? bias, Tensor(a!) c, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CPU, m) { m.impl("product", TORCH_BOX(&dit_fast::product::product)); }

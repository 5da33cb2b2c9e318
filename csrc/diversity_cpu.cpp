// Diversity statistics and their gradient on the CPU, against torch's stable ABI.
//
// Tokens are cut into chunks of 256, whatever the number of threads; a chunk is summed in float32 in one order, chunks
// are added in float64 in index order. Threads only take different ranges of chunks, so results have the same bits for
// any thread count, and on AVX2 and AVX-512 alike (see simd.h).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native.h"
#include "simd.h"

namespace dit_fast::diversity {

using torch::stable::Tensor;

constexpr float kNormFloor = 1e-8f;
constexpr int64_t kChunk = 256;     // tokens per float32 sum: part of the op's definition
constexpr int64_t kMaxRanges = 64;  // float64 partial sums kept; the cut depends on the token count alone
constexpr size_t kMix = 4;          // rows of the gradient formed together

struct Block {
  char* data;
  int64_t row_stride;
  Type type;
  char* at(int64_t token, int64_t channel) const { return data + (token * row_stride + channel) * element_size(type); }
};

struct Shape {
  int64_t blocks, tokens, width, padded;
};

// Blocks whose gradients are formed together, the blocks whose directions enter them, and with which weights.
struct Group {
  std::vector<int64_t> members;    // block index of each row
  std::vector<int64_t> positions;  // its place in `out` and `upstream`
  std::vector<int64_t> sources;    // blocks with a weight other than zero for at least one member
  std::vector<float> weights;      // [source, kMix]
};

struct Gradient {
  const float* statistics;     // [3, K, padded]: d/d sums, d/d abs_sums, 2 d/d square_sums
  const float* inverse_norms;  // [K, M]
  const Block* out;
  const Block* upstream;  // null: nothing to add
  std::vector<Group> groups;
  std::vector<int64_t> needed;  // blocks whose rows are read
};

struct Scratch {
  std::vector<const float*> rows;
  std::vector<float> converted, inverse, zeros, mixed, coefficients;

  Scratch(const Shape& shape, int64_t tile)
      : rows(tile * shape.blocks),
        converted(tile * shape.blocks * shape.padded),
        inverse(tile * shape.blocks),
        zeros(shape.padded),
        mixed(tile * kMix * shape.padded),
        coefficients(shape.blocks * kMix) {}
};

#define DIT_FAST_KERNEL "diversity_kernel.inc"
#include "each_level.inc"

constexpr int64_t kTokensPerTile = portable::kTile;

std::vector<Block> read_blocks(const std::vector<Tensor>& tensors, const Shape& shape, const char* what) {
  std::vector<Block> blocks;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2, what, " must be CPU tensors [M, D]");
    STD_TORCH_CHECK(tensor.size(0) == shape.tokens && tensor.size(1) == shape.width, what, " differ in shape");
    STD_TORCH_CHECK(tensor.stride(1) == 1 || shape.width == 1, what, " must have a contiguous last dimension");
    blocks.push_back({static_cast<char*>(tensor.data_ptr()), tensor.stride(0), read_type(tensor, what)});
  }
  return blocks;
}

Shape read_shape(const std::vector<Tensor>& features) {
  STD_TORCH_CHECK(!features.empty() && features[0].dim() == 2, "features must be at least one tensor [M, D]");
  const int64_t width = features[0].size(1);
  STD_TORCH_CHECK(features[0].size(0) > 0 && width > 0, "features have no elements");
  return {static_cast<int64_t>(features.size()), features[0].size(0), width, (width + kLanes - 1) / kLanes * kLanes};
}

// The mixture as a block, or nothing if it is empty.
std::vector<Block> read_mixture(const Tensor& mixture, const Shape& shape) {
  if (mixture.numel() == 0) return {};
  read_floats(mixture, shape.tokens * shape.width, "mixture");
  return read_blocks({mixture}, shape, "mixture");
}

// Fills statistics [3, K, D] (sums of x, |x|, x^2), pair_sums [K, K], inverse_norms [K, M] and, unless it is empty,
// mixture [M, D], the sum of all blocks' directions.
void diversity_forward(std::vector<Tensor> features, Tensor statistics, Tensor pair_sums, Tensor inverse_norms,
                       Tensor mixture, int64_t level) {
  const Shape shape = read_shape(features);
  const std::vector<Block> blocks = read_blocks(features, shape, "features");
  float* out = read_floats(statistics, 3 * shape.blocks * shape.width, "statistics");
  float* out_pairs = read_floats(pair_sums, shape.blocks * shape.blocks, "pair_sums");
  float* norms = read_floats(inverse_norms, shape.blocks * shape.tokens, "inverse_norms");
  const std::vector<Block> mixed = read_mixture(mixture, shape);
  const Level isa = resolve(level);

  const int64_t chunks = (shape.tokens + kChunk - 1) / kChunk;
  const int64_t per_range = (chunks + kMaxRanges - 1) / kMaxRanges;
  const int64_t ranges = (chunks + per_range - 1) / per_range;
  const int64_t columns = 3 * shape.blocks * shape.padded, total = columns + shape.blocks * shape.blocks;
  std::vector<double> partials(ranges * total);
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(shape, kTokensPerTile);
    std::vector<float> sums(total);
    for (int64_t range = first; range < last; ++range) {
      double* partial = partials.data() + range * total;
      for (int64_t chunk = range * per_range; chunk < std::min(chunks, (range + 1) * per_range); ++chunk) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        const int64_t end = std::min(shape.tokens, (chunk + 1) * kChunk);
        DIT_FAST_AT_LEVEL(
            isa, forward_chunk(shape, blocks.data(), chunk * kChunk, end, norms, mixed.empty() ? nullptr : mixed.data(),
                               scratch, sums.data(), sums.data() + columns));
        for (int64_t i = 0; i < total; ++i) partial[i] += sums[i];
      }
    }
  });
  for (int64_t range = 1; range < ranges; ++range)
    for (int64_t i = 0; i < total; ++i) partials[i] += partials[range * total + i];
  for (int64_t row = 0; row < 3 * shape.blocks; ++row)
    for (int64_t d = 0; d < shape.width; ++d)
      out[row * shape.width + d] = static_cast<float>(partials[row * shape.padded + d]);
  for (int64_t k = 0; k < shape.blocks; ++k)
    for (int64_t l = 0; l < shape.blocks; ++l)
      out_pairs[k * shape.blocks + l] =
          static_cast<float>(partials[columns + std::min(k, l) * shape.blocks + std::max(k, l)]);
}

// Groups of kMix wanted blocks; sources with no weight are left out, so a short pair list costs little.
void plan(Gradient& gradient, const std::vector<int64_t>& wanted, const float* pairs, int64_t count) {
  std::vector<bool> needed(count, false);
  for (size_t first = 0; first < wanted.size(); first += kMix) {
    Group group;
    for (size_t i = first; i < std::min(wanted.size(), first + kMix); ++i) {
      group.members.push_back(wanted[i]);
      group.positions.push_back(static_cast<int64_t>(i));
      needed[wanted[i]] = true;
    }
    for (int64_t l = 0; l < count; ++l) {
      float weights[kMix] = {};
      for (size_t i = 0; i < group.members.size(); ++i) {
        const int64_t k = group.members[i];
        weights[i] = pairs[k * count + l] + pairs[l * count + k];
      }
      if (std::all_of(weights, weights + kMix, [](float weight) { return weight == 0.0f; })) continue;
      group.sources.push_back(l);
      group.weights.insert(group.weights.end(), weights, weights + kMix);
      needed[l] = true;
    }
    gradient.groups.push_back(std::move(group));
  }
  for (int64_t k = 0; k < count; ++k)
    if (needed[k]) gradient.needed.push_back(k);
}

// Fills out[i] [M, D] with the gradient of block wanted[i], plus upstream[i] where upstream is not empty.
// grad_statistics is [3, K, D], grad_pair_sums [K, K].
void diversity_backward(std::vector<Tensor> features, Tensor inverse_norms, Tensor grad_statistics,
                        Tensor grad_pair_sums, std::vector<Tensor> upstream, std::vector<int64_t> wanted,
                        std::vector<Tensor> out, int64_t level) {
  const Shape shape = read_shape(features);
  const std::vector<Block> blocks = read_blocks(features, shape, "features");
  const std::vector<Block> above = read_blocks(upstream, shape, "upstream");
  const std::vector<Block> results = read_blocks(out, shape, "out");
  STD_TORCH_CHECK(results.size() == wanted.size(), "out must have one tensor per wanted block");
  STD_TORCH_CHECK(above.empty() || above.size() == wanted.size(), "upstream must have one tensor per wanted block");
  for (int64_t k : wanted) STD_TORCH_CHECK(0 <= k && k < shape.blocks, "no block ", k);
  const float* grads = read_floats(grad_statistics, 3 * shape.blocks * shape.width, "grad_statistics");
  const float* pairs = read_floats(grad_pair_sums, shape.blocks * shape.blocks, "grad_pair_sums");
  const Level isa = resolve(level);

  std::vector<float> padded(3 * shape.blocks * shape.padded);
  for (int64_t row = 0; row < 3 * shape.blocks; ++row) {
    const float factor = row < 2 * shape.blocks ? 1.0f : 2.0f;
    for (int64_t d = 0; d < shape.width; ++d) padded[row * shape.padded + d] = factor * grads[row * shape.width + d];
  }
  Gradient gradient{padded.data(),
                    read_floats(inverse_norms, shape.blocks * shape.tokens, "inverse_norms"),
                    results.data(),
                    above.empty() ? nullptr : above.data(),
                    {},
                    {}};
  plan(gradient, wanted, pairs, shape.blocks);

  const int64_t chunks = (shape.tokens + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(shape, kTokensPerTile);
    const int64_t end = std::min(shape.tokens, last * kChunk);
    DIT_FAST_AT_LEVEL(isa, backward_chunk(shape, blocks.data(), gradient, first * kChunk, end, scratch));
  });
}

}  // namespace dit_fast::diversity

STABLE_TORCH_LIBRARY_FRAGMENT(dit_fast_native, m) {
  m.def(
      "diversity_forward(Tensor[] features, Tensor(a!) statistics, Tensor(b!) pair_sums, Tensor(c!) inverse_norms, "
      "Tensor(d!) mixture, int level) -> ()");
  m.def(
      "diversity_backward(Tensor[] features, Tensor inverse_norms, Tensor grad_statistics, Tensor grad_pair_sums, "
      "Tensor[] upstream, int[] wanted, Tensor(a!)[] out, int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CPU, m) {
  m.impl("diversity_forward", TORCH_BOX(&dit_fast::diversity::diversity_forward));
  m.impl("diversity_backward", TORCH_BOX(&dit_fast::diversity::diversity_backward));
}

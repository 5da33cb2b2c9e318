// How CUDA kernels are launched and registered. tests/ops/adamw_shim.cpp defines all of it for a CPU.
#pragma once

#if !defined(DIT_FAST_LAUNCH)

#define DIT_FAST_LIBRARY dit_fast_native
#define DIT_FAST_DEVICE CUDA
#define DIT_FAST_ON_CPU false

// On a stream of torch's, given as a number; what the launch says becomes an exception.
#define DIT_FAST_LAUNCH(kernel, blocks, threads, stream, ...)                                                     \
  do {                                                                                                            \
    kernel<<<static_cast<unsigned>(blocks), (threads), 0, reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    const cudaError_t status = cudaGetLastError();                                                                \
    STD_TORCH_CHECK(status == cudaSuccess, #kernel ": ", cudaGetErrorString(status));                             \
  } while (false)

// Which sources the library was built from, for whoever reads the file.
extern "C" __attribute__((visibility("default"), used)) inline const char dit_fast_cuda_source[] =
    "source=" DIT_FAST_SOURCE_HASH " ";

#endif

// libcuda.so.1 without a GPU: what Triton's launcher calls, with NVIDIA's rules for launches and tensor maps checked.
//
// A call that a driver would refuse returns CUDA_ERROR_INVALID_VALUE, which Triton raises, and a line on stderr says
// why. Rules: CUDA Driver API, cuTensorMapEncodeTiled, cuLaunchKernelEx, cuFuncSetAttribute. STUB_SHARED: bytes of
// shared memory that a block can have.

#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define UNUSED __attribute__((unused))
#define REFUSE(...) return fprintf(stderr, "stub driver: " __VA_ARGS__), fputc('\n', stderr), CUDA_ERROR_INVALID_VALUE

typedef struct {
    char name[256];
    unsigned dynamic;  // shared memory that a launch may ask for without the attribute: 48 KB
} Function;

unsigned long stub_launches, stub_tensor_maps;

static unsigned shared_limit(void) { return (unsigned)atoi(getenv("STUB_SHARED")); }

CUresult cuInit(unsigned flags UNUSED) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal UNUSED) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)0x10, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context UNUSED) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device UNUSED) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit UNUSED) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit UNUSED, size_t value UNUSED) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module UNUSED) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function UNUSED, CUfunc_cache config UNUSED) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream UNUSED, CUstreamCaptureStatus *status) {
    return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    return *text = error == CUDA_SUCCESS ? "success" : "refused by the stub driver", CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device UNUSED) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = (int)shared_limit(); break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = (int)shared_limit() + 1024; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (image == NULL || memcmp(image, "\177ELF", 4)) REFUSE("a module that is no machine code");
    return *module = (CUmodule)0x20, CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module UNUSED, const char *name) {
    Function *made = calloc(1, sizeof(Function));
    snprintf(made->name, sizeof made->name, "%s", name);
    made->dynamic = 48 << 10;
    return *function = (CUfunction)made, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function UNUSED) {
    *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    // Modes of newer drivers are refused, as older ones do: then what a launch may ask for is set in bytes.
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    Function *own = (Function *)function;
    if (value < 0 || (unsigned)value > shared_limit())
        REFUSE("%s wants %d bytes of shared memory, a block can have %u", own->name, value, shared_limit());
    return own->dynamic = (unsigned)value, CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function UNUSED, const CUlaunchConfig *config UNUSED) {
    return *count = 1, CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || !pointer) REFUSE("a null pointer as an argument");
    return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
    const Function *own = (const Function *)function;
    if (own == NULL || (arguments == NULL && extra == NULL)) REFUSE("a launch without a function or arguments");
    if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || c->gridDimX > 0x7fffffffu || c->gridDimY > 65535 || c->gridDimZ > 65535)
        REFUSE("%s: a grid of %u x %u x %u", own->name, c->gridDimX, c->gridDimY, c->gridDimZ);
    const unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
    if (!threads || threads > 1024 || c->blockDimZ > 64) REFUSE("%s: a block of %u threads", own->name, threads);
    if (c->sharedMemBytes > own->dynamic)
        REFUSE("%s: %u bytes of shared memory, set were %u", own->name, c->sharedMemBytes, own->dynamic);
    return stub_launches++, CUDA_SUCCESS;
}

static unsigned element_size(CUtensorMapDataType type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
        case CU_TENSOR_MAP_DATA_TYPE_INT64:
        case CU_TENSOR_MAP_DATA_TYPE_UINT64:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
        default: return 4;
    }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion UNUSED, CUtensorMapFloatOOBfill fill) {
    const unsigned bytes = element_size(type);
    if ((size_t)map % 64) REFUSE("a tensor map at %p, not at a multiple of 64 bytes", (void *)map);
    if (address == NULL || (size_t)address % 16) REFUSE("a tensor at %p, not at a multiple of 16 bytes", address);
    if (rank < 1 || rank > 5) REFUSE("a tensor of %u dimensions", rank);
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) REFUSE("an interleaved tensor");
    for (unsigned i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > 1ull << 32) REFUSE("a size of %llu", (unsigned long long)sizes[i]);
        if (!box[i] || box[i] > 256) REFUSE("a box of %u", box[i]);
        if (!steps[i] || steps[i] > 8) REFUSE("an element stride of %u", steps[i]);
    }
    for (unsigned i = 0; i + 1 < rank; i++) {
        const unsigned long long stride = strides[i];
        if (stride % 16 || stride >= 1ull << 40) REFUSE("a stride of %llu bytes", stride);
        if (stride < sizes[i] * (i ? 1 : bytes)) REFUSE("a stride of %llu bytes below the size", stride);
    }
    const unsigned inner = box[0] * bytes;
    const unsigned widest = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? ~0u
                            : swizzle == CU_TENSOR_MAP_SWIZZLE_32B  ? 32
                            : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                                                                    : 128;
    if (inner % 16 || inner > widest) REFUSE("boxes %u bytes wide with swizzle %d", inner, swizzle);
    if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && type < CU_TENSOR_MAP_DATA_TYPE_FLOAT16) REFUSE("NaN for integers");
    memset(map, 0, sizeof *map);
    return stub_tensor_maps++, CUDA_SUCCESS;
}

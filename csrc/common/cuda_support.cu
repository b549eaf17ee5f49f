// Is there code in this build for the current device? The emulator runs any kernel.
#if !defined(PEFTCORE_EMULATOR)

#include <cuda_runtime.h>

namespace {

__global__ void nothing() {}

}  // namespace

extern "C" int peftcore_cuda_has_code() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
    if (error == cudaSuccess) return 1;
    (void)cudaGetLastError();  // not for the next launch to find
    return error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction;
}

#endif

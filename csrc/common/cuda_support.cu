// Whether this build has code for the current device. The emulator runs any kernel.
#if !defined(PEFTCORE_EMULATOR)

#include <cuda_runtime.h>

namespace {

__global__ void nothing() {}

}  // namespace

extern "C" int peftcore_cuda_has_code() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
    if (error == cudaSuccess) return 1;
    (void)cudaGetLastError();  // else the next launch would report it
    return error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction;
}

#endif

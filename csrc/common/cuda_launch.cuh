// What a .cu file includes: CUDA, or the emulator that stands in for it (tests/emulator), and the one way to
// launch.
//
// A .cu file holds kernels and extern "C" launchers that take pointers, sizes and a stream and return nullptr
// or an error message. It includes no PyTorch header, so that nvcc compiles it beside any PyTorch and a C++
// compiler compiles it for the emulator.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(PEFTCORE_EMULATOR)

#include "emulator.h"

#define PEFTCORE_SHARED(type, name, ...)      \
    alignas(16) static type name __VA_ARGS__; \
    static const ::emulator::SharedArray name##_registered(&name, sizeof name)

#define PEFTCORE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::emulator::launch(dim3(grid), dim3(block), shared_bytes, [=] { kernel(__VA_ARGS__); })

#else

#include <cuda_runtime.h>

// An array in shared memory on a 16-byte boundary: PEFTCORE_SHARED(float, tile, [16][32]).
#define PEFTCORE_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

#define PEFTCORE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                 \
    (kernel<<<dim3(grid), dim3(block), shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
     ::peftcore::launch_error())

namespace peftcore {

// nullptr, or why the launch just made failed.
inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace peftcore

#endif

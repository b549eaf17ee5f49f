// Included by every .cu file: CUDA, or the emulator that replaces it in tests (tests/emulator), and the launch macros.
//
// A .cu file holds kernels and extern "C" launchers that take pointers, sizes and a stream and return nullptr
// or an error message. It includes no PyTorch header, so that nvcc can compile it for any PyTorch and a C++
// compiler for the emulator.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(PEFTCORE_EMULATOR)

#include "emulator.h"

#define PEFTCORE_SHARED(type, name, ...)      \
    alignas(16) static type name __VA_ARGS__; \
    static const ::emulator::SharedArray name##_registered(&name, sizeof name)

#define PEFTCORE_DYNAMIC_SHARED(name) uint8_t* name = static_cast<uint8_t*>(::emulator::dynamic_shared())

#define PEFTCORE_ALLOW_SHARED(kernel, bytes) static_cast<const char*>(nullptr)

#define PEFTCORE_LAUNCH_NOW(kernel, grid, block, shared_bytes, stream, ...) \
    ::emulator::launch(grid, dim3(block), shared_bytes, [=] { kernel(__VA_ARGS__); })

#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

// An array in shared memory on a 16-byte boundary: PEFTCORE_SHARED(float, tile, [16][32]).
#define PEFTCORE_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

// Shared memory whose size is an argument of the launch. More than 48 KiB needs PEFTCORE_ALLOW_SHARED first, which
// returns nullptr, or the error if the device does not have as much.
#define PEFTCORE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

#define PEFTCORE_ALLOW_SHARED(kernel, bytes) ::peftcore::allow_shared(kernel, bytes)

#define PEFTCORE_LAUNCH_NOW(kernel, grid, block, shared_bytes, stream, ...)                       \
    (kernel<<<grid, dim3(block), shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
     ::peftcore::launch_error())

namespace peftcore {

// Returns nullptr, or the error that CUDA reports after a launch.
inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return nullptr;
    static thread_local std::string message;
    message = std::string("CUDA reports '") + cudaGetErrorString(error) +
              "' at a launch. An earlier kernel may be the cause: CUDA_LAUNCH_BLOCKING=1 shows which one";
    return message.c_str();
}

// Asks CUDA once for each device and kernel. Thread safe.
inline const char* allow_shared(const void* kernel, int bytes) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, int> allowed;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        const std::lock_guard<std::mutex> lock(mutex);
        int& most = allowed[{device, kernel}];
        if (bytes <= most) return nullptr;
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error == cudaSuccess) most = bytes;
    }
    if (error == cudaSuccess) return nullptr;
    (void)cudaGetLastError();  // else the next launch would report it
    return cudaGetErrorString(error);
}

// Typed, because CUDA accepts any address as a kernel, even the address of a pointer to one, and then does not find it.
template <typename... Parameters>
const char* allow_shared(void (*kernel)(Parameters...), int bytes) {
    return allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

}  // namespace peftcore

#endif

// Returns nullptr, or an error message if nothing was launched. `grid` is a number of blocks or a Grid.
#define PEFTCORE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
    (::peftcore::Grid(grid).fits() ? PEFTCORE_LAUNCH_NOW(kernel, ::peftcore::Grid(grid).size(), block, \
                                                         shared_bytes, stream, __VA_ARGS__)            \
                                   : ::peftcore::kTooManyBlocks)

namespace peftcore {

// Number of blocks. CUDA's own type has 32 bits and would silently truncate a larger number.
struct Grid {
    int64_t x, y;
    constexpr Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
    constexpr bool fits() const { return x <= 0x7fffffff && y <= 0xffff; }
    dim3 size() const { return dim3(unsigned(x), unsigned(y)); }
};

constexpr const char* kTooManyBlocks =
    "its launch would have more than 2^31 - 1 blocks. Divide the rows among several calls";

}  // namespace peftcore

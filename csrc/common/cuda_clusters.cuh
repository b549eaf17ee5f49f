// Clusters: blocks of a launch that run at the same time and read each other's shared memory (sm_90 and later).
//
// Blocks with consecutive indices form a cluster. All of them must reach each `cluster_sync`, and none may end before
// the others have read its memory.
#pragma once

#include "common/cuda_launch.cuh"

#if defined(PEFTCORE_EMULATOR)

#include "emulator_clusters.h"

// Only the null stream has clusters, so that tests cover both ways.
#define PEFTCORE_CLUSTERS_FIT(kernel, blocks, threads, shared_bytes, stream) ((stream) == nullptr)

#define PEFTCORE_LAUNCH_CLUSTERS(kernel, blocks, grid, block, shared_bytes, stream, ...) \
    ::emulator::launch(dim3(grid), dim3(block), shared_bytes, [=] { kernel(__VA_ARGS__); }, blocks)

namespace peftcore {

static inline void cluster_sync() { emulator::cluster_barrier(); }

static inline float shared_of_block(unsigned block, const float* here) {
    return *emulator::dynamic_shared_of(block, here);
}

}  // namespace peftcore

#else

#include <map>
#include <mutex>
#include <tuple>

// Whether the current device can run clusters of `blocks` blocks of this kernel.
#define PEFTCORE_CLUSTERS_FIT(kernel, blocks, threads, shared_bytes, stream) \
    ::peftcore::clusters_fit(kernel, blocks, threads, shared_bytes)

#define PEFTCORE_LAUNCH_CLUSTERS(kernel, blocks, grid, block, shared_bytes, stream, ...) \
    ::peftcore::launch_clusters(kernel, blocks, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace peftcore {

struct ClusterLaunch {
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    ClusterLaunch(unsigned blocks, unsigned grid, unsigned threads, int shared_bytes, void* stream) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = blocks;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.gridDim = dim3(grid);
        config.blockDim = dim3(threads);
        config.dynamicSmemBytes = size_t(shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
};

// Call it after PEFTCORE_ALLOW_SHARED.
template <typename... Parameters>
bool clusters_fit(void (*function)(Parameters...), unsigned blocks, unsigned threads, int shared_bytes) {
    const void* kernel = reinterpret_cast<const void*>(function);
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, unsigned>, bool> answers;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [entry, inserted] = answers.try_emplace({device, kernel, blocks}, false);
    if (inserted) {
        // Code for earlier architectures, which newer GPUs also run, has no instructions for clusters.
        cudaFuncAttributes code;
        const ClusterLaunch launch(blocks, blocks, threads, shared_bytes, nullptr);
        int at_a_time = 0;
        entry->second = cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90 &&
                        code.binaryVersion >= 90 &&
                        cudaOccupancyMaxActiveClusters(&at_a_time, kernel, &launch.config) == cudaSuccess &&
                        at_a_time > 0;
        if (!entry->second) (void)cudaGetLastError();  // else the next launch would report it
    }
    return entry->second;
}

template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), unsigned blocks, unsigned grid, unsigned threads,
                            int shared_bytes, void* stream, const Arguments&... arguments) {
    const ClusterLaunch launch(blocks, grid, threads, shared_bytes, stream);
    const cudaError_t error = cudaLaunchKernelEx(&launch.config, kernel, Parameters(arguments)...);
    if (error == cudaSuccess) return nullptr;
    (void)cudaGetLastError();
    return cudaGetErrorString(error);
}

// Wait until all threads of the cluster are here; what they wrote to shared memory before can then be read.
static __device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
#endif
}

// The value that block number `block` of the cluster has in its shared memory at the offset of `here`.
static __device__ __forceinline__ float shared_of_block(unsigned block, const float* here) {
    float value = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .u32 address;\n"
        "mapa.shared::cluster.u32 address, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [address]; }"
        : "=f"(value)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(here))), "r"(block)
        : "memory");
#endif
    return value;
}

}  // namespace peftcore

#endif

// 4-bit dequantization on CUDA: a warp turns 512 bytes into 1024 values at a time.
//
// Each lane loads 16 bytes and passes them through shared memory, so that the lanes' 16-byte stores lie side
// by side too. Codebook lookups are free of bank conflicts: 16 entries stand in 16 banks. Nested scales are
// read in place.
#include "common/cuda_launch.cuh"
#include "nf4/cuda/nf4_cuda.h"
#include "nf4/nf4.h"

namespace peftcore {
namespace nf4 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileBytes = 32 * 16;
constexpr int kTile = kTileBytes * 2;
constexpr int64_t kMaxBlocks = 4096;  // beyond, blocks of threads loop over tiles

struct DequantizeParams {
    const uint8_t* packed;
    const void* absmax;
    const float* code;
    const float* nested_absmax;
    const float* nested_code;
    const float* nested_offset;
    int64_t count;
    int shift;         // log2 of the block size
    int nested_shift;  // log2 of the block size of the scales
    bool aligned;      // packed and out are on 16-byte boundaries
};

template <bool kNested>
__device__ __forceinline__ float scale_of(const DequantizeParams& p, const float* nested_code, float offset,
                                          int64_t block) {
    if constexpr (kNested) {
        const uint8_t quantized = static_cast<const uint8_t*>(p.absmax)[block];
        // Rounded twice, not fused: the bits of the CPU kernels.
        return __fadd_rn(__fmul_rn(nested_code[quantized], p.nested_absmax[block >> p.nested_shift]), offset);
    } else {
        return static_cast<const float*>(p.absmax)[block];
    }
}

template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p, T* __restrict__ out) {
    PEFTCORE_SHARED(float, code, [16]);
    PEFTCORE_SHARED(float, nested_code, [kNested ? 256 : 1]);
    PEFTCORE_SHARED(uint8_t, staged, [kWarps][kTileBytes]);
    constexpr int kPerStore = 16 / sizeof(T);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < 16) code[threadIdx.x] = p.code[threadIdx.x];
    float offset = 0;
    if constexpr (kNested) {
        nested_code[threadIdx.x] = p.nested_code[threadIdx.x];
        offset = *p.nested_offset;
    }
    __syncthreads();

    const int64_t tiles = (p.count + kTile - 1) / kTile;
    for (int64_t tile = int64_t(blockIdx.x) * kWarps + warp; tile < tiles;
         tile += int64_t(gridDim.x) * kWarps) {
        const int64_t first = tile * kTile;
        if (!p.aligned || first + kTile > p.count) {
            const int64_t last = first + kTile < p.count ? first + kTile : p.count;
            for (int64_t i = first + lane; i < last; i += 32) {
                const uint8_t byte = p.packed[i / 2];
                const float scale = scale_of<kNested>(p, nested_code, offset, i >> p.shift);
                out[i] = from_float<T>(code[i % 2 ? byte & 15 : byte >> 4] * scale);
            }
            continue;
        }
        __syncwarp();  // the previous tile has been read
        *reinterpret_cast<uint4*>(&staged[warp][lane * 16]) =
            reinterpret_cast<const uint4*>(p.packed + first / 2)[lane];
        __syncwarp();
#pragma unroll
        for (int step = 0; step < kTile / (32 * kPerStore); ++step) {
            const int index = (step * 32 + lane) * kPerStore;
            uint32_t bytes;
            if constexpr (kPerStore == 8)
                bytes = *reinterpret_cast<const uint32_t*>(&staged[warp][index / 2]);
            else
                bytes = *reinterpret_cast<const uint16_t*>(&staged[warp][index / 2]);
            const float scale = scale_of<kNested>(p, nested_code, offset, (first + index) >> p.shift);
            union {
                uint4 vector;
                T items[kPerStore];
            } values;
#pragma unroll
            for (int i = 0; i < kPerStore; ++i) {
                const uint32_t q = bytes >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15;
                values.items[i] = from_float<T>(code[q] * scale);
            }
            *reinterpret_cast<uint4*>(out + first + index) = values.vector;
        }
    }
}

template <typename T>
const char* launch_dequantize(const DequantizeParams& p, void* out, void* stream) {
    const int64_t wanted = (p.count + int64_t(kTile) * kWarps - 1) / (int64_t(kTile) * kWarps);
    const unsigned blocks = unsigned(wanted < kMaxBlocks ? wanted : kMaxBlocks);
    T* typed = static_cast<T*>(out);
    if (p.nested_absmax != nullptr)
        return PEFTCORE_LAUNCH((dequantize_kernel<T, true>), blocks, kThreads, 0, stream, p, typed);
    return PEFTCORE_LAUNCH((dequantize_kernel<T, false>), blocks, kThreads, 0, stream, p, typed);
}

}  // namespace
}  // namespace nf4
}  // namespace peftcore

extern "C" const char* peftcore_nf4_dequantize(const uint8_t* packed, const void* absmax, const float* code,
                                               int blocksize, const float* nested_absmax,
                                               const float* nested_code, const float* nested_offset,
                                               int nested_blocksize, int64_t count, void* out, int dtype,
                                               void* stream) {
    using namespace peftcore::nf4;
    if (count == 0) return nullptr;
    DequantizeParams p;
    p.packed = packed;
    p.absmax = absmax;
    p.code = code;
    p.nested_absmax = nested_absmax;
    p.nested_code = nested_code;
    p.nested_offset = nested_offset;
    p.count = count;
    p.shift = log2_of(blocksize);
    p.nested_shift = log2_of(nested_blocksize);
    p.aligned = reinterpret_cast<uintptr_t>(packed) % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    switch (Dtype(dtype)) {
        case Dtype::kFloat:
            return launch_dequantize<float>(p, out, stream);
        case Dtype::kHalf:
            return launch_dequantize<peftcore::Half>(p, out, stream);
        case Dtype::kBFloat16:
            return launch_dequantize<peftcore::BFloat16>(p, out, stream);
    }
    return "unknown dtype";
}

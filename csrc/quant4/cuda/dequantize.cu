// 4-bit dequantization on CUDA: a warp turns 512 bytes into 1024 values at a time.
//
// Each lane loads 16 bytes and passes them through shared memory, so that the lanes' 16-byte stores are contiguous,
// too. Codebook lookups have no bank conflicts: the 16 entries are in 16 banks. Nested scales are
// read in place.
#include "common/alignment.h"
#include "common/cuda_dispatch.cuh"
#include "quant4/cuda/block_scale.cuh"
#include "quant4/cuda/quant4_cuda.h"
#include "quant4/format.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileBytes = 32 * 16;
constexpr int kTileValues = kTileBytes * 2;

template <typename T, ScaleKind kScales>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const WeightView weight, bool aligned, T* __restrict__ out) {
    PEFTCORE_SHARED(float, quant_map, [16]);
    using Scales = KnownScales<kScales>;
    PEFTCORE_SHARED(float, nested_quant_map, [Scales::kEntries]);
    PEFTCORE_SHARED(uint8_t, staged, [kWarps][kTileBytes]);
    constexpr int kPerStore = 16 / sizeof(T);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Scales scales = Scales::load(weight, quant_map, nested_quant_map);
    __syncthreads();

    const int64_t count = weight.rows * weight.columns, tiles = (count + kTileValues - 1) / kTileValues;
    for (int64_t tile = int64_t(blockIdx.x) * kWarps + warp; tile < tiles;
         tile += int64_t(gridDim.x) * kWarps) {
        const int64_t first = tile * kTileValues;
        if (!aligned || first + kTileValues > count) {
            const int64_t last = first + kTileValues < count ? first + kTileValues : count;
            for (int64_t i = first + lane; i < last; i += 32) {
                const uint8_t byte = weight.codes[i / 2];
                const auto scale = scales.decode(weight, scales.stored(weight, i >> weight.shift));
                out[i] = from_float<T>(scale.value(quant_map[i % 2 ? byte & 15 : byte >> 4]));
            }
            continue;
        }
        __syncwarp();  // the previous tile has been read
        *reinterpret_cast<uint4*>(&staged[warp][lane * 16]) =
            reinterpret_cast<const uint4*>(weight.codes + first / 2)[lane];
        __syncwarp();
#pragma unroll
        for (int step = 0; step < kTileValues / (32 * kPerStore); ++step) {
            const int index = (step * 32 + lane) * kPerStore;
            uint32_t bytes;
            if constexpr (kPerStore == 8)
                bytes = *reinterpret_cast<const uint32_t*>(&staged[warp][index / 2]);
            else
                bytes = *reinterpret_cast<const uint16_t*>(&staged[warp][index / 2]);
            const auto scale = scales.decode(weight, scales.stored(weight, (first + index) >> weight.shift));
            union {
                uint4 vector;
                T items[kPerStore];
            } values;
#pragma unroll
            for (int i = 0; i < kPerStore; ++i) {
                const uint32_t q = bytes >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15;
                values.items[i] = from_float<T>(scale.value(quant_map[q]));
            }
            *reinterpret_cast<uint4*>(out + first + index) = values.vector;
        }
    }
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore

extern "C" const char* peftcore_quant4_dequantize(const peftcore::WeightView* weight, void* out, int dtype,
                                                  void* stream) {
    using namespace peftcore::quant4;
    if (weight->rows * weight->columns == 0) return nullptr;
    const bool vectors = peftcore::is_aligned(weight->codes) && peftcore::is_aligned(out);
    const int64_t full_grid = peftcore::ceil_div(weight->numel(), int64_t(kTileValues) * kWarps);
    const unsigned blocks = unsigned(peftcore::least(full_grid, peftcore::cuda_tuning().loop_blocks));
    return peftcore::dispatch_dtype(Dtype(dtype), [&](auto type) {
        return peftcore::dispatch_scales(weight->scales, [&](auto scales) {
            using T = typename decltype(type)::type;
            constexpr peftcore::ScaleKind kScales = decltype(scales)::value;
            return PEFTCORE_LAUNCH((dequantize_kernel<T, kScales>), blocks, kThreads, 0, stream, *weight,
                                   vectors, static_cast<T*>(out));
        });
    });
}

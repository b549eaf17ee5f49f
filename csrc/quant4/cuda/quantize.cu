// 4-bit quantization on CUDA: 8 values a thread at a time, blocksize / 8 threads a block of values.
//
// A thread loads its values in 16-byte pieces, the threads of a block agree on the largest magnitude (by
// shuffles within a warp, through shared memory beyond), and each writes its 8 codes as one 32-bit word.
#include "common/alignment.h"
#include "common/cuda_dispatch.cuh"
#include "common/integers.h"
#include "quant4/cuda/quant4_cuda.h"
#include "quant4/format.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kValues = 8;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ uint32_t max_magnitude(uint32_t largest, float value) {
    const uint32_t bits = float_bits(value) & 0x7fffffffu;  // NaN orders above infinity
    return bits > largest ? bits : largest;
}

// The largest of `threads` neighbouring lanes' values; `threads` is a power of two up to 32.
__device__ __forceinline__ uint32_t max_over_lanes(uint32_t largest, int threads) {
    for (int offset = threads / 2; offset > 0; offset /= 2) {
        const uint32_t neighbour = __shfl_xor_sync(kFullWarp, largest, offset);
        largest = neighbour > largest ? neighbour : largest;
    }
    return largest;
}

template <typename T>
__device__ __forceinline__ void load_values(const T* x, int64_t begin, int64_t count, bool in_pieces,
                                            float* values) {
    if (in_pieces) {
        constexpr int kPieces = kValues * sizeof(T) / 16;
        constexpr int kPerPiece = 16 / sizeof(T);
        for (int piece = 0; piece < kPieces; ++piece) {
            union {
                uint4 vector;
                T items[kPerPiece];
            } loaded;
            loaded.vector = reinterpret_cast<const uint4*>(x + begin)[piece];
            for (int i = 0; i < kPerPiece; ++i) values[piece * kPerPiece + i] = to_float(loaded.items[i]);
        }
        return;
    }
    for (int i = 0; i < kValues; ++i) values[i] = begin + i < count ? to_float(x[begin + i]) : 0.0f;
}

// blockDim.x is a multiple of 32 and of blocksize / 8; blocksize is 1 << shift. kWhole: x and codes are on pieces of 16
// and 4 bytes, all threads have eight values at a time, and those of a block of values are in one warp.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(512)
    quantize_kernel(const T* __restrict__ x, const float* __restrict__ quant_map, int64_t count, int shift,
                    bool aligned, bool words, uint8_t* __restrict__ codes, float* __restrict__ absmax) {
    PEFTCORE_SHARED(float, threshold, [16]);
    PEFTCORE_SHARED(uint32_t, order, [16]);
    PEFTCORE_SHARED(uint32_t, warp_largest, [16]);
    const int thread = threadIdx.x;
    if (thread < 16) {
        const float mine = quant_map[thread];
        int rank = 0;
        for (int j = 0; j < 16; ++j) rank += quant_map[j] < mine || (quant_map[j] == mine && j < thread);
        order[rank] = thread;
    }
    __syncthreads();
    if (thread < 15) threshold[thread] = (quant_map[order[thread]] + quant_map[order[thread + 1]]) / 2;
    __syncthreads();

    const int threads = (1 << shift) / kValues;
    const auto quantize_eight = [&](int64_t begin) {
        float values[kValues];
        load_values(x, begin, count, kWhole || (aligned && begin + kValues <= count), values);

        uint32_t largest = 0;
        for (int i = 0; i < kValues; ++i) largest = max_magnitude(largest, values[i]);
        largest = max_over_lanes(largest, threads < 32 ? threads : 32);
        if (!kWhole && threads > 32) {
            if (thread % 32 == 0) warp_largest[thread / 32] = largest;
            __syncthreads();
            const int first = thread / threads * (threads / 32);
            for (int i = 0; i < threads / 32; ++i) {
                const uint32_t neighbour = warp_largest[first + i];
                largest = neighbour > largest ? neighbour : largest;
            }
        }

        if (!kWhole && begin >= count) return;
        const int64_t block = begin >> shift;
        const bool partial = !kWhole && (block + 1) << shift > count;
        float scale = bits_float(largest);
        const float raised = scale < kSmallestScale ? kSmallestScale : scale;
        if (partial) scale = raised;
        if (block << shift == begin) absmax[block] = scale;
        const float inverse = 1.0f / raised;

        uint32_t word = 0;
        for (int i = 0; i < kValues; ++i) {
            const float scaled = partial ? values[i] / raised : values[i] * inverse;
            int rank = 0;
            for (int step = 8; step > 0; step /= 2)
                if (!(scaled <= threshold[rank + step - 1])) rank += step;
            word |= order[rank] << (i / 2 * 8 + (i % 2 ? 0 : 4));
        }
        if (kWhole || (words && begin + kValues <= count)) {
            *reinterpret_cast<uint32_t*>(codes + begin / 2) = word;
        } else {
            for (int i = 0; 2 * i < kValues && begin + 2 * i < count; ++i)
                codes[begin / 2 + i] = uint8_t(word >> 8 * i);
        }
    };
    const int64_t begin = (int64_t(blockIdx.x) * blockDim.x + thread) * kValues;
    if constexpr (kWhole)
        for (int64_t i = begin; i < count; i += int64_t(gridDim.x) * blockDim.x * kValues) quantize_eight(i);
    else
        quantize_eight(begin);
}

// One block of threads a block of scales.
__global__ void __launch_bounds__(256)
    quantize_absmax_kernel(const float* __restrict__ absmax, const float* __restrict__ quant_map,
                           const float* __restrict__ offset, int64_t count, int blocksize,
                           uint8_t* __restrict__ codes, float* __restrict__ nested_absmax) {
    PEFTCORE_SHARED(float, midpoint, [255]);
    PEFTCORE_SHARED(uint32_t, warp_largest, [8]);
    const int thread = threadIdx.x;
    if (thread < 255) midpoint[thread] = (quant_map[thread] + quant_map[thread + 1]) / 2;
    const int64_t begin = int64_t(blockIdx.x) * blocksize;
    const int64_t end = begin + blocksize < count ? begin + blocksize : count;
    const float mean = *offset;
    uint32_t largest = 0;
    for (int64_t i = begin + thread; i < end; i += blockDim.x)
        largest = max_magnitude(largest, absmax[i] - mean);
    largest = max_over_lanes(largest, 32);
    if (thread % 32 == 0) warp_largest[thread / 32] = largest;
    __syncthreads();
    for (int i = 0; i < 8; ++i) largest = warp_largest[i] > largest ? warp_largest[i] : largest;
    const float scale = bits_float(largest);
    const float inverse = 1.0f / (scale < kSmallestScale ? kSmallestScale : scale);
    if (thread == 0) nested_absmax[blockIdx.x] = scale;
    for (int64_t i = begin + thread; i < end; i += blockDim.x) {
        const float scaled = (absmax[i] - mean) * inverse;
        int index = 0;
        for (int step = 128; step > 0; step /= 2)
            if (!(scaled <= midpoint[index + step - 1])) index += step;
        codes[i] = uint8_t(index);
    }
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore

extern "C" const char* peftcore_quant4_quantize(const void* x, int dtype, const float* quant_map,
                                                int64_t count, int blocksize, uint8_t* codes, float* absmax,
                                                void* stream) {
    using namespace peftcore::quant4;
    if (count == 0) return nullptr;
    const int threads = blocksize / kValues > 256 ? blocksize / kValues : 256;
    const int64_t of_block = int64_t(threads) * kValues, blocks = peftcore::ceil_div(count, of_block);
    const bool aligned = peftcore::is_aligned(x);
    const bool words = peftcore::is_aligned(codes, 4);
    const bool whole = aligned && words && count % of_block == 0 && blocksize <= 32 * kValues;
    const int64_t grid = whole ? peftcore::least(blocks, peftcore::cuda_tuning().quantize_blocks) : blocks;
    const int shift = peftcore::log2_of(blocksize);
    return peftcore::dispatch_dtype(Dtype(dtype), [&](auto type) {
        return peftcore::dispatch_flag(whole, [&](auto flag) {
            using T = typename decltype(type)::type;
            constexpr bool kWhole = decltype(flag)::value;
            return PEFTCORE_LAUNCH((quantize_kernel<T, kWhole>), grid, threads, 0, stream,
                                   static_cast<const T*>(x), quant_map, count, shift, aligned, words, codes,
                                   absmax);
        });
    });
}

extern "C" const char* peftcore_quant4_quantize_absmax(const float* absmax, const float* quant_map,
                                                       const float* offset, int64_t count, int blocksize,
                                                       uint8_t* codes, float* nested_absmax, void* stream) {
    using namespace peftcore::quant4;
    if (count == 0) return nullptr;
    const int64_t blocks = peftcore::ceil_div(count, blocksize);
    return PEFTCORE_LAUNCH(quantize_absmax_kernel, blocks, 256, 0, stream, absmax, quant_map, offset, count,
                           blocksize, codes, nested_absmax);
}

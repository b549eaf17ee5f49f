// A step of an optimizer on CUDA: 256 threads take a block of 256 elements, one element each; a table maps blocks to
// segments.
//
// In 8 bits the threads agree on the block's largest magnitudes, by shuffles within a warp and through shared
// memory, and the maps are in shared memory. Operations that are separate in rules.h are not fused.
#include <cmath>

#include "common/cuda_launch.cuh"
#include "common/cuda_tuning.h"
#include "common/integers.h"
#include "optim/cuda/optim_cuda.h"
#include "optim/rounding.h"
#include "optim/rules.h"

namespace peftcore {
namespace optim {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarps = kBlock / 32;

__device__ __forceinline__ float load_as_float(const void* x, Dtype dtype, int64_t i) {
    if (dtype == Dtype::kFloat) return static_cast<const float*>(x)[i];
    if (dtype == Dtype::kHalf) return to_float(static_cast<const Half*>(x)[i]);
    return to_float(static_cast<const BFloat16*>(x)[i]);
}

template <typename T>
__device__ __forceinline__ T rounded(float value, const Segment& s, int64_t i) {
    if (s.stream < 0) return from_float<T>(value);
    const int64_t index = s.first + i;
    return round_stochastic(value, random_bits(rounding_words(s.stream, index / 8, s.step), index),
                            static_cast<T*>(nullptr));
}

__device__ __forceinline__ void store_param(const Segment& s, int64_t i, float value) {
    if (s.param_dtype == Dtype::kFloat)
        static_cast<float*>(s.param)[i] = value;
    else if (s.param_dtype == Dtype::kHalf)
        static_cast<Half*>(s.param)[i] = rounded<Half>(value, s, i);
    else
        static_cast<BFloat16*>(s.param)[i] = rounded<BFloat16>(value, s, i);
}

// The operations that rules.h uses, for one value, none of them fused.
struct Thread {
    using F = float;
    static __device__ __forceinline__ F set1(float x) { return x; }
    static __device__ __forceinline__ F add(F a, F b) { return __fadd_rn(a, b); }
    static __device__ __forceinline__ F sub(F a, F b) { return __fadd_rn(a, -b); }
    static __device__ __forceinline__ F mul(F a, F b) { return __fmul_rn(a, b); }
    static __device__ __forceinline__ F div(F a, F b) { return a / b; }
    static __device__ __forceinline__ F sqrt(F a) { return sqrtf(a); }
    static __device__ __forceinline__ F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
    static __device__ __forceinline__ F sign(F a) { return a > 0 ? 1.0f : a < 0 ? -1.0f : a; }
};

// The largest magnitude of the block's threads, all finite; `warps` is shared memory of a value a
// warp.
__device__ __forceinline__ float largest(float x, uint32_t* warps) {
    uint32_t bits = float_bits(x) & 0x7fffffffu;
    for (int offset = 16; offset > 0; offset /= 2) {
        const uint32_t other = __shfl_xor_sync(kFullWarp, bits, offset);
        bits = other > bits ? other : bits;
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = bits;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) bits = warps[i] > bits ? warps[i] : bits;
    __syncthreads();
    return bits_float(bits);
}

__device__ __forceinline__ const Segment& segment_of(const Segment* segments, const int64_t* first_block,
                                                     int count, int64_t block, int64_t& begin) {
    int low = 0, high = count;  // the last segment that begins at or before the block
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (first_block[middle] <= block)
            low = middle;
        else
            high = middle;
    }
    begin = (block - first_block[low]) * kBlock;
    return segments[low];
}

template <typename Rule>
__global__ void __launch_bounds__(kBlock)
    step_kernel(const Segment* __restrict__ segments, const int64_t* __restrict__ first_block, int count,
                int64_t blocks, const Scalars* __restrict__ rows) {
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        int64_t begin;
        const Segment& s = segment_of(segments, first_block, count, block, begin);
        const int64_t i = begin + threadIdx.x;
        if (i >= s.count) continue;
        const Rule rule = with_scalars<Rule>(rows[s.row]);
        float p = load_as_float(s.param, s.param_dtype, i);
        const float g = __fmul_rn(load_as_float(s.grad, s.grad_dtype, i), rule.factor);
        float state[Rule::kMoments];
        for (int k = 0; k < Rule::kMoments; ++k) state[k] = static_cast<const float*>(s.state[k])[i];
        rule.template update<Thread>(p, g, state);
        for (int k = 0; k < Rule::kMoments; ++k) static_cast<float*>(s.state[k])[i] = state[k];
        store_param(s, i, p);
    }
}

// Of a rule with a signed and an unsigned moment.
template <typename Rule>
__global__ void __launch_bounds__(kBlock)
    step_8bit_kernel(const Segment* __restrict__ segments, const int64_t* __restrict__ first_block, int count,
                     int64_t blocks, const Scalars* __restrict__ rows, const Maps* __restrict__ maps) {
    PEFTCORE_SHARED(float, means, [kBlock]);
    PEFTCORE_SHARED(float, squares, [kBlock]);
    PEFTCORE_SHARED(Encoder, encoders, [2]);
    PEFTCORE_SHARED(uint32_t, warps, [kWarps]);
    const int thread = threadIdx.x;
    means[thread] = maps->means.value[thread];
    squares[thread] = maps->squares.value[thread];
    constexpr int kWords = sizeof(Encoder) / sizeof(uint32_t);
    static_assert(kWords <= kBlock, "a word a thread");
    if (thread < kWords) {
        reinterpret_cast<uint32_t*>(&encoders[0])[thread] =
            reinterpret_cast<const uint32_t*>(&maps->means.encoder)[thread];
        reinterpret_cast<uint32_t*>(&encoders[1])[thread] =
            reinterpret_cast<const uint32_t*>(&maps->squares.encoder)[thread];
    }
    __syncthreads();
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        int64_t begin;
        const Segment& s = segment_of(segments, first_block, count, block, begin);
        const Rule rule = with_scalars<Rule>(rows[s.row]);
        const int64_t i = begin + thread;
        const bool inside = i < s.count;
        uint8_t* m_code = static_cast<uint8_t*>(s.state[0]) + i;
        uint8_t* v_code = static_cast<uint8_t*>(s.state[1]) + i;
        float* m_absmax = static_cast<float*>(s.state[2]) + begin / kBlock;
        float* v_absmax = static_cast<float*>(s.state[3]) + begin / kBlock;
        float state[2] = {}, &m = state[0], &v = state[1];
        if (inside) {
            m = __fmul_rn(means[*m_code], *m_absmax);
            v = __fmul_rn(squares[*v_code], *v_absmax);
            float p = load_as_float(s.param, s.param_dtype, i);
            const float g = __fmul_rn(load_as_float(s.grad, s.grad_dtype, i), rule.factor);
            rule.template update<Thread>(p, g, state);
            store_param(s, i, p);
            // NaN or infinity in one element must not become the scale of 256: its state is reset.
            if (!(m - m == 0 && v - v == 0)) m = v = 0;
        }
        const float m_scale = largest(m, warps),
                    v_scale = largest(v, warps);  // after all threads have read the old scales
        if (thread == 0) {
            *m_absmax = m_scale;
            *v_absmax = v_scale;
        }
        if (!inside) continue;
        *m_code = encode_signed(__fmul_rn(m, m_scale > 0 ? 1.0f / m_scale : 0.0f), encoders[0]);
        *v_code = encode_unsigned(__fmul_rn(v, v_scale > 0 ? 1.0f / v_scale : 0.0f), encoders[1]);
    }
}

// Arguments of all kernels, and their launch.
struct Launch {
    const Segment* segments;
    const int64_t* first_block;
    int count;
    int64_t blocks;
    const Scalars* rows;
    const Maps* maps;
    void* stream;

    template <typename Rule>
    static const char* rule(const Launch& l) {
        const unsigned grid = unsigned(least(l.blocks, cuda_tuning().step_blocks));
        if constexpr (Rule::kIn8Bits)
            return PEFTCORE_LAUNCH(step_8bit_kernel<Rule>, grid, kBlock, 0, l.stream, l.segments,
                                   l.first_block, l.count, l.blocks, l.rows, l.maps);
        else
            return PEFTCORE_LAUNCH(step_kernel<Rule>, grid, kBlock, 0, l.stream, l.segments, l.first_block,
                                   l.count, l.blocks, l.rows);
    }

    template <typename... Rule>
    const char* number(int number, RuleList<Rule...>) const {
        const char* (*const launches[])(const Launch&) = {rule<Rule>...};
        return number >= 0 && number < int(sizeof...(Rule)) ? launches[number](*this) : "unknown rule";
    }
};

}  // namespace
}  // namespace optim
}  // namespace peftcore

extern "C" const char* peftcore_optim_step(int rule, const peftcore::optim::Segment* segments,
                                           const int64_t* first_block, int count, int64_t blocks,
                                           const peftcore::optim::Scalars* rows,
                                           const peftcore::optim::Maps* maps, void* stream) {
    using namespace peftcore::optim;
    if (blocks == 0) return nullptr;
    return Launch{segments, first_block, count, blocks, rows, maps, stream}.number(rule, Rules());
}

// A step of an optimizer on CUDA: a warp takes a block of 256 elements, four neighbouring ones a lane at a time. A block of
// threads takes neighbouring blocks of elements; each warp searches the table of segments once, and goes on from there.
//
// In 8 bits the lanes agree on the block's largest magnitudes by shuffles, and the maps are in shared memory. Operations
// that are separate in rules.h are not fused.
#include <cmath>

#include "common/alignment.h"
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
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFour = 4;                       // elements of a lane that are loaded at once
constexpr int kParts = kBlock / (32 * kFour);  // of a block: a lane has so many times four elements
static_assert(kParts * 32 * kFour == kBlock, "a warp's lanes have all elements of a block");

// Four elements as they are stored: four words of fp32, or two of 16 bits.
struct Stored {
    uint32_t word[kFour];
};

// Elements [i, i + 4) of which the first `count - i` exist. `vectors`: the address is on 16 bytes.
__device__ __forceinline__ Stored load_four(const void* from, Dtype dtype, int64_t i, int64_t count,
                                            bool vectors) {
    Stored four_values = {};
    if (vectors && i + kFour <= count) {
        if (dtype == Dtype::kFloat) {
            const uint4 four = static_cast<const uint4*>(from)[i / kFour];
            four_values = {{four.x, four.y, four.z, four.w}};
        } else {
            const uint2 four = static_cast<const uint2*>(from)[i / kFour];
            four_values.word[0] = four.x;
            four_values.word[1] = four.y;
        }
        return four_values;
    }
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        if (i + j >= count) break;
        if (dtype == Dtype::kFloat)
            four_values.word[j] = float_bits(static_cast<const float*>(from)[i + j]);
        else
            four_values.word[j / 2] |= uint32_t(static_cast<const uint16_t*>(from)[i + j]) << j % 2 * 16;
    }
    return four_values;
}

__device__ __forceinline__ void store_four(void* to, Dtype dtype, int64_t i, int64_t count, bool vectors,
                                           const Stored& values) {
    if (vectors && i + kFour <= count) {
        if (dtype == Dtype::kFloat)
            static_cast<uint4*>(to)[i / kFour] = {values.word[0], values.word[1], values.word[2],
                                                  values.word[3]};
        else
            static_cast<uint2*>(to)[i / kFour] = {values.word[0], values.word[1]};
        return;
    }
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        if (i + j >= count) break;
        if (dtype == Dtype::kFloat)
            static_cast<float*>(to)[i + j] = bits_float(values.word[j]);
        else
            static_cast<uint16_t*>(to)[i + j] = uint16_t(values.word[j / 2] >> j % 2 * 16);
    }
}

__device__ __forceinline__ float value_of(const Stored& four, Dtype dtype, int j) {
    if (dtype == Dtype::kFloat) return bits_float(four.word[j]);
    const uint16_t bits = uint16_t(four.word[j / 2] >> j % 2 * 16);
    return dtype == Dtype::kHalf ? to_float(Half{bits}) : to_float(BFloat16{bits});
}

// Values of 16 bits, rounded to the nearest, or at random by the words drawn for their group of eight.
template <typename T>
__device__ __forceinline__ Stored rounded(const float (&values)[kFour], const Segment& s, int64_t i) {
    Stored result = {};
    if (s.stream < 0) {
#pragma unroll
        for (int j = 0; j < kFour; ++j)
            result.word[j / 2] |= uint32_t(from_float<T>(values[j]).bits) << j % 2 * 16;
        return result;
    }
    const int64_t index = s.first + i;
    const PhiloxWords drawn = rounding_words(s.stream, index / 8, s.step);
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
        const T value = round_stochastic(values[j], random_bits(drawn, index + j), static_cast<T*>(nullptr));
        result.word[j / 2] |= uint32_t(value.bits) << j % 2 * 16;
    }
    return result;
}

__device__ __forceinline__ Stored rounded(const float (&values)[kFour], const Segment& s, int64_t i) {
    if (s.param_dtype == Dtype::kHalf) return rounded<Half>(values, s, i);
    if (s.param_dtype == Dtype::kBFloat16) return rounded<BFloat16>(values, s, i);
    Stored result;
#pragma unroll
    for (int j = 0; j < kFour; ++j) result.word[j] = float_bits(values[j]);
    return result;
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

// The largest magnitude of a warp's values, all of them finite.
__device__ __forceinline__ float largest(const float (&values)[kParts][kFour]) {
    uint32_t bits = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            const uint32_t magnitude = float_bits(values[part][j]) & 0x7fffffffu;
            bits = magnitude > bits ? magnitude : bits;
        }
    for (int offset = 16; offset > 0; offset /= 2) {
        const uint32_t neighbour = __shfl_xor_sync(kFullWarp, bits, offset);
        bits = neighbour > bits ? neighbour : bits;
    }
    return bits_float(bits);
}

// What a launch updates: tables on the device. A block of threads takes `blocks_per_block` blocks of elements.
struct Table {
    const Segment* segments;
    const int64_t* first_block;
    int count;
    int64_t blocks, blocks_per_block;
    const Scalars* rows;
};

// The last segment that begins at or before the block.
__device__ __forceinline__ int segment_of(const Table& table, int64_t block) {
    int low = 0, high = table.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.first_block[middle] <= block)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Calls body(segment, index in it of the block's first element) for each block of elements of this warp.
template <typename Body>
__device__ __forceinline__ void for_blocks(const Table& table, const Body& body) {
    const int64_t begin = int64_t(blockIdx.x) * table.blocks_per_block,
                  end = least(begin + table.blocks_per_block, table.blocks);
    int64_t block = begin + threadIdx.x / 32;
    if (block >= end) return;
    for (int at = segment_of(table, block); block < end; block += kWarps) {
        while (table.first_block[at + 1] <= block) ++at;
        body(table.segments[at], (block - table.first_block[at]) * kBlock);
    }
}

// p and g of this lane's elements of a block, and where they are.
struct Lane {
    const Segment& s;
    bool vectors;
    int64_t first;
    Stored param[kParts], grad[kParts];

    __device__ __forceinline__ Lane(const Segment& segment, int64_t begin, int moments)
        : s(segment),
          vectors(is_aligned(segment.param) && is_aligned(segment.grad)),
          first(begin + threadIdx.x % 32 * kFour) {
        for (int k = 0; k < moments; ++k) vectors = vectors && is_aligned(s.state[k]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            param[part] = load_four(s.param, s.param_dtype, index(part), s.count, vectors);
            grad[part] = load_four(s.grad, s.grad_dtype, index(part), s.count, vectors);
        }
    }
    __device__ __forceinline__ int64_t index(int part) const { return first + part * 32 * kFour; }

    // Updates p of four elements, and their state [moment][element].
    template <typename Rule>
    __device__ __forceinline__ void update(int part, const Rule& rule,
                                           float (&state)[Rule::kMoments][kFour]) const {
        float p[kFour];
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
            p[j] = value_of(param[part], s.param_dtype, j);
            const float g = __fmul_rn(value_of(grad[part], s.grad_dtype, j), rule.factor);
            float own[Rule::kMoments];
            for (int k = 0; k < Rule::kMoments; ++k) own[k] = state[k][j];
            rule.template update<Thread>(p[j], g, own);
            for (int k = 0; k < Rule::kMoments; ++k) state[k][j] = own[k];
        }
        if (index(part) < s.count)
            store_four(s.param, s.param_dtype, index(part), s.count, vectors, rounded(p, s, index(part)));
    }
};

template <typename Rule>
__global__ void __launch_bounds__(kThreads) step_kernel(const Table table) {
    for_blocks(table, [&](const Segment& s, int64_t begin) {
        const Rule rule = with_scalars<Rule>(table.rows[s.row]);
        const Lane lane(s, begin, Rule::kMoments);
        Stored stored[kParts][Rule::kMoments];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
            for (int k = 0; k < Rule::kMoments; ++k)
                stored[part][k] =
                    load_four(s.state[k], Dtype::kFloat, lane.index(part), s.count, lane.vectors);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            float state[Rule::kMoments][kFour];
            for (int k = 0; k < Rule::kMoments; ++k)
                for (int j = 0; j < kFour; ++j) state[k][j] = bits_float(stored[part][k].word[j]);
            lane.update(part, rule, state);
            for (int k = 0; k < Rule::kMoments; ++k) {
                Stored after;
                for (int j = 0; j < kFour; ++j) after.word[j] = float_bits(state[k][j]);
                store_four(s.state[k], Dtype::kFloat, lane.index(part), s.count, lane.vectors, after);
            }
        }
    });
}

// Codes [i, i + 4), a byte each.
__device__ __forceinline__ uint32_t load_codes(const void* from, int64_t i, int64_t count, bool vectors) {
    if (vectors && i + kFour <= count) return static_cast<const uint32_t*>(from)[i / kFour];
    uint32_t codes = 0;
#pragma unroll
    for (int j = 0; j < kFour; ++j)
        if (i + j < count) codes |= uint32_t(static_cast<const uint8_t*>(from)[i + j]) << 8 * j;
    return codes;
}

__device__ __forceinline__ void store_codes(void* to, int64_t i, int64_t count, bool vectors,
                                            uint32_t codes) {
    if (vectors && i + kFour <= count) {
        static_cast<uint32_t*>(to)[i / kFour] = codes;
        return;
    }
#pragma unroll
    for (int j = 0; j < kFour; ++j)
        if (i + j < count) static_cast<uint8_t*>(to)[i + j] = uint8_t(codes >> 8 * j);
}

// Of a rule with a signed and an unsigned moment.
template <typename Rule>
__global__ void __launch_bounds__(kThreads)
    step_8bit_kernel(const Table table, const Maps* __restrict__ maps) {
    PEFTCORE_SHARED(float, means, [256]);
    PEFTCORE_SHARED(float, squares, [256]);
    PEFTCORE_SHARED(Encoder, encoders, [2]);
    static_assert(Rule::kMoments == 2 && kThreads == 256, "two maps, an entry a thread");
    const int thread = threadIdx.x;
    means[thread] = maps->means.value[thread];
    squares[thread] = maps->squares.value[thread];
    constexpr int kWords = sizeof(Encoder) / sizeof(uint32_t);
    static_assert(kWords <= kThreads, "a word a thread");
    if (thread < kWords) {
        reinterpret_cast<uint32_t*>(&encoders[0])[thread] =
            reinterpret_cast<const uint32_t*>(&maps->means.encoder)[thread];
        reinterpret_cast<uint32_t*>(&encoders[1])[thread] =
            reinterpret_cast<const uint32_t*>(&maps->squares.encoder)[thread];
    }
    __syncthreads();
    for_blocks(table, [&](const Segment& s, int64_t begin) {
        const Rule rule = with_scalars<Rule>(table.rows[s.row]);
        const Lane lane(s, begin, 2);
        float* m_absmax = static_cast<float*>(s.state[2]) + begin / kBlock;
        float* v_absmax = static_cast<float*>(s.state[3]) + begin / kBlock;
        const float m_before = *m_absmax, v_before = *v_absmax;
        uint32_t m_codes[kParts], v_codes[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            m_codes[part] = load_codes(s.state[0], lane.index(part), s.count, lane.vectors);
            v_codes[part] = load_codes(s.state[1], lane.index(part), s.count, lane.vectors);
        }
        float m[kParts][kFour], v[kParts][kFour];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            float state[2][kFour];
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                state[0][j] = __fmul_rn(means[m_codes[part] >> 8 * j & 255], m_before);
                state[1][j] = __fmul_rn(squares[v_codes[part] >> 8 * j & 255], v_before);
            }
            lane.update(part, rule, state);
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                // NaN or infinity in one element must not become the scale of 256: its state is reset.
                const bool finite = state[0][j] - state[0][j] == 0 && state[1][j] - state[1][j] == 0 &&
                                    lane.index(part) + j < s.count;
                m[part][j] = finite ? state[0][j] : 0;
                v[part][j] = finite ? state[1][j] : 0;
            }
        }
        const float m_scale = largest(m), v_scale = largest(v);  // after all lanes have read the old scales
        if (threadIdx.x % 32 == 0) {
            *m_absmax = m_scale;
            *v_absmax = v_scale;
        }
        const float to_m = m_scale > 0 ? 1.0f / m_scale : 0.0f, to_v = v_scale > 0 ? 1.0f / v_scale : 0.0f;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            uint32_t m_after = 0, v_after = 0;
#pragma unroll
            for (int j = 0; j < kFour; ++j) {
                m_after |= uint32_t(encode_signed(__fmul_rn(m[part][j], to_m), encoders[0])) << 8 * j;
                v_after |= uint32_t(encode_unsigned(__fmul_rn(v[part][j], to_v), encoders[1])) << 8 * j;
            }
            store_codes(s.state[0], lane.index(part), s.count, lane.vectors, m_after);
            store_codes(s.state[1], lane.index(part), s.count, lane.vectors, v_after);
        }
    });
}

// Arguments of all kernels, and their launch.
struct Launch {
    Table table;
    const Maps* maps;
    void* stream;

    template <typename Rule>
    static const char* rule(const Launch& l) {
        const int64_t grid = ceil_div(l.table.blocks, l.table.blocks_per_block);
        if constexpr (Rule::kIn8Bits)
            return PEFTCORE_LAUNCH(step_8bit_kernel<Rule>, grid, kThreads, 0, l.stream, l.table, l.maps);
        else
            return PEFTCORE_LAUNCH(step_kernel<Rule>, grid, kThreads, 0, l.stream, l.table);
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
    using namespace peftcore;
    using namespace peftcore::optim;
    if (blocks == 0) return nullptr;
    const int64_t blocks_per_block = filled_up(ceil_div(blocks, cuda_tuning().step_blocks), kWarps);
    const Table table = {segments, first_block, count, blocks, blocks_per_block, rows};
    return Launch{table, maps, stream}.number(rule, Rules());
}

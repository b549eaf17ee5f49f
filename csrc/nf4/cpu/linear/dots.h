// The "dots" way (see kernels.h): some rows of W side by side, 8 values (one 32-bit word) a lane.
//
// A 16-bit lane of a word shifted right by 0, 4, 8 or 12 begins with the nibble of a value, so one permutation looks up
// 32 values, and the dot product adds up pairs of words: 8 instructions for 128 values, beside the 23 of fp32. x is
// arranged in that order. Two vectors of W are dealt so that each has half of every block.
#pragma once

#include <immintrin.h>

#include <vector>

#include "nf4/cpu/linear/kernels.h"
#include "nf4/cpu/linear/rounded.h"
#include "nf4/cpu/linear/scales.h"

namespace peftcore {
namespace nf4 {
namespace {

// Twice over: an index's fifth bit then does not matter.
struct Avx512Rounding {
    using Table = __m512i;

    static float round(const float* code, float factor, Table& table) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(factor));
        const __m256i rounded = __m256i(_mm512_cvtneps_pbh(scaled));
        const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
        const __m512 lost = _mm512_mul_ps(_mm512_sub_ps(back, scaled), _mm512_set1_ps(1.0f / factor));
        table = _mm512_broadcast_i64x4(rounded);
        return _mm512_reduce_add_ps(_mm512_mul_ps(lost, lost));
    }
};
using Rounded = RoundedCodebook<Avx512Rounding>;

struct LinearDots {
    static constexpr int kBlock = 64;   // values that share a scale
    static constexpr int kChunk = 256;  // values of two vectors
    static constexpr int kBlocks = kChunk / kBlock;
    static constexpr int kMaxBatch = 3;  // rows of x
    // Bytes from what is read to what is fetched meanwhile, in the order in which it lies: out of memory on one core of
    // Zen 4 (1536 x 2048), of 19 GB/s of a plain read, 16; each row's own line as far ahead 8; nothing 6.
    static constexpr int64_t kAhead = 6144;
    static constexpr int64_t kScalesAhead = 16;  // rows of W, of which scales are fetched meanwhile

    static int64_t chunks(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

    static int64_t arranged_bytes(int64_t batch, int64_t columns) {
        return batch * chunks(columns) * kChunk * int64_t(sizeof(uint16_t));
    }

    static __m512i load_x(const uint16_t* from, int64_t count) {
        if (count >= 32) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi16(count <= 0 ? 0 : __mmask32((1u << count) - 1), from);
    }

    // [batch][chunk][vector][j][lane]: value j ^ 1 of four, the even value being the high nibble.
    static bool arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        uint16_t* to = static_cast<uint16_t*>(out);
        alignas(64) uint16_t every_fourth[32];
        for (int i = 0; i < 32; ++i) every_fourth[i] = uint16_t(4 * i % 64);
        const __m512i first = _mm512_load_si512(every_fourth);
        for (int64_t m = 0; m < batch; ++m, from += columns)
            for (int64_t k = 0; k < columns; k += kChunk)
                for (int64_t half = k; half < k + kBlock; half += kBlock / 2, to += kChunk / 2) {
                    __m512i part[kBlocks];
                    for (int i = 0; i < kBlocks; ++i)
                        part[i] = load_x(from + half + kBlock * i, columns - half - kBlock * i);
                    for (int j = 0; j < 4; ++j) {
                        const __m512i index = _mm512_add_epi16(first, _mm512_set1_epi16(short(j ^ 1)));
                        const __m512i low = _mm512_permutex2var_epi16(part[0], index, part[1]);
                        const __m512i high = _mm512_permutex2var_epi16(part[2], index, part[3]);
                        _mm512_storeu_si512(to + 32 * j,
                                            _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
                    }
                }
        return true;
    }

    // Half of each block in one vector, half in the other: so all their products add up before they are scaled.
    struct Words {
        __m512i of[2];
    };
    static Words load_words(const uint8_t* from, __mmask16 first, __mmask16 second) {
        const __m512i one = _mm512_maskz_loadu_epi32(first, from),
                      other = _mm512_maskz_loadu_epi32(second, from + 64);
        return {{_mm512_shuffle_i32x4(one, other, 0x88), _mm512_shuffle_i32x4(one, other, 0xdd)}};
    }
    static __mmask16 lanes(int64_t values) {
        return __mmask16(values >= 128 ? 0xffff : values > 0 ? (1u << values / 8) - 1 : 0);
    }

    // Of a chunk's blocks, each for its lanes.
    static __m512 load_scales(const float* from) {
        const __m512i block = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutexvar_ps(block, _mm512_castps128_ps512(_mm_loadu_ps(from)));
    }

    // Rows [n, n + kCount) of W by all of x. `scales`: of their blocks, `stride` a row. Inlined beside others it would have
    // too few registers: one row takes 1.2 times as long then, three 1.4.
    template <int kCount, int kBatch>
    [[gnu::noinline]]
    static void multiply(const LinearCall& args, const Rounded& rounded, const float* scales, int64_t stride,
                         int64_t n) {
        const WeightView weight = args.weight;
        const int64_t columns = weight.columns, count = chunks(columns);
        const uint16_t* x = static_cast<const uint16_t*>(args.x);
        const __m512i table = rounded.table;
        __m512 sums[kCount][kBatch];
        for (auto& row : sums)
            for (__m512& sum : row) sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < count; ++c) {
            const int64_t k = c * kChunk;
            const __mmask16 first = lanes(columns - k), second = lanes(columns - k - kChunk / 2);
            const uint8_t* ahead = weight.codes + n * columns / 2 + c * kCount * kChunk / 2 + kAhead;
            Words words[kCount];
#pragma GCC unroll 4
            for (int r = 0; r < kCount; ++r) {
                _mm_prefetch(reinterpret_cast<const char*>(ahead + r * kChunk / 2), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(ahead + r * kChunk / 2 + 64), _MM_HINT_T0);
                words[r] = load_words(weight.codes + ((n + r) * columns + k) / 2, first, second);
            }
            __m512 part[kCount][kBatch];
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    const __m512i w = _mm512_permutexvar_epi16(
                        _mm512_srli_epi16(words[r].of[j / 4], unsigned(j % 4 * 4)), table);
#pragma GCC unroll 3
                    for (int i = 0; i < kBatch; ++i) {
                        const __m512i pair = _mm512_loadu_si512(x + (i * count + c) * kChunk + 32 * j);
                        part[r][i] = _mm512_dpbf16_ps(j == 0 ? _mm512_setzero_ps() : part[r][i], __m512bh(w),
                                                      __m512bh(pair));
                    }
                }
#pragma GCC unroll 4
            for (int r = 0; r < kCount; ++r) {
                const __m512 scale = load_scales(scales + r * stride + c * kBlocks);
#pragma GCC unroll 3
                for (int i = 0; i < kBatch; ++i) sums[r][i] = _mm512_fmadd_ps(scale, part[r][i], sums[r][i]);
            }
        }
        for (int r = 0; r < kCount; ++r)
            for (int i = 0; i < kBatch; ++i)
                store_result(args, i, n + r, _mm512_reduce_add_ps(sums[r][i]) * rounded.inverse);
    }

    template <int kBatch>
    static void run_all(const LinearCall& args, int64_t first, int64_t last) {
        constexpr int kRows = kBatch < 3 ? 4 : 2;  // of W, whose sums and parts of them fit into registers
        const Rounded& rounded = Rounded::made_of(args.weight.quant_map);
        const RowScales scales(args.weight, kBlock);
        const int64_t stride = RowScales::capacity(args.weight.columns, kBlock);
        std::vector<float> memory(size_t(kRows * stride));
        for (int64_t n = first; n < last;) {
            const int rows = last - n < kRows ? 1 : kRows;
            // While scales are made nothing asks for W, so that some of it is asked for before: one row of x out of memory
            // takes 0.88 of the time.
            const uint8_t* ahead = args.weight.codes + n * args.weight.columns / 2 + kAhead;
            for (int line = 0; line < 16; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * line), _MM_HINT_T0);
            scales.fetch(n + kScalesAhead, rows);
            for (int r = 0; r < rows; ++r) scales.write(n + r, memory.data() + r * stride);
            if (rows == 1)
                multiply<1, kBatch>(args, rounded, memory.data(), stride, n);
            else
                multiply<kRows, kBatch>(args, rounded, memory.data(), stride, n);
            n += rows;
        }
    }

    static void run(const LinearCall& args, int64_t first, int64_t last) {
        switch (args.batch) {
            case 1:
                return run_all<1>(args, first, last);
            case 2:
                return run_all<2>(args, first, last);
            default:
                return run_all<3>(args, first, last);
        }
    }

    static LinearKernel kernel() {
        return {.max_batch = {0, 0, kMaxBatch},
                .min_blocksize = kBlock,
                .column_multiple = kBlock,
                .arranged_bytes = arranged_bytes,
                .arrange = arrange,
                .run = run};
    }
};

}  // namespace
}  // namespace nf4
}  // namespace peftcore

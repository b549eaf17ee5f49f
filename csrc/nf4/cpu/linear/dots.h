// The "dots" way (see kernels.h): kRows rows of W side by side, 8 values (one 32-bit word) a lane.
//
// A 16-bit lane of a word shifted right by 0, 4, 8 or 12 begins with the nibble of a value, so one permutation looks up
// 32 values, and the dot product adds up pairs of words: 7 instructions for 128 values, beside the 23 of fp32. x is
// arranged in that order.
#pragma once

#include <immintrin.h>

#include <vector>

#include "nf4/cpu/linear/kernels.h"
#include "nf4/cpu/linear/rounded.h"

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
    static constexpr int kChunk = 128;   // values, 64 bytes
    static constexpr int kBlock = 64;    // that share a scale
    static constexpr int kRows = 4;      // of W
    static constexpr int kMaxBatch = 2;  // rows of x
    // Bytes from what is read to what is fetched meanwhile, in the order in which it lies: out of memory on one core of
    // Zen 4 (1536 x 2048), of 19 GB/s of a plain read, 16; each row's own line as far ahead 8; nothing 6.
    static constexpr int64_t kAhead = 6144;

    static int64_t chunks(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

    static int64_t arranged_bytes(int64_t batch, int64_t columns) {
        return batch * chunks(columns) * kChunk * int64_t(sizeof(uint16_t));
    }

    static __m512i load_x(const uint16_t* from, int64_t count) {
        if (count >= 32) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi16(count <= 0 ? 0 : __mmask32((1u << count) - 1), from);
    }

    // [batch][chunk][j][lane]: value j ^ 1 of four, the even value being the high nibble.
    static bool arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        uint16_t* to = static_cast<uint16_t*>(out);
        alignas(64) uint16_t every_fourth[32];
        for (int i = 0; i < 32; ++i) every_fourth[i] = uint16_t(4 * i % 64);
        const __m512i first = _mm512_load_si512(every_fourth);
        for (int64_t m = 0; m < batch; ++m, from += columns)
            for (int64_t k = 0; k < columns; k += kChunk, to += kChunk) {
                __m512i part[4];
                for (int i = 0; i < 4; ++i) part[i] = load_x(from + k + 32 * i, columns - k - 32 * i);
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

    // Of two blocks of kBlock values, which begin with element `at`; the second half of the lanes is the second one's.
    static __m512 scales(const WeightView& weight, int64_t at, bool two) {
        const int64_t first = at >> weight.shift, second = two ? (at + kBlock) >> weight.shift : first;
        const auto pair = [](const float* one, const float* other) {
            return _mm512_mask_broadcastss_ps(_mm512_broadcastss_ps(_mm_load_ss(one)), 0xff00,
                                              _mm_load_ss(other));
        };
        if (weight.nested_absmax == nullptr) {
            const float* absmax = static_cast<const float*>(weight.absmax);
            return pair(absmax + first, absmax + second);
        }
        const uint8_t* codes = static_cast<const uint8_t*>(weight.absmax);
        const auto outer = [&](int64_t b) {
            return weight.nested_absmax + ((weight.first_block + b) >> weight.nested_shift);
        };
        const __m512 inner =
            pair(weight.nested_quant_map + codes[first], weight.nested_quant_map + codes[second]);
        return _mm512_add_ps(_mm512_mul_ps(inner, pair(outer(first), outer(second))),
                             _mm512_set1_ps(*weight.nested_offset));
    }

    // Rows [n, n + kCount) of W by all of x.
    template <int kCount, int kBatch>
    static void multiply(const LinearCall& args, const Rounded& code, int64_t n) {
        const WeightView weight = args.weight;
        const int64_t columns = weight.columns, count = chunks(columns);
        const uint16_t* x = static_cast<const uint16_t*>(args.x);
        __m512 sums[kCount][kBatch];
        for (auto& row : sums)
            for (__m512& sum : row) sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < count; ++c) {
            const int64_t k = c * kChunk;
            const bool whole = columns - k >= kChunk;
            const uint8_t* ahead = weight.codes + n * columns / 2 + c * kCount * kChunk / 2 + kAhead;
            __m512i word[kCount];
#pragma GCC unroll 4
            for (int r = 0; r < kCount; ++r) {
                _mm_prefetch(reinterpret_cast<const char*>(ahead + r * kChunk / 2), _MM_HINT_T0);
                word[r] = _mm512_maskz_loadu_epi32(whole ? 0xffff : 0xff,
                                                   weight.codes + ((n + r) * columns + k) / 2);
            }
            __m512 part[kCount][kBatch];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    const __m512i w =
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(word[r], unsigned(4 * j)), code.table);
#pragma GCC unroll 2
                    for (int i = 0; i < kBatch; ++i) {
                        const __m512i pair = _mm512_loadu_si512(x + (i * count + c) * kChunk + 32 * j);
                        part[r][i] = _mm512_dpbf16_ps(j == 0 ? _mm512_setzero_ps() : part[r][i], __m512bh(w),
                                                      __m512bh(pair));
                    }
                }
#pragma GCC unroll 4
            for (int r = 0; r < kCount; ++r) {
                const __m512 scale = scales(weight, (n + r) * columns + k, whole);
#pragma GCC unroll 2
                for (int i = 0; i < kBatch; ++i) sums[r][i] = _mm512_fmadd_ps(scale, part[r][i], sums[r][i]);
            }
        }
        for (int r = 0; r < kCount; ++r)
            for (int i = 0; i < kBatch; ++i)
                store_result(args, i, n + r, _mm512_reduce_add_ps(sums[r][i]) * code.inverse);
    }

    template <int kBatch>
    static void run_all(const LinearCall& args, int64_t first, int64_t last) {
        const Rounded& code = Rounded::made_of(args.weight.quant_map);
        for (; last - first >= kRows; first += kRows) multiply<kRows, kBatch>(args, code, first);
        for (; first < last; ++first) multiply<1, kBatch>(args, code, first);
    }

    static void run(const LinearCall& args, int64_t first, int64_t last) {
        args.batch == 1 ? run_all<1>(args, first, last) : run_all<2>(args, first, last);
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

// Factors and rows of x as pairs of bf16 values, for the levels that multiply these: AVX-512 bf16 and AMX. A factor's value
// is split into two bf16 values (see kernels.h). The namespace is anonymous because each level compiles its copy.
#pragma once

#include "common/integers.h"
#include "gemm/cpu/transpose.h"
#include "lora/cpu/blocks.h"
#include "simd/avx512.h"

namespace peftcore {
namespace lora {
namespace {

constexpr int kPair = 2, kHalves = 2;
constexpr int64_t kBlockPairs = kBlockRows / kPair;
constexpr int64_t kSplitSide = kWidthMultiple;

__mmask16 first_of(int64_t count) { return count < 16 ? __mmask16((1u << count) - 1) : __mmask16(0xffff); }

// 16 fp32 values as pairs of bf16 values. The instruction flushes subnormals to zero, as tiles do.
struct Split {
    __m256i first, rest;

    explicit Split(__m512 values) {
        constexpr int kInfinities = 0x18;
        first = __m256i(_mm512_cvtneps_pbh(values));
        const __m512 taken = from_bf16(first);
        // The rest of infinity is 0: the difference would be NaN.
        const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(taken, kInfinities));
        rest = __m256i(_mm512_cvtneps_pbh(_mm512_maskz_sub_ps(finite, values, taken)));
    }
};

__m512i pairs(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Units of two words, the pairs of first values and of remainders: by 16 of the outer dimension [2][16] words.

// For a factor that is contiguous along the outer dimension: two of its lines make pairs.
void arrange_lines(const float* from, int64_t stride, int64_t inner, int64_t outer, int64_t width,
                   uint32_t* out) {
    for (int64_t i = 0; i < inner; i += kPair)
        for (int64_t begin = 0; begin < width; begin += kSplitSide, out += kHalves * kSplitSide) {
            const __mmask16 valid = first_of(outer - begin);
            const float* line = from + i * stride + begin;
            const Split even(_mm512_maskz_loadu_ps(valid, line)),
                odd(_mm512_maskz_loadu_ps(i + 1 < inner ? valid : 0, line + stride));
            _mm512_storeu_si512(out, pairs(even.first, odd.first));
            _mm512_storeu_si512(out + kSplitSide, pairs(even.rest, odd.rest));
        }
}

// For a factor that is contiguous along the inner dimension: 16 lines of 16 values, transposed.
void arrange_turned(const float* from, int64_t stride, int64_t inner, int64_t outer, int64_t width,
                    uint32_t* out) {
    constexpr int64_t kTurned = 8;  // values that `transpose` takes
    alignas(64) uint16_t lines[kHalves][kSplitSide][kSplitSide];
    alignas(64) uint32_t partial[kTurned / kPair][kSplitSide];
    for (int64_t begin = 0; begin < width; begin += kSplitSide)
        for (int64_t i = 0; i < inner; i += kSplitSide) {
            for (int64_t j = 0; j < kSplitSide; ++j) {
                const __mmask16 valid = begin + j < outer ? first_of(inner - i) : __mmask16(0);
                const Split split(_mm512_maskz_loadu_ps(valid, from + (begin + j) * stride + i));
                _mm256_store_si256(reinterpret_cast<__m256i*>(lines[0][j]), split.first);
                _mm256_store_si256(reinterpret_cast<__m256i*>(lines[1][j]), split.rest);
            }
            for (int64_t k = 0; k < kSplitSide && i + k < inner; k += kTurned)
                for (int half = 0; half < kHalves; ++half) {
                    uint32_t* to = out + kHalves * ((i + k) / kPair * width + begin) + half * kSplitSide;
                    const int64_t left = (inner - i - k + 1) / kPair;
                    if (left >= kTurned / kPair) {
                        gemm::transpose(lines[half][0] + k, kSplitSide, to, kHalves * width);
                        continue;
                    }
                    gemm::transpose(lines[half][0] + k, kSplitSide, partial[0], kSplitSide);
                    for (int64_t p = 0; p < left; ++p)
                        std::memcpy(to + p * kHalves * width, partial[p], sizeof partial[p]);
                }
        }
}

void arrange(const float* from, int64_t inner_stride, int64_t outer_stride, int64_t inner, int64_t outer,
             int64_t width, void* to) {
    uint32_t* out = static_cast<uint32_t*>(to);
    if (outer_stride == 1) return arrange_lines(from, inner_stride, inner, outer, width, out);
    arrange_turned(from, outer_stride, inner, outer, width, out);
}

// 32 values, of which those at or behind `count` and those that `keep` drops are zero.
__m512i load_kept(const BFloat16* from, int64_t count, const uint8_t* keep) {
    __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << std::max<int64_t>(count, 0)) - 1;
    if (keep != nullptr) {
        uint32_t bits;
        std::memcpy(&bits, keep, sizeof bits);
        mask &= bits;
    }
    return _mm512_maskz_loadu_epi16(mask, from);
}

// Two rows of x as pairs across them, up to a multiple of 16 columns; `below` may be missing.
void stage_rows(const BFloat16* above, const BFloat16* below, int64_t columns, const uint8_t* keep_above,
                const uint8_t* keep_below, uint32_t* out) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const auto at = [](const uint8_t* keep, int64_t k) { return keep == nullptr ? nullptr : keep + k / 8; };
    for (int64_t k = 0; k < columns; k += 32) {
        const __m512i even = load_kept(above + k, columns - k, at(keep_above, k));
        const __m512i odd =
            below == nullptr ? __m512i() : load_kept(below + k, columns - k, at(keep_below, k));
        const __m512i first = _mm512_unpacklo_epi16(even, odd), second = _mm512_unpackhi_epi16(even, odd);
        _mm512_storeu_si512(out + k, _mm512_permutex2var_epi64(first, low, second));
        if (columns - k > 16)
            _mm512_storeu_si512(out + k + 16, _mm512_permutex2var_epi64(first, high, second));
    }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

// All scales of some rows of W in 4 bits at once, with AVX-512: the same bits as `block_scale` (weight/view.h).
//
// Nested scales are looked up in a table of 256 entries. One by one, or by gathers, that takes 2 cycles each on Zen 4,
// a fifth of the time of 4 rows of x. As two tables of 16 bits, with 64 entries a permutation, it takes 0.9.
#pragma once

#include <immintrin.h>

#include "common/avx512.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

class RowScales {
 public:
    // How many floats `of_rows` may write for so many rows.
    static int64_t capacity(int64_t rows, int64_t columns, int step) {
        return rows * (columns / step) + 1 + kAtOnce;
    }

    // step: a power of two, at most the size of a block, and a divisor of the columns.
    RowScales(const WeightView& weight, int step)
        : weight_(weight),
          step_(step),
          blocks_(weight.columns >> weight.shift),
          whole_blocks_(blocks_ << weight.shift == weight.columns),
          each_(whole_blocks_ ? weight.shift - log2_of(step) : 0),
          in_place_(weight.columns % kReadTogether == 0 && each_ == 0 && are_floats(weight)) {
        if (weight.scales != ScaleKind::kNested) return;
        for (int i = 0; i < kPieces; ++i) {
            const __m512i first = _mm512_loadu_si512(weight.nested_quant_map + 32 * i),
                          second = _mm512_loadu_si512(weight.nested_quant_map + 32 * i + 16);
            low_[i] = joined(first, second);
            high_[i] = joined(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16));
        }
    }

    // The scale of each `step` values of rows [n, n + rows), [rows][columns / step]: in `out`, with anything behind them,
    // or, where the weight has just these, there.
    const float* of_rows(int64_t n, int64_t rows, float* out) const {
        if (in_place_) return static_cast<const float*>(weight_.absmax) + n * blocks_;
        if (whole_blocks_) {
            write(n * blocks_, (n + rows) * blocks_, out);
            return out;
        }
        const int64_t count = weight_.columns / step_;
        float* row = out;
        for (int64_t begin = n * weight_.columns; rows > 0; --rows, begin += weight_.columns, row += count) {
            const int64_t first = begin >> weight_.shift;
            write(first, ((begin + weight_.columns - 1) >> weight_.shift) + 1, row);
            // Backward, to overwrite no scale that is still to be read.
            for (int64_t i = count - 1; i >= 0; --i)
                row[i] = row[((begin + i * step_) >> weight_.shift) - first];
        }
        return out;
    }

    // row(r, each) for each of rows [n, n + rows), and each(body) calls body(b, factors): what x's sums over kLanes blocks
    // of the row from b on are multiplied by, to give what zero points add. Zeros behind the last one.
    template <typename Row>
    void zero_factors(int64_t n, int64_t rows, const Row& row) const {
        const __m512 centre = _mm512_set1_ps(float(kCentre));
        with_affine_scales([&](const auto& scales) {
            with_zeros([&](const auto& zeros) {
                for (int64_t r = 0; r < rows; ++r)
                    row(r, [&](const auto& body) {
                        const int64_t first = (n + r) * blocks_;
                        each_vector(first, first + blocks_, [&](int64_t b, int64_t block, __mmask16 some) {
                            const __m512 offset = _mm512_sub_ps(centre, zeros(block, some));
                            body(b, _mm512_mul_ps(offset, scales(block, some)));
                        });
                    });
            });
        });
    }

    // Prefetches the scales of rows [n, n + rows).
    void fetch(int64_t n, int64_t rows) const {
        const int64_t size = scale_bytes(weight_);
        const char* at = static_cast<const char*>(weight_.absmax);
        const char* end = at + ((n + rows) * weight_.columns >> weight_.shift) * size;
        for (at += (n * weight_.columns >> weight_.shift) * size; at < end; at += 64)
            _mm_prefetch(at, _MM_HINT_T0);
    }

 private:
    static constexpr int kPieces = 8;   // of 32 entries
    static constexpr int kAtOnce = 32;  // scales
    static constexpr int kLanes = 16;
    // Values whose scales are read together, also behind a row's last ones.
    static constexpr int kReadTogether = 256;

    static bool are_floats(const WeightView& weight) {
        return weight.scales == ScaleKind::kFloat ||
               (weight.scales == ScaleKind::kAffine && weight.scale_dtype == Dtype::kFloat);
    }

    // body(place from `first` on, block, mask of the lanes with a block before `last`) for each kLanes blocks.
    template <typename Body>
    static void each_vector(int64_t first, int64_t last, const Body& body) {
        int64_t at = 0;
        for (; at + kLanes <= last - first; at += kLanes) body(at, first + at, __mmask16(0xffff));
        if (at < last - first) body(at, first + at, __mmask16((1u << (last - first - at)) - 1));
    }

    // The scales of blocks [first, last), each 1 << each_ times.
    void write(int64_t first, int64_t last, float* out) const {
        // Copied, because each store could change this object, as far as the compiler knows.
        const auto put = [each = each_, count = (last - first) << each_, out](int64_t at, __m512 scales) {
            if (each == 0) return _mm512_storeu_ps(out + at, scales);
            repeat(scales, each, count - (at << each), out + (at << each));
        };
        const auto put_each = [&](const auto& scales) {
            each_vector(first, last,
                        [&](int64_t at, int64_t block, __mmask16 some) { put(at, scales(block, some)); });
        };
        switch (weight_.scales) {
            case ScaleKind::kFloat:
                return put_each(
                    [from = static_cast<const float*>(weight_.absmax)](int64_t block, __mmask16 some) {
                        return _mm512_maskz_loadu_ps(some, from + block);
                    });
            case ScaleKind::kNested:
                return look_up(first, last - 1, put);
            case ScaleKind::kPowerOfTwo:
                return put_each(
                    [from = static_cast<const uint8_t*>(weight_.absmax)](int64_t block, __mmask16 some) {
                        return power_of_two(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, from + block)));
                    });
            case ScaleKind::kAffine:
                return with_affine_scales(put_each);
            default:  // a kind that has no loop of vectors here
                put_each([&](int64_t block, __mmask16) {
                    alignas(64) float scales[kLanes] = {};
                    block_scales(weight_, block, least(block + kLanes, last), scales);
                    return _mm512_load_ps(scales);
                });
        }
    }

    // 2^(e - 127). 2^-127 is a subnormal, whose bits are larger than those of e = 0, and NaN has a bit more than those
    // of 255.
    static __m512 power_of_two(__m512i e) {
        const __m512i one = _mm512_set1_epi32(1 << 22);
        const __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(e, 23), one);
        const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255));
        return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, is_nan, bits, one));
    }

    // body(a function that loads kLanes scales from a block on)
    template <typename Body>
    void with_affine_scales(const Body& body) const {
        const void* from = weight_.absmax;
        const auto shorts = [from](int64_t block, __mmask16 some) {
            return _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(from) + block);
        };
        switch (weight_.scale_dtype) {
            case Dtype::kBFloat16:
                return body([=](int64_t block, __mmask16 some) { return from_bf16(shorts(block, some)); });
            case Dtype::kHalf:
                return body(
                    [=](int64_t block, __mmask16 some) { return _mm512_cvtph_ps(shorts(block, some)); });
            default:
                return body([from](int64_t block, __mmask16 some) {
                    return _mm512_maskz_loadu_ps(some, static_cast<const float*>(from) + block);
                });
        }
    }

    // body(a function that loads kLanes zero points from a block on)
    template <typename Body>
    void with_zeros(const Body& body) const {
        const void* from = weight_.zeros;
        if (!weight_.whole_zeros)
            return body([from](int64_t block, __mmask16 some) {
                return _mm512_maskz_loadu_ps(some, static_cast<const float*>(from) + block);
            });
        body([from](int64_t block, __mmask16 some) {
            return _mm512_cvtepi32_ps(
                _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, static_cast<const uint8_t*>(from) + block)));
        });
    }

    // 16 scales, each 1 << each times, of which `count` are wanted.
    static void repeat(__m512 scales, int each, int64_t count, float* out) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int64_t i = 0; i < least(count, int64_t(kLanes) << each); i += kLanes) {
            const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(int(i)));
            const __m512i index = _mm512_srl_epi32(at, _mm_cvtsi32_si128(each));
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, scales));
        }
    }

    static __m512i joined(__m512i first, __m512i second) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)),
                                  _mm512_cvtepi32_epi16(second), 1);
    }

    // Bits 6 and 7 of an index choose among four permutations.
    static __m512i entries(const __m512i* pieces, __m512i index, __mmask32 six, __mmask32 seven) {
        const auto of = [&](int i) {
            return _mm512_permutex2var_epi16(pieces[2 * i], index, pieces[2 * i + 1]);
        };
        return _mm512_mask_blend_epi16(seven, _mm512_mask_blend_epi16(six, of(0), of(1)),
                                       _mm512_mask_blend_epi16(six, of(2), of(3)));
    }

    // The factors of the entries of 16 blocks from `block` on; any values behind the last one.
    __m512 outer(int64_t block, int64_t last) const {
        const int64_t one = block >> weight_.nested_shift, next = (one + 1) << weight_.nested_shift;
        const __m512 scale = _mm512_set1_ps(weight_.nested_absmax[one]);
        if (next > last || next - block >= 16) return scale;
        return _mm512_mask_blend_ps(__mmask16(0xffffu << (next - block)), scale,
                                    _mm512_set1_ps(weight_.nested_absmax[one + 1]));
    }

    template <typename Put>
    void look_up(int64_t first, int64_t last, const Put& put) const {
        const uint8_t* codes = static_cast<const uint8_t*>(weight_.absmax) + first;
        const __m512 offset = _mm512_set1_ps(*weight_.nested_offset);
        const int64_t count = last - first + 1, begin = weight_.first_block + first;
        for (int64_t b = 0; b < count; b += kAtOnce) {
            const __mmask32 there = count - b < 32 ? (__mmask32(1) << (count - b)) - 1 : ~__mmask32(0);
            // In the order in which halves are put together: of each 128 bits the first four, then the last.
            const __m512i index =
                _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
                                         _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, codes + b)));
            const __mmask32 six = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                            seven = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
            const __m512i low = entries(low_, index, six, seven), high = entries(high_, index, six, seven);
            const __m512i both[2] = {_mm512_unpacklo_epi16(low, high), _mm512_unpackhi_epi16(low, high)};
            for (int i = 0; i < 2; ++i) {
                const int64_t at = b + 16 * i;
                const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(both[i]),
                                                     outer(begin + least(at, count - 1), begin + count - 1));
                put(at, _mm512_add_ps(product, offset));
            }
        }
    }

    WeightView weight_;
    int step_;
    int64_t blocks_;  // of a row, if they are whole
    bool whole_blocks_;
    int each_;  // log2 of the steps of a block of such rows: a scale is repeated as it is written
    bool in_place_;
    __m512i low_[kPieces], high_[kPieces];
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore

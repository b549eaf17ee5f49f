// Scales as the "dots" way multiplies by them: for each chunk of 256 values a vector, with a block's scale in its lanes.
//
// Copied as floats first, scales take a fifth of the time of one row of x (Zen 5). A shuffle of a chunk's bytes also makes
// these vectors of fp32 and bf16 for larger blocks, of E8M0 for blocks of 32, and of E4M3 for blocks of 16.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <vector>

#include "quant4/cpu/linear/byte_scales.h"
#include "quant4/cpu/linear/scales.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

enum class ChunkKind {
    kUpper,        // the upper bytes of floats
    kPower,        // E8M0
    kE4M3,         // for blocks of 16
    kFloats,       // eight floats
    kSmallFloats,  // 16 floats, for blocks of 16
};

// The scales of some rows.
struct ChunkScales {
    static constexpr int kChunk = 256;  // values
    static constexpr int kStep = 64;    // values with one scale, unless blocks are smaller
    static constexpr int kRead = 16;    // bytes of scales that are read for a chunk

    ChunkKind kind = ChunkKind::kFloats;
    const uint8_t* from = nullptr;
    int64_t row_bytes = 0, chunk_bytes = 8 * sizeof(float);
    __m512i pick = {};  // for each byte of the vector, which byte it is
    float factor = 1;   // of all of them

    // Which 16 values of a chunk a lane's words are of: of each 128 bits the first two lanes have those of the chunk's
    // first half, the others those of its second.
    static constexpr int part_of(int lane) { return lane / 4 * 2 + lane % 2 + lane % 4 / 2 * 8; }

    // With scales of `size` bytes, the upper ones of a float; of fp16 in E4M3.
    static ChunkScales of_bytes(int size, int shift) {
        ChunkScales scales{.kind = shift == kSmallShift ? ChunkKind::kE4M3
                                   : size == 1          ? ChunkKind::kPower
                                                        : ChunkKind::kUpper,
                           .chunk_bytes = kChunk >> shift << log2_of(size)};
        alignas(64) uint8_t pick[64];
        const int lane = scales.kind == ChunkKind::kE4M3 ? 2 : 4;  // bytes
        for (int byte = 0; byte < 64; ++byte) {
            const int block = part_of(byte / lane % 16) * 16 >> shift, within = byte % lane - (lane - size);
            pick[byte] = within < 0 ? 0x80 : uint8_t(block * size + within);  // 0x80: a zero
        }
        scales.pick = _mm512_load_si512(pick);
        return scales;
    }

    // The vector of chunk c of the row at `row`. `values` from there on, if it is not a whole chunk: what is behind them
    // belongs to other rows, and may not be finite.
    template <ChunkKind kKind, bool kAll>
    __m512 vector(const uint8_t* row, int64_t c, int64_t values) const {
        const uint8_t* at = row + c * chunk_bytes;
        const auto some = uint32_t((uint64_t(1) << (chunk_bytes * values / kChunk)) - 1);
        if constexpr (kKind == ChunkKind::kFloats) {
            const __m256i eight = kAll ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
                                       : _mm256_maskz_loadu_epi8(some, at);
            const __m512i part = _mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
            return _mm512_permutexvar_ps(part, _mm512_castsi512_ps(_mm512_castsi256_si512(eight)));
        }
        if constexpr (kKind == ChunkKind::kSmallFloats) {
            const __mmask16 there = kAll ? __mmask16(0xffff) : __mmask16((1u << values / 16) - 1);
            const __m512i part = _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
            return _mm512_permutexvar_ps(part, _mm512_maskz_loadu_ps(there, at));
        }
        const __m128i sixteen = kAll ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(at))
                                     : _mm_maskz_loadu_epi8(__mmask16(some), at);
        if constexpr (kKind == ChunkKind::kE4M3) {
            const __m256i upper =
                _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), _mm512_castsi512_si256(pick));
            return _mm512_cvtph_ps(_mm256_srli_epi16(upper, 8 - ByteScales::kPlace));
        }
        const __m512i picked = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), pick);
        return _mm512_castsi512_ps(kKind == ChunkKind::kUpper ? picked : _mm512_srli_epi32(picked, 1));
    }
};

// Makes them of a weight's rows, as they are in memory or written as floats.
class StripScales {
 public:
    // rows: most that `of_rows` is called with
    StripScales(const WeightView& weight, int64_t rows)
        : weight_(weight),
          step_(weight.shift < 6 ? 1 << weight.shift : ChunkScales::kStep),
          floats_(weight, step_),
          bytes_of_small_(weight_),
          row_bytes_((weight.columns >> weight.shift) * scale_bytes(weight)),
          written_(size_t(RowScales::capacity(rows, weight.columns, step_))) {
        const int size = scale_bytes(weight);
        const bool whole = weight.columns % (int64_t(1) << weight.shift) == 0;
        in_place_ = whole && are_upper_bytes(weight) && weight.shift <= log2_of(ChunkScales::kChunk);
        if (in_place_) bytes_ = ChunkScales::of_bytes(size, weight.shift);
        if (weight.shift > 5) as_floats_ = ChunkScales::of_bytes(sizeof(float), 6);
        if (weight.shift == kSmallShift)
            as_floats_ = {.kind = ChunkKind::kSmallFloats,
                          .chunk_bytes = ChunkScales::kChunk / 16 * sizeof(float)};
        as_floats_.row_bytes = weight.columns / step_ * int64_t(sizeof(float));
        bytes_.row_bytes = row_bytes_;
        if (in_place_) copied_.resize(size_t(rows * row_bytes_ + ChunkScales::kRead));
    }

    // Of rows [n, n + rows), until the next call.
    ChunkScales of_rows(int64_t n, int64_t rows) {
        ChunkScales scales = bytes_;
        scales.from = static_cast<const uint8_t*>(weight_.absmax) + n * row_bytes_;
        const bool small = in_place_ && weight_.shift == kSmallShift;
        const std::optional<float> factor = small ? bytes_of_small_.factor(n, rows) : 1;
        scales.factor = factor.value_or(1);
        if (!in_place_ || !factor ||
            (weight_.scales == ScaleKind::kPowerOfTwo && !are_normal(scales.from, rows * row_bytes_))) {
            scales = as_floats_;
            scales.from = reinterpret_cast<const uint8_t*>(floats_.of_rows(n, rows, written_.data()));
            return scales;
        }
        if (n + rows == weight_.rows) {  // nothing may be read behind them
            memcpy(copied_.data(), scales.from, size_t(rows * row_bytes_));
            scales.from = copied_.data();
        }
        return scales;
    }

    const RowScales& floats() const { return floats_; }

 private:
    static bool are_upper_bytes(const WeightView& weight) {
        if (weight.scales == ScaleKind::kPowerOfTwo) return weight.shift == 5;
        if (weight.shift == kSmallShift) return true;
        return weight.shift > 5 &&
               (weight.scales == ScaleKind::kFloat ||
                (weight.scales == ScaleKind::kAffine && weight.scale_dtype != Dtype::kHalf));
    }

    // Whether all are from 1 to 254: 2^-127 is a subnormal, and 255 is NaN.
    static bool are_normal(const uint8_t* from, int64_t count) {
        __m512i least = _mm512_set1_epi8(-1);
        const auto add = [&least](__m512i scales) {
            least = _mm512_min_epu8(least, _mm512_add_epi8(scales, _mm512_set1_epi8(1)));
        };
        int64_t i = 0;
        for (; i + 64 <= count; i += 64) add(_mm512_loadu_si512(from + i));
        const __mmask64 some = (uint64_t(1) << (count - i)) - 1;
        add(_mm512_mask_loadu_epi8(_mm512_set1_epi8(1), some, from + i));
        return _mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(2)) == 0;
    }

    WeightView weight_;
    int step_;
    RowScales floats_;
    ByteScales bytes_of_small_;
    int64_t row_bytes_;
    bool in_place_;
    ChunkScales bytes_, as_floats_;
    std::vector<float> written_;
    std::vector<uint8_t> copied_;
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore

// Scales in E4M3 of blocks of 16 (NVFP4's), decoded in registers instead of being written as floats first: there are four
// times as many as of blocks of 64.
#pragma once

#include <cmath>
#include <cstring>
#include <optional>

#include "quant4/cpu/linear/kernels.h"

namespace peftcore {
namespace quant4 {
namespace {

// Blocks of 16 values, which have nested scales.
constexpr int kSmallShift = 4;

// A scale in E4M3 that is neither zero nor subnormal: no conversion from fp16 is needed, which takes two operations.
struct NormalScale {
    static constexpr uint8_t kFirst = 8;
    // kExponent | byte << 20 is the fp32 number E4M3 / kRange.
    static constexpr int kExponent = 96 << 23;
    static constexpr float kRange = 0x1p24f;

    uint8_t byte;
};

// Whether a table of nested scales has E4M3's values times a number: 1, or what compressed-tensors divides by.
struct ByteMap {
    static constexpr uint8_t kLast = 126;  // of the codes from 0 on that are neither negative nor NaN
    static constexpr int kOne = 56;

    explicit ByteMap(const float* map) : factor(map[kOne]) {
        std::memcpy(of, map, sizeof of);
        for (int code = 0; code <= kLast; ++code) {
            const float expected = factor * (code < 8 ? std::ldexp(float(code), -9)
                                                      : std::ldexp(1.0f + float(code % 8) / 8, code / 8 - 7));
            matches &= std::fabs(map[code] - expected) <= 0x1p-22f * std::fabs(expected);  // false for NaN
        }
    }

    bool matches = true;
    float factor;
    float of[256];
};

class ByteScales {
 public:
    // A byte times 2^kPlace is the fp16 number E4M3 / kRange, also if it is zero or subnormal.
    static constexpr int kPlace = 7;
    static constexpr float kRange = 256;

    explicit ByteScales(const WeightView& weight) : weight_(weight) {
        if (weight.scales != ScaleKind::kNested || weight.shift != kSmallShift || *weight.nested_offset != 0)
            return;
        const ByteMap& map = made_of_code<ByteMap>(weight.nested_quant_map);
        matches_ = map.matches;
        factor_ = map.factor;
    }

    const uint8_t* of_row(int64_t n) const {
        return static_cast<const uint8_t*>(weight_.absmax) + n * row_bytes();
    }
    int64_t row_bytes() const { return weight_.columns >> kSmallShift; }
    void prefetch(int64_t n) const {
        for (int64_t i = 0; i < row_bytes(); i += 64) __builtin_prefetch(of_row(n) + i);
    }

    // What decoded bytes of rows [n, n + rows) are to be multiplied by. Nothing if a scale is negative or NaN, if it is
    // smaller than `first_byte`, or if these rows have several outer scales.
    std::optional<float> factor(int64_t n, int64_t rows, uint8_t first_byte = 0, float range = kRange) const {
        if (!matches_) return {};
        const int64_t begin = weight_.first_block + n * row_bytes(), count = rows * row_bytes();
        const int64_t first = begin >> weight_.nested_shift,
                      last = (begin + count - 1) >> weight_.nested_shift;
        const float outer = weight_.nested_absmax[first], found = factor_ * outer * range;
        bool same = std::isfinite(found);
        for (int64_t i = first; i <= last; ++i) same &= weight_.nested_absmax[i] == outer;
        const uint8_t* from = of_row(n);
        uint8_t most = 0, least = ByteMap::kLast;
        for (int64_t i = 0; i < count; ++i) {
            most = from[i] > most ? from[i] : most;
            least = from[i] < least ? from[i] : least;
        }
        if (!same || most > ByteMap::kLast || least < first_byte) return {};
        return found;
    }

    // The scales of row n, with a factor as above. The loop has no branch, so that compilers vectorise it: a zero or
    // subnormal byte is m 2^-17, which is 2^-14 (1 + m / 8) - 2^-14.
    void decode(int64_t n, float factor, float* out) const {
        const uint8_t* from = of_row(n);
        const int64_t count = row_bytes();
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t byte = from[i], one_if_subnormal = byte < 8;
            const float value = bits_float((byte << 20) + ((112u + one_if_subnormal) << 23));
            out[i] = (value - bits_float(one_if_subnormal * (113u << 23))) * factor;
        }
    }

 private:
    const WeightView& weight_;
    bool matches_ = false;
    float factor_ = 0;
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore

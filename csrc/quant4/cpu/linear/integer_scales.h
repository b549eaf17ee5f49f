// Scales as the "integers" way multiplies by them (see integers.h).
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "quant4/cpu/linear/byte_scales.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kIntegerBlock = 64;  // values of x that share a scale

// Each scale of blocks [first, last) twice, and zeros as `copy_scales` writes them: the most frequent size but
// kIntegerBlock.
inline void scales_twice(const WeightView& weight, int64_t first, int64_t last, float* out) {
    constexpr int64_t kAtOnce = 32;
    float scales[kAtOnce];
    for (int64_t b = first; b < last; b += kAtOnce) {
        const int64_t count = std::min(last - b, kAtOnce);
        block_scales(weight, b, b + count, scales);
        for (int64_t i = 0; i < count; ++i, out += 2) out[0] = out[1] = scales[i];
    }
    *out = 0;
}

// Of each kIntegerBlock values of row n, or of each block if that is smaller.
inline void scales_of_row(const WeightView& weight, int64_t n, float* out) {
    const int64_t begin = n * weight.columns, end = begin + weight.columns;
    const int64_t first = begin >> weight.shift, size = int64_t(1) << weight.shift;
    if (size == 2 * kIntegerBlock && weight.columns % size == 0)
        return scales_twice(weight, first, end >> weight.shift, out);
    copy_scales(weight, begin, end, out);
    if (size <= kIntegerBlock) return;
    // Backward, to overwrite no scale that is still to be read.
    for (int64_t i = weight.columns / kIntegerBlock - 1; i >= 0; --i)
        out[i] = out[((begin + i * kIntegerBlock) >> weight.shift) - first];
    out[weight.columns / kIntegerBlock] = 0;  // for half a chunk, with values of x that are zeros
}

// The bytes of scales of rows with blocks of 16, where they are.
class SmallScales {
 public:
    explicit SmallScales(const WeightView& weight) : weight_(weight), bytes_(weight) {}

    // Rows [n, n + rows) from now on. `together`: how many bytes are read at once.
    void begin(int64_t n, int64_t rows, int64_t together) {
        const int64_t row_bytes = bytes_.row_bytes();
        first_ = n;
        rows_ = rows;
        from_ = bytes_.of_row(n);
        // Scales of the next rows, which nothing else loads before they are checked.
        for (int64_t i = 0; i < rows * row_bytes; i += 64) __builtin_prefetch(from_ + rows * row_bytes + i);
        if (n + rows == weight_.rows && row_bytes % together != 0) {  // nothing may be read behind them
            copied_.resize(size_t(rows * row_bytes + together));
            std::memcpy(copied_.data(), from_, size_t(rows * row_bytes));
            from_ = copied_.data();
        }
    }

    // What decoded bytes are to be multiplied by, as ByteScales::factor; nothing if some scales are not normal.
    std::optional<float> factor() const { return bytes_.factor(first_, rows_); }
    std::optional<float> normal_factor() const {
        return bytes_.factor(first_, rows_, NormalScale::kFirst, NormalScale::kRange);
    }

    const uint8_t* of_row(int64_t n) const { return from_ + (n - first_) * bytes_.row_bytes(); }

 private:
    const WeightView& weight_;
    const ByteScales bytes_;
    int64_t first_ = 0, rows_ = 0;
    const uint8_t* from_ = nullptr;
    std::vector<uint8_t> copied_;
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore

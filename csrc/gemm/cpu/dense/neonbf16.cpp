// A dense W as the right side of a product.
#include <cstring>

#include "gemm/cpu/kernels.h"
#include "gemm/cpu/neon.h"
#include "gemm/cpu/region.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int kRows = 4, kColumns = 8;  // that are transposed together

// The first `count` of eight values, the others zeros.
inline uint16x8_t load_some(const BFloat16* from, int64_t count) {
    if (count >= kColumns) return vld1q_u16(bits_of(from));
    uint16_t whole[kColumns] = {};
    if (count > 0) std::memcpy(whole, from, size_t(count) * sizeof(BFloat16));
    return vld1q_u16(whole);
}

void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    for (int64_t begin = 0; begin < tiles * kTileColumns; begin += kRows) {
        const int64_t row = column + begin;
        if (row >= weight.rows) return;
        const BFloat16* from[kRows];
        for (int r = 0; r < kRows; ++r)  // repeats the last row, for columns that are not stored
            from[r] =
                static_cast<const BFloat16*>(weight.dense) + least(row + r, weight.rows - 1) * weight.columns;
        uint32_t* to = out + begin / kTileColumns * stride + begin % kTileColumns;
        for (int64_t k = first; k < last; k += kColumns, to += kColumns / 2 * kTileColumns) {
            uint16x8_t values[kRows];
            for (int r = 0; r < kRows; ++r) values[r] = load_some(from[r] + k, last - k);
            transpose(values, least(kColumns / 2, (last - k + 1) / 2), to);
        }
    }
}

void unpack_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                  uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    for (int64_t n = first; n < last; n += 2, out += kTileColumns) {
        const BFloat16* above = static_cast<const BFloat16*>(weight.dense) + n * weight.columns + column;
        for (int64_t i = 0; i < tiles * kTileColumns; i += kColumns) {
            const int64_t left = weight.columns - column - i;
            store_pairs(load_some(above + i, left),
                        load_some(above + weight.columns + i, n + 1 < last ? left : 0),
                        out + i / kTileColumns * stride + i % kTileColumns);
        }
    }
}

}  // namespace

void fill_neonbf16(DenseReader& reader) {
    reader = {{.transposed = {.unpack = unpack_transposed, .even_odd = false, .region = region_transposed},
               .plain = {.unpack = unpack_plain, .even_odd = false, .region = region_plain}}};
}

}  // namespace gemm
}  // namespace peftcore

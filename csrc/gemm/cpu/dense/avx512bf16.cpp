// A dense W as the right side of a product.
#include <cstring>

#include "gemm/cpu/kernels.h"
#include "gemm/cpu/region.h"
#include "gemm/cpu/transpose.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int kRows = 16, kColumns = 8;  // that `transpose` takes
constexpr int kLine = 32;                // values of a cache line

// Fewer rows or columns than that; `count` columns become pairs.
void transpose_some(const uint16_t* from, int64_t stride, int64_t rows, int64_t count, uint32_t* out) {
    uint16_t values[kRows][kColumns] = {};
    uint32_t pairs[kColumns / 2][kRows];
    for (int64_t r = 0; r < rows; ++r) std::memcpy(values[r], from + r * stride, size_t(count) * 2);
    transpose(values[0], kColumns, pairs[0], kRows);
    for (int64_t p = 0; p < (count + 1) / 2; ++p)
        std::memcpy(out + p * kTileColumns, pairs[p], sizeof *pairs);
}

// 16 rows of W, a cache line of each at a time.
void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    constexpr int kHalves = kTileColumns / kRows;
    for (int i = 0; i < kHalves * tiles; ++i) {
        const int64_t row = column + i * kRows, rows = weight.rows - row;
        if (rows <= 0) return;
        const uint16_t* from = static_cast<const uint16_t*>(weight.dense) + row * weight.columns;
        uint32_t* to = out + i / kHalves * stride + i % kHalves * kRows;
        for (int64_t k = first; k < last; k += kLine) {
            const int64_t end = last - k < kLine ? last : k + kLine;
            // Lines of successive rows are too far apart for the processor's prefetcher.
            if (rows >= kRows)
                for (int r = 0; r < kRows; ++r)
                    _mm_prefetch(reinterpret_cast<const char*>(from + r * weight.columns + k + 2 * kLine),
                                 _MM_HINT_T0);
            for (int64_t at = k; at < end; at += kColumns, to += kColumns / 2 * kTileColumns)
                if (rows >= kRows && end - at >= kColumns)
                    transpose(from + at, weight.columns, to, kTileColumns);
                else
                    transpose_some(from + at, weight.columns, rows < kRows ? rows : kRows,
                                   end - at < kColumns ? end - at : kColumns, to);
        }
    }
}

// Two rows at a time: even columns are separated from odd ones.
void unpack_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                  uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const int64_t columns = weight.columns;
    constexpr int64_t kAhead = 16;  // rows
    for (int64_t n = first; n < last; n += 2, out += kTileColumns) {
        const BFloat16* above = static_cast<const BFloat16*>(weight.dense) + n * columns + column;
        const BFloat16* below = above + columns;
        for (int tile = 0; tile < tiles; ++tile, above += kTileColumns, below += kTileColumns) {
            const int64_t left = columns - column - tile * kTileColumns;
            const __mmask32 there = left < kTileColumns ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
            _mm_prefetch(reinterpret_cast<const char*>(above + kAhead * columns), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(below + kAhead * columns), _MM_HINT_T0);
            const __m512i a = _mm512_maskz_loadu_epi16(there, above);
            const __m512i b = _mm512_maskz_loadu_epi16(n + 1 < last ? there : 0, below);
            _mm512_storeu_si512(out + tile * stride,
                                _mm512_mask_mov_epi16(a, 0xaaaaaaaa, _mm512_slli_epi32(b, 16)));
            _mm512_storeu_si512(out + tile * stride + 16,
                                _mm512_mask_mov_epi16(b, 0x55555555, _mm512_srli_epi32(a, 16)));
        }
    }
}

}  // namespace

void fill_avx512bf16(DenseReader& reader) {
    reader = {{.transposed = {.unpack = unpack_transposed, .even_odd = false, .region = region_transposed},
               .plain = {.unpack = unpack_plain, .even_odd = true, .region = region_plain}}};
}

}  // namespace gemm
}  // namespace peftcore

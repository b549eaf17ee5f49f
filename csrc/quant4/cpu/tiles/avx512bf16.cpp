#include "quant4/cpu/avx512bf16.h"

#include "gemm/cpu/region.h"
#include "gemm/cpu/transpose.h"
#include "quant4/cpu/tiles/tiles.h"

namespace peftcore {
namespace quant4 {
namespace {

using gemm::kTileColumns;

// Wᵀ: 32 rows of W, a cache line of each at a time, are decoded together and transposed.
constexpr int kLine = 64, kLineColumns = 2 * kLine;
struct Lines {
    alignas(64) uint16_t row[kTileColumns][kLineColumns];
};

void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const __m512 code = _mm512_loadu_ps(weight.quant_map);
    const int64_t rows = weight.rows, columns = weight.columns, step = values_of_scale(weight);
    Lines lines;
    for (int tile = 0; tile < tiles; ++tile, column += kTileColumns, out += stride)
        for (int64_t k = first; k < last; k += kLineColumns) {
            const int64_t count = last - k < kLineColumns ? last - k : kLineColumns;
            for (int r = 0; r < kTileColumns; ++r) {
                // Repeats the last row, for columns that are not stored.
                const int64_t row = column + r < rows ? column + r : rows - 1, begin = row * columns + k;
                const uint8_t* packed = weight.codes + begin / 2;
                // Lines of successive rows are too far apart for the processor's prefetcher.
                _mm_prefetch(reinterpret_cast<const char*>(packed + 2 * kLine), _MM_HINT_T0);
                for (int64_t i = 0; i < count; i += step) {
                    const __m512i table = scaled(code, weight, (begin + i) >> weight.shift);
                    for (int64_t j = i; j < i + step; j += 32)
                        _mm512_store_si512(lines.row[r] + j, decoded(packed + j / 2, table));
                }
            }
            for (int64_t i = 0; i < count; i += 8)
                for (int half = 0; half < 2; ++half)
                    gemm::transpose(lines.row[16 * half] + i, kLineColumns,
                                    out + (k - first + i) / 2 * kTileColumns + 16 * half, kTileColumns);
        }
}

// W: two rows at a time. One permutation of two tables looks up 16 values of each row and makes pairs of
// them; byte j of a row holds columns 2 j and 2 j + 1, so even and odd columns are separated.
void unpack_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                  uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const __m512 code = _mm512_loadu_ps(weight.quant_map);
    const __m512i nibble = _mm512_set1_epi32(0x000f000f), second_table = _mm512_set1_epi32(0x00200000);
    constexpr int64_t kAhead = 16;  // rows
    const int64_t step = values_of_scale(weight);
    for (int64_t n = first; n < last; n += 2, out += kTileColumns) {
        const int64_t begin = n * weight.columns + column, below = begin + weight.columns;
        const bool pair = n + 1 < last;
        const int64_t ahead = n + kAhead + 1 < weight.rows ? kAhead * weight.columns / 2 : 0;
        _mm_prefetch(reinterpret_cast<const char*>(weight.codes + begin / 2 + ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(weight.codes + (pair ? below : begin) / 2 + ahead),
                     _MM_HINT_T0);
        __m512i table = _mm512_setzero_si512(), table_below = table;
        for (int tile = 0; tile < tiles; ++tile) {
            const int64_t at = begin + tile * kTileColumns, at_below = below + tile * kTileColumns;
            if (tile == 0 || at % step == 0) {
                table = scaled(code, weight, at >> weight.shift);
                if (pair) table_below = scaled(code, weight, at_below >> weight.shift);
            }
            const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(weight.codes + at / 2));
            const __m512i bytes_below =
                pair ? _mm512_cvtepu8_epi32(sixteen(weight.codes + at_below / 2)) : _mm512_setzero_si512();
            const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes_below, 16));
            const __m512i even = _mm512_or_si512(_mm512_srli_epi16(both, 4), second_table);
            const __m512i odd = _mm512_or_si512(_mm512_and_si512(both, nibble), second_table);
            _mm512_storeu_si512(out + tile * stride, _mm512_permutex2var_epi16(table, even, table_below));
            _mm512_storeu_si512(out + tile * stride + 16, _mm512_permutex2var_epi16(table, odd, table_below));
        }
    }
}

}  // namespace

void fill_avx512bf16(gemm::PackedReader& reader) {
    reader = {
        {.transposed = {.unpack = unpack_transposed, .even_odd = false, .region = gemm::region_transposed},
         .plain = {.unpack = unpack_plain, .even_odd = true, .region = gemm::region_plain},
         .reads = has_tile_blocks}};
}

}  // namespace quant4
}  // namespace peftcore

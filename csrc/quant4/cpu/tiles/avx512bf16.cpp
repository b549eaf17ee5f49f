#include "quant4/cpu/avx512bf16.h"

#include <type_traits>

#include "gemm/cpu/region.h"
#include "gemm/cpu/transpose.h"
#include "quant4/cpu/tiles/small_blocks.h"
#include "quant4/cpu/tiles/tiles.h"

namespace peftcore {
namespace quant4 {
namespace {

using gemm::kTileColumns;

// The codebook's values by the byte of a block's scale, as `scaled` makes them.
struct ValueTable {
    explicit ValueTable(const float* key) {
        const ScaleTable& scales = made_of_code<ScaleTable>(key);
        std::memcpy(of, key, sizeof of);
        const __m512 code = _mm512_loadu_ps(key + sizeof(SmallKey) / sizeof(float) - 16);
        for (int i = 0; i < 256; ++i)
            _mm256_store_si256(
                reinterpret_cast<__m256i*>(values[i]),
                __m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(scales.scale[i])))));
    }

    alignas(64) uint16_t values[256][16];
    float of[sizeof(SmallKey) / sizeof(float)];
};

// Tables of two blocks of 16 in a row, chosen by the fifth bit of an index.
struct TwoBlocks {
    TwoBlocks(const WeightView& weight, int64_t first, int64_t last)
        : weight(weight),
          bytes(static_cast<const uint8_t*>(weight.absmax)),
          code(_mm512_loadu_ps(weight.quant_map)),
          table(has_small_blocks(weight) ? table_of<ValueTable>(weight, first, last) : nullptr) {}

    // Of the block of element `at` and the next one.
    __m512i operator[](int64_t at) const {
        const int64_t block = at >> 4;
        if (table == nullptr)
            return _mm512_inserti64x4(scaled(code, weight, block),
                                      _mm512_castsi512_si256(scaled(code, weight, block + 1)), 1);
        const auto of = [&](int64_t b) {
            return _mm256_load_si256(reinterpret_cast<const __m256i*>(table->values[bytes[b]]));
        };
        return _mm512_inserti64x4(_mm512_castsi256_si512(of(block)), of(block + 1), 1);
    }

    const WeightView& weight;
    const uint8_t* bytes;
    __m512 code;
    const ValueTable* table;
};

// 32 values in order, of two blocks.
inline __m512i decoded_two(const uint8_t* packed, __m512i tables) {
    const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(packed));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_and_si512(index, _mm512_set1_epi16(15)), second),
                                    tables);
}

// Wᵀ: 32 rows of W, a cache line of each at a time, are decoded together and transposed.
constexpr int kLine = 64, kLineColumns = 2 * kLine;
struct Lines {
    alignas(64) uint16_t row[kTileColumns][kLineColumns];
};

// decode(codes, element, count, out): values of a row from one on, which begins a line.
template <typename Decode>
inline void unpack_lines(const WeightView& weight, int64_t column, int tiles, int64_t first, int64_t last,
                         int64_t stride, uint32_t* out, Decode decode) {
    const int64_t rows = weight.rows, columns = weight.columns;
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
                decode(packed, begin, count, lines.row[r]);
            }
            for (int64_t i = 0; i < count; i += 8)
                for (int half = 0; half < 2; ++half)
                    gemm::transpose(lines.row[16 * half] + i, kLineColumns,
                                    out + (k - first + i) / 2 * kTileColumns + 16 * half, kTileColumns);
        }
}

void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const auto unpack = [&](const auto& decode) {
        unpack_lines(weight, column, tiles, first, last, stride, out, decode);
    };
    if (has_small_blocks(weight)) {
        const int64_t last_row = least(column + tiles * kTileColumns, weight.rows) - 1;
        const TwoBlocks two_blocks(weight, column * weight.columns + first,
                                   last_row * weight.columns + last - 1);
        return unpack([two_blocks](const uint8_t* packed, int64_t begin, int64_t count, uint16_t* to) {
            for (int64_t i = 0; i < count; i += 32)
                _mm512_store_si512(to + i, decoded_two(packed + i / 2, two_blocks[begin + i]));
        });
    }
    // A constant number of values for each scale, so that the loop within a line is unrolled.
    const auto unpack_blocks = [&](auto step) {
        constexpr int64_t kStep = decltype(step)::value;
        with_tables(weight, [&, shift = weight.shift](const auto& table_of_block) {
            unpack([&](const uint8_t* packed, int64_t begin, int64_t count, uint16_t* to) {
                for (int64_t i = 0; i < count; i += kStep, packed += kStep / 2, to += kStep) {
                    const __m512i table = table_of_block((begin + i) >> shift);
#pragma GCC unroll 2
                    for (int64_t j = 0; j < kStep; j += 32)
                        _mm512_store_si512(to + j, decoded(packed + j / 2, table));
                }
            });
        });
    };
    if (values_of_scale(weight) == kTileBlock)
        unpack_blocks(std::integral_constant<int64_t, kTileBlock>());
    else
        unpack_blocks(std::integral_constant<int64_t, kMinBlocksize>());
}

// W: two rows at a time. One permutation of two tables looks up 16 values of each row and makes pairs of
// them; byte j of a row holds columns 2 j and 2 j + 1, so even and odd columns are separated.
void unpack_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                  uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const __m512 code = _mm512_loadu_ps(weight.quant_map);
    const bool small = has_small_blocks(weight);
    const TwoBlocks two_blocks(
        weight, first * weight.columns + column,
        (last - 1) * weight.columns + least(column + tiles * kTileColumns, weight.columns) - 1);
    // In the fifth bit of an index: that it is of the second of two small blocks.
    const __m512i second_block =
        _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(small ? 16 : 0), 1);
    const __m512i nibble = _mm512_set1_epi32(0x000f000f),
                  second_table = _mm512_or_si512(_mm512_set1_epi32(0x00200000), second_block);
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
            if (small) {
                table = two_blocks[at];
                if (pair) table_below = two_blocks[at_below];
            } else if (tile == 0 || at % step == 0) {
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

// A packed weight unpacked into words of fp32.
#include "quant4/cpu/avx2.h"

#include "gemm/cpu/region.h"
#include "gemm/cpu/transpose8.h"
#include "quant4/cpu/linear/byte_scales.h"
#include "quant4/cpu/tiles/small_blocks.h"
#include "quant4/cpu/tiles/tiles.h"

namespace peftcore {
namespace quant4 {
namespace {

using gemm::kTileColumns;

constexpr int kRows = 8;  // of W, which become columns of B

float value_at(const WeightView& weight, int64_t i) {
    const int byte = weight.codes[i / 2];
    const int64_t block = i >> weight.shift;
    const float zero = weight.zeros == nullptr ? 0 : block_zero(weight, block);
    return (weight.quant_map[i % 2 == 0 ? byte >> 4 : byte & 15] - zero) * block_scale(weight, block);
}

// Scales by block: from a table where they are bytes of small blocks with one factor.
struct Scales {
    Scales(const WeightView& weight, int64_t first, int64_t last)
        : weight(weight),
          bytes(static_cast<const uint8_t*>(weight.absmax)),
          table(has_small_blocks(weight) ? table_of<ScaleTable>(weight, first, last) : nullptr) {}

    float operator[](int64_t block) const {
        return table != nullptr ? table->scale[bytes[block]] : block_scale(weight, block);
    }

    const WeightView& weight;
    const uint8_t* bytes;
    const ScaleTable* table;
};

// Columns that start within a byte, or blocks that end within a register.
bool any_shape(const WeightView& weight) { return weight.columns % values_of_scale(weight) != 0; }

// Columns k on of 8 rows, `count` bytes of each (at most 32), as vectors of one 32-bit word of all rows.
inline void load_words(const uint8_t* const (&packed)[kRows], int64_t k, int64_t count,
                       __m256 (&words)[kRows]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        alignas(32) uint8_t whole[32];
        const uint8_t* from = packed[r] + k / 2;
        if (count < 32) {
            memcpy(whole, from, size_t(count));
            from = whole;
        }
        words[r] = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    }
    gemm::transpose8(words);
}

// The scales' bytes of `count` columns from k on, at most kTileBlock, of 8 rows with blocks of 16: a word of each row.
inline __m256i scale_words(const ByteScales& bytes, const int64_t (&rows)[kRows], int64_t k, int64_t count) {
    int32_t words[kRows] = {};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        const uint8_t* from = bytes.of_row(rows[r]) + (k >> kSmallShift);
        if (count == kTileBlock) [[likely]]
            memcpy(&words[r], from, sizeof words[r]);
        else
            memcpy(&words[r], from, size_t(count >> kSmallShift));
    }
    return _mm256_setr_epi32(words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]);
}

// Of each word byte i, as ByteScales decodes it.
inline __m256 decoded_scales(__m256i words, int64_t i, float factor) {
    const __m256i byte =
        _mm256_and_si256(_mm256_srl_epi32(words, _mm_cvtsi32_si128(int(8 * i))), _mm256_set1_epi32(127));
    const __m256i halves = _mm256_slli_epi32(byte, ByteScales::kPlace);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    return _mm256_mul_ps(_mm256_cvtph_ps(packed), _mm256_set1_ps(factor));
}

// Wᵀ: a register has one column of W in 8 rows, each with its scale, so no value is transposed.
void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const __m256 low = _mm256_loadu_ps(weight.quant_map), high = _mm256_loadu_ps(weight.quant_map + 8);
    const int64_t step = values_of_scale(weight);
    const bool has_zeros = weight.zeros != nullptr;
    const int64_t last_row = least(column + tiles * kTileColumns, weight.rows) - 1;
    const Scales block_scales(weight, column * weight.columns + first, last_row * weight.columns + last - 1);
    const ByteScales bytes(weight);
    const std::optional<float> factor = bytes.factor(column, last_row + 1 - column);
    for (int64_t begin = 0; begin < tiles * kTileColumns; begin += kRows) {
        const int64_t row = column + begin;
        if (row >= weight.rows) return;
        float* to = reinterpret_cast<float*>(out) + begin / kTileColumns * stride + begin % kTileColumns;
        int64_t its_row[kRows];
        const uint8_t* packed[kRows];
        for (int r = 0; r < kRows; ++r) {  // repeats the last row, for columns that are not stored
            its_row[r] = least(row + r, weight.rows - 1);
            packed[r] = weight.codes + its_row[r] * weight.columns / 2;
        }
        if (any_shape(weight)) {
            for (int64_t k = first; k < last; ++k, to += kTileColumns)
                for (int r = 0; r < kRows; ++r) to[r] = value_at(weight, its_row[r] * weight.columns + k);
            continue;
        }
        for (int64_t k = first; k < last;) {
            const int64_t end = least(last, (k / kTileBlock + 1) * kTileBlock);
            __m256 words[kRows];
            load_words(packed, k, (end - k) / 2, words);
            const __m256i scale_bytes =
                factor ? scale_words(bytes, its_row, k, end - k) : _mm256_setzero_si256();
            for (int64_t begin = k, stop; begin < end; begin = stop) {
                stop = least(end, (begin / step + 1) * step);
                alignas(32) float scales[kRows], zeros[kRows] = {};
                for (int r = 0; !factor && r < kRows; ++r) {
                    const int64_t block = (its_row[r] * weight.columns + begin) >> weight.shift;
                    scales[r] = block_scales[block];
                    zeros[r] = has_zeros ? block_zero(weight, block) : 0;
                }
                const __m256 zero = _mm256_load_ps(zeros);
                const __m256 scale = factor ? decoded_scales(scale_bytes, (begin - k) >> kSmallShift, *factor)
                                            : _mm256_load_ps(scales);
                for (int64_t w = (begin - k) / 8; w < (stop - k) / 8; ++w, to += 8 * kTileColumns) {
                    const __m256i word = _mm256_castps_si256(words[w]);
#pragma GCC unroll 8
                    for (int i = 0; i < 8; ++i) {
                        const __m256i index = _mm256_srli_epi32(word, (i / 2) * 8 + (i % 2 == 0 ? 4 : 0));
                        const __m256 entry = looked_up(index, low, high);
                        _mm256_storeu_ps(
                            to + i * kTileColumns,
                            _mm256_mul_ps(has_zeros ? _mm256_sub_ps(entry, zero) : entry, scale));
                    }
                }
            }
            k = end;
        }
    }
}

void unpack_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last, int64_t stride,
                  uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    constexpr int64_t kAhead = 16;  // rows
    const bool small = has_small_blocks(weight);
    const __m256 low = _mm256_loadu_ps(weight.quant_map), high = _mm256_loadu_ps(weight.quant_map + 8);
    const int64_t last_column = least(column + tiles * kTileColumns, weight.columns) - 1;
    const Scales block_scales(weight, first * weight.columns + column,
                              (last - 1) * weight.columns + last_column);
    for (int64_t k = first; k < last; ++k, out += kTileColumns) {
        const int64_t begin = k * weight.columns + column;
        float* to = reinterpret_cast<float*>(out);
        if (any_shape(weight)) {
            const int64_t count = least(tiles * kTileColumns, weight.columns - column);
            for (int64_t j = 0; j < count; ++j)
                to[j / kTileColumns * stride + j % kTileColumns] = value_at(weight, begin + j);
            continue;
        }
        _mm_prefetch(reinterpret_cast<const char*>(weight.codes + (begin + kAhead * weight.columns) / 2),
                     _MM_HINT_T0);
        for (int i = 0; i < tiles && column + i * kTileColumns < weight.columns; ++i) {
            const int64_t at = begin + i * kTileColumns;
            if (small) {
                const int64_t count = least(kTileColumns, weight.columns - column - i * kTileColumns);
                for (int64_t j = 0; j < count; j += 16) {
                    const FloatTable table(low, high, block_scales[(at + j) >> weight.shift]);
                    _mm256_storeu_ps(to + i * stride + j, decoded8(weight.codes + (at + j) / 2, table));
                    _mm256_storeu_ps(to + i * stride + j + 8,
                                     decoded8(weight.codes + (at + j) / 2 + 4, table));
                }
                continue;
            }
            const FloatTable table(weight, at >> weight.shift);
#pragma GCC unroll 4
            for (int64_t j = 0; j < kTileColumns; j += 8)
                _mm256_storeu_ps(to + i * stride + j, decoded8(weight.codes + (at + j) / 2, table));
        }
    }
}

gemm::PackedReader reader() {
    return {
        {.transposed = {.unpack = unpack_transposed, .even_odd = false, .region = gemm::region_transposed},
         .plain = {.unpack = unpack_plain, .even_odd = false, .region = gemm::region_plain}}};
}

}  // namespace

void fill_avx2(gemm::ManyRows (&products)[kDtypes]) {
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kHalf, Dtype::kBFloat16})
        products[int(dtype)].packed = reader();
}

}  // namespace quant4
}  // namespace peftcore

// A packed weight unpacked into words of fp32.
#include "quant4/cpu/avx2.h"

#include "gemm/cpu/region.h"
#include "gemm/cpu/transpose8.h"
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

// Wᵀ: a register has one column of W in 8 rows, each with its scale, so no value is transposed.
void unpack_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last,
                       int64_t stride, uint32_t* out) {
    const WeightView& weight = *static_cast<const WeightView*>(source);
    const __m256 low = _mm256_loadu_ps(weight.quant_map), high = _mm256_loadu_ps(weight.quant_map + 8);
    const int64_t step = values_of_scale(weight);
    const bool has_zeros = weight.zeros != nullptr;
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
            for (int64_t begin = k, stop; begin < end; begin = stop) {
                stop = least(end, (begin / step + 1) * step);
                alignas(32) float scales[kRows], zeros[kRows];
                for (int r = 0; r < kRows; ++r) {
                    const int64_t block = (its_row[r] * weight.columns + begin) >> weight.shift;
                    scales[r] = block_scale(weight, block);
                    zeros[r] = has_zeros ? block_zero(weight, block) : 0;
                }
                const __m256 scale = _mm256_load_ps(scales), zero = _mm256_load_ps(zeros);
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
            const FloatTable table(weight, at >> weight.shift);
#pragma GCC unroll 4
            for (int64_t j = 0; j < kTileColumns; j += 8)
                _mm256_storeu_ps(to + i * stride + j, decoded8(weight.codes + (at + j) / 2, table));
        }
    }
}

gemm::PackedReader reader(bool (*reads)(const WeightView&)) {
    return {
        {.transposed = {.unpack = unpack_transposed, .even_odd = false, .region = gemm::region_transposed},
         .plain = {.unpack = unpack_plain, .even_odd = false, .region = gemm::region_plain},
         .reads = reads}};
}

}  // namespace

void fill_avx2(gemm::ManyRows (&products)[kDtypes]) {
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kHalf, Dtype::kBFloat16})
        products[int(dtype)].packed = reader(has_blocks);
}

}  // namespace quant4
}  // namespace peftcore

// The products of pairs by tiles of AMX; whatever else they need is AVX-512's.
#include "common/amx.h"

#include "gemm/cpu/transpose.h"
#include "lora/cpu/avx512bf16.h"

namespace peftcore {
namespace lora {
namespace {

// 16 rows of up to 16 words, what is missing zero.
struct alignas(64) TileMemory {
    uint32_t words[kSide][kSide];

    void fill(const uint32_t* from, int64_t stride, int64_t rows, int64_t count) {
        const __mmask16 there = count < kSide ? __mmask16((1u << count) - 1) : __mmask16(0xffff);
        for (int64_t i = 0; i < kSide; ++i)
            _mm512_store_si512(words[i], i < rows ? _mm512_maskz_loadu_epi32(there, from + i * stride)
                                                  : _mm512_setzero_si512());
    }
};

struct Tiled : Pairs {
    static constexpr bool kTiles = true;

    // 32 rows by 32 columns at a time; with kBoth all of them, otherwise 16 by 16.
    static void down(const uint32_t* left, int64_t left_row, const uint32_t* right, int64_t width,
                     int64_t rows, int64_t inner, float* sums) {
        _tile_loadconfig(&kTileShapes);
        for (int64_t n = 0; n < width; n += kSide)
            for (int64_t m = 0; m < rows; m += kSide) {
                down_tile(left + m * left_row, left_row, right + n, width, rows - m, inner,
                          sums + m * width + n);
            }
        _tile_release();
    }

    static void down_tile(const uint32_t* left, int64_t left_row, const uint32_t* right, int64_t width,
                          int64_t rows, int64_t inner, float* sums) {
        TileMemory some, last;
        _tile_zero(0);
        _tile_zero(1);
        int64_t i = 0;
        if (rows >= kSide)
            for (; i + 2 * kSide <= inner; i += 2 * kSide) {
                _tile_loadd(4, left + i, 4 * left_row);
                _tile_loadd(6, right + i * width, 4 * width);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, left + i + kSide, 4 * left_row);
                _tile_loadd(7, right + (i + kSide) * width, 4 * width);
                _tile_dpbf16ps(1, 5, 7);
            }
        for (; i < inner; i += kSide) {
            some.fill(left + i, left_row, rows, inner - i);
            last.fill(right + i * width, width, inner - i, kSide);
            memory_barrier_of_tiles();
            _tile_loadd(4, some.words, kTileBytes);
            _tile_loadd(6, last.words, kTileBytes);
            _tile_dpbf16ps(0, 4, 6);
        }
        alignas(64) float half[2][kSide][kSide];
        _tile_stored(0, half[0], kTileBytes);
        _tile_stored(1, half[1], kTileBytes);
        memory_barrier_of_tiles();
        for (int64_t m = 0; m < kSide && m < rows; ++m)
            _mm512_storeu_ps(sums + m * width,
                             _mm512_add_ps(_mm512_load_ps(half[0][m]), _mm512_load_ps(half[1][m])));
    }

    static void outer(const uint32_t* left, int64_t width, const uint32_t* right, int64_t columns,
                      int64_t inner, float* sums, int64_t sums_row) {
        constexpr int64_t kMost = 8;  // tiles of `inner` that are turned together
        alignas(64) uint32_t turned[kMost][kSide][kSide];
        TileMemory some;
        _tile_loadconfig(&kTileShapes);
        for (int64_t begin = 0; begin < inner; begin += kMost * kSide) {
            const int64_t end = std::min(inner, begin + kMost * kSide);
            for (int64_t j = 0; j < width; j += kSide) {
                for (int64_t i = begin; i < end; i += kSide) {
                    const uint32_t* from = left + i * width + j;
                    int64_t stride = width;
                    if (end - i < kSide) {
                        some.fill(from, width, end - i, kSide);
                        from = some.words[0];
                        stride = kSide;
                    }
                    for (int64_t q = 0; q < kSide; q += 4)
                        gemm::transpose(reinterpret_cast<const uint16_t*>(from + q), 2 * stride,
                                        turned[(i - begin) / kSide][q], kSide);
                }
                memory_barrier_of_tiles();
                float* to = sums + j * sums_row;
                int64_t k = 0;
                for (; k + 4 * kSide <= columns; k += 4 * kSide) {
                    _tile_loadd(0, to + k, 4 * sums_row);
                    _tile_loadd(1, to + k + kSide, 4 * sums_row);
                    _tile_loadd(2, to + k + 2 * kSide, 4 * sums_row);
                    _tile_loadd(3, to + k + 3 * kSide, 4 * sums_row);
                    for (int64_t i = begin; i < end; i += kSide) {
                        const uint32_t* b = right + i * columns + k;
                        _tile_loadd(4, turned[(i - begin) / kSide], kTileBytes);
                        _tile_loadd(6, b, 4 * columns);
                        _tile_loadd(7, b + kSide, 4 * columns);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(6, b + 2 * kSide, 4 * columns);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(7, b + 3 * kSide, 4 * columns);
                        _tile_dpbf16ps(2, 4, 6);
                        _tile_dpbf16ps(3, 4, 7);
                    }
                    _tile_stored(0, to + k, 4 * sums_row);
                    _tile_stored(1, to + k + kSide, 4 * sums_row);
                    _tile_stored(2, to + k + 2 * kSide, 4 * sums_row);
                    _tile_stored(3, to + k + 3 * kSide, 4 * sums_row);
                }
                for (; k < columns; k += kSide) {
                    _tile_loadd(0, to + k, 4 * sums_row);
                    for (int64_t i = begin; i < end; i += kSide) {
                        _tile_loadd(4, turned[(i - begin) / kSide], kTileBytes);
                        _tile_loadd(6, right + i * columns + k, 4 * columns);
                        _tile_dpbf16ps(0, 4, 6);
                    }
                    _tile_stored(0, to + k, 4 * sums_row);
                }
            }
        }
        memory_barrier_of_tiles();
        _tile_release();
    }
};

}  // namespace

Kernels amx_kernels() { return Blocks<Tiled>::kernels(); }

}  // namespace lora
}  // namespace peftcore

// Products of bf16 by AMX tiles, with factors in two halves (see kernels.h); `up` is that of AVX-512.
#include "common/amx.h"

#include "common/caches.h"
#include "common/integers.h"
#include "gemm/cpu/transpose.h"
#include "lora/cpu/split.h"

namespace peftcore {
namespace lora {
namespace {

constexpr int64_t kRows = 2 * kSide;  // that `down` takes together
static_assert(kBlockPairs % kSide == 0);

// 16 rows of up to 16 words, padded with zeros.
struct TileMemory {
    alignas(64) uint32_t words[kSide][kSide];

    void fill(const uint32_t* from, int64_t stride, int64_t rows) {
        for (int64_t i = 0; i < kSide; ++i)
            _mm512_store_si512(words[i], i < rows ? _mm512_loadu_si512(from + i * stride) : __m512i());
    }
    void fill(const BFloat16* from, int64_t stride, int64_t rows, int64_t count) {
        for (int64_t i = 0; i < kSide; ++i)
            _mm512_store_si512(words[i], i < rows ? load_kept(from + i * stride, count, nullptr) : __m512i());
    }
};

// sums[0] and [1], each [16][16]: x [rows <= 32, columns] times the 16 ranks at `right`, whose units are
// `width` apart.
void down_tiles(const BFloat16* x, int64_t x_row, int64_t rows, int64_t columns, const uint32_t* right,
                int64_t width, float (*sums)[kSide][kSide]) {
    TileMemory above, below, first, rest;
    // Sums of 0 to 15 and of 16 to 31, with first values and with remainders.
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int64_t k = 0;
    if (rows >= kRows)
        for (; k + kRows <= columns; k += kRows, right += kSide * width) {
            _tile_loadd(4, x + k, 2 * x_row);
            _tile_loadd(6, right, 4 * width);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, x + kSide * x_row + k, 2 * x_row);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(7, right + kSide, 4 * width);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    for (; k < columns; k += kRows, right += kSide * width) {
        const int64_t units = (columns - k + 1) / kPair;
        above.fill(x + k, x_row, rows, columns - k);
        below.fill(x + kSide * x_row + k, x_row, rows - kSide, columns - k);
        first.fill(right, width, units);
        rest.fill(right + kSide, width, units);
        memory_barrier_of_tiles();
        _tile_loadd(4, above.words, kRowBytes);
        _tile_loadd(5, below.words, kRowBytes);
        _tile_loadd(6, first.words, kRowBytes);
        _tile_loadd(7, rest.words, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float more[2][kSide][kSide];
    _tile_stored(0, sums[0], kRowBytes);
    _tile_stored(1, sums[1], kRowBytes);
    _tile_stored(2, more[0], kRowBytes);
    _tile_stored(3, more[1], kRowBytes);
    memory_barrier_of_tiles();
    for (int64_t m = 0; m < kRows; ++m) {
        float* sum = sums[m / kSide][m % kSide];
        _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_load_ps(more[m / kSide][m % kSide])));
    }
}

void down(const DownArgs& args, int64_t first, int64_t last) {
    alignas(64) float sums[2][kSide][kSide];
    const int64_t columns = args.columns, stride = filled_up(columns, 32), width = kHalves * args.width;
    std::vector<BFloat16> staged(args.keep.bits == nullptr ? 0 : size_t(kRows * stride));
    const __m512 factor = _mm512_set1_ps(args.factor);
    _tile_loadconfig(&kTileShapes);
    for (int64_t m = first; m < last; m += kRows) {
        const int64_t rows = std::min(kRows, last - m);
        const BFloat16* x = static_cast<const BFloat16*>(args.x) + m * columns;
        for (int64_t i = 0; args.keep.bits != nullptr && i < rows; ++i)
            for (int64_t k = 0; k < columns; k += 32)
                _mm512_storeu_si512(
                    &staged[size_t(i * stride + k)],
                    load_kept(x + i * columns + k, columns - k, args.keep.row(m + i) + k / 8));
        const bool in_place = args.keep.bits == nullptr;
        for (int64_t n = 0; n < args.r; n += kSide) {
            down_tiles(in_place ? x : staged.data(), in_place ? columns : stride, rows, columns,
                       static_cast<const uint32_t*>(args.right) + kHalves * n, width, sums);
            for (int64_t i = 0; i < rows; ++i)
                _mm512_mask_storeu_ps(args.s + (m + i) * args.r + n, first_of(args.r - n),
                                      _mm512_mul_ps(_mm512_load_ps(sums[i / kSide][i % kSide]), factor));
        }
    }
    _tile_release();
}

// sums [width][columns] += leftᵀ right, for `pairs` units of left and right [pairs][columns], padded with zeros to a
// multiple of 16.
void outer_block(const uint32_t* left, int64_t width, const uint32_t* right, int64_t columns, int64_t pairs,
                 float* sums, int64_t sums_row) {
    constexpr int64_t kSteps = kBlockPairs / kSide;
    alignas(64) uint32_t turned[kHalves * kSteps][kSide][kSide];  // a step's first values and remainders
    TileMemory padded;
    const int64_t steps = filled_up(pairs, kSide) / kSide;
    for (int64_t j = 0; j < width; j += kSide) {
        for (int64_t i = 0; i < kHalves * steps; ++i) {
            const uint32_t* from = left + kHalves * (i / kHalves * kSide * width + j) + i % kHalves * kSide;
            int64_t stride = kHalves * width;
            if (pairs - i / kHalves * kSide < kSide) {
                padded.fill(from, stride, pairs - i / kHalves * kSide);
                from = padded.words[0];
                stride = kSide;
            }
            for (int64_t q = 0; q < kSide; q += 4)
                gemm::transpose(reinterpret_cast<const uint16_t*>(from + q), 2 * stride, turned[i][q], kSide);
        }
        memory_barrier_of_tiles();
        float* to = sums + j * sums_row;
        int64_t k = 0;
        for (; k + 4 * kSide <= columns; k += 4 * kSide) {
            _tile_loadd(0, to + k, 4 * sums_row);
            _tile_loadd(1, to + k + kSide, 4 * sums_row);
            _tile_loadd(2, to + k + 2 * kSide, 4 * sums_row);
            _tile_loadd(3, to + k + 3 * kSide, 4 * sums_row);
            for (int64_t i = 0; i < kHalves * steps; ++i) {
                const uint32_t* b = right + i / kHalves * kSide * columns + k;
                _tile_loadd(4, turned[i], kRowBytes);
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
            for (int64_t i = 0; i < kHalves * steps; ++i) {
                _tile_loadd(4, turned[i], kRowBytes);
                _tile_loadd(6, right + i / kHalves * kSide * columns + k, 4 * columns);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, to + k, 4 * sums_row);
        }
    }
}

void outer(const OuterArgs& args, int64_t first, int64_t last) {
    alignas(64) uint32_t staged[kBlockPairs * kBlockColumns];
    _tile_loadconfig(&kTileShapes);
    for_each_block<BFloat16>(args, first, last, [&](const OuterBlock<BFloat16>& block) {
        const int64_t width = filled_up(block.columns, kSide), pairs = ceil_div(block.rows, kPair);
        const BFloat16* x = block.x;
        for (int64_t i = 0; i < block.rows; i += kPair, x += kPair * args.columns) {
            prefetch_ahead(block, i, args.columns);
            prefetch_ahead(block, i + 1, args.columns);
            const bool has_second = i + 1 < block.rows;
            stage_rows(x, has_second ? x + args.columns : nullptr, block.columns, block.keep.row(i),
                       has_second ? block.keep.row(i + 1) : nullptr, staged + i / kPair * width);
        }
        std::fill(staged + pairs * width, staged + filled_up(pairs, kSide) * width, 0u);
        outer_block(static_cast<const uint32_t*>(args.left) + block.row / kPair * kHalves * args.width,
                    args.width, staged, width, pairs, block.sums, block.sums_row);
    });
    memory_barrier_of_tiles();
    _tile_release();
}

}  // namespace

void fill_amx(Kernels& kernels) {
    ThinKernels& thin = kernels.thin[int(Dtype::kBFloat16)];
    thin.arrangement = {.pair = kPair, .unit_size = int(kHalves * sizeof(uint32_t)), .arrange = arrange};
    thin.down = down;
    thin.outer = outer;
}

}  // namespace lora
}  // namespace peftcore

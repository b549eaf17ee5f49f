// 12 rows of x by 32 columns of B in registers, a pair of inner numbers at a time: 24 of 32 registers hold
// sums.
//
// Measured on one core of Zen 4: 230 to 236 GFLOP/s with all operands in the L2 cache, of 237 that the dot
// products allow; 220 with 1020 rows by 4096 x 4096 from 4 bits, where the library reaches 205 to 218 with
// a dense weight. No better: chunks of 384 or 512 pairs, panels of 8 tiles.
#include "gemm/cpu/avx512.h"
#include "gemm/cpu/panels.h"
#include "gemm/cpu/transpose.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int64_t kBlockRows = 12;  // of x that a register tile multiplies
constexpr int64_t kPanelTiles = 4, kPanelColumns = kPanelTiles * kTileColumns;

struct OutputTile {
    const Product& product;
    int64_t row, column;
    float* sums;  // of this row and column, kPanelColumns a row
    bool first, last;
    Ahead* ahead;
};

template <int R>
inline void multiply_tile(const OutputTile& out, const uint32_t* x, const uint32_t* right, int64_t pairs) {
    __m512 sum[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
            sum[r][v] =
                out.first ? _mm512_setzero_ps() : _mm512_loadu_ps(out.sums + r * kPanelColumns + 16 * v);
    Ahead ahead = out.ahead != nullptr ? *out.ahead : Ahead({});
    for (int64_t p = 0; p < pairs; ++p, x += R, right += kTileColumns) {
        ahead.next();
        const __m512bh first = __m512bh(_mm512_loadu_si512(right)),
                       second = __m512bh(_mm512_loadu_si512(right + 16));
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = __m512bh(_mm512_set1_epi32(int(x[r])));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], first, pair);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], second, pair);
        }
    }
    if (out.ahead != nullptr) *out.ahead = ahead;
    if (!out.last) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) _mm512_storeu_ps(out.sums + r * kPanelColumns + 16 * v, sum[r][v]);
        return;
    }
    const Bias bias = bias_of(out.product, out.column);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) store_row(out.product, out.row + r, out.column, bias, sum[r][0], sum[r][1]);
}

using Tile = void (*)(const OutputTile&, const uint32_t*, const uint32_t*, int64_t);
constexpr Tile kTileOf[kBlockRows + 1] = {
    nullptr,           multiply_tile<1>,  multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,
    multiply_tile<5>,  multiply_tile<6>,  multiply_tile<7>, multiply_tile<8>, multiply_tile<9>,
    multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

struct DotProducts {
    static constexpr int64_t kRows = kBlockRows, kTiles = kPanelTiles, kMultiple = 1, kWords = 1024,
                             kWordValues = 2;
    static constexpr bool kTakesAddend = false;

    static int64_t chunk(int64_t, int64_t fit) { return fit; }
    static bool in_place(const Product&) { return false; }

    // out[pair][row].
    static void arrange_block(const Product& product, int64_t first_row, int64_t rows, int64_t first_pair,
                              int64_t pairs, uint32_t* out) {
        const BFloat16* x = bf16_row(product, first_row);
        const __mmask16 its_rows = __mmask16((1u << rows) - 1);
        const int64_t last = least(2 * (first_pair + pairs), product.inner);
        for (int64_t k = 2 * first_pair; k < last; k += 32, out += 16 * rows) {
            const __mmask32 there = last - k < 32 ? (__mmask32(1) << (last - k)) - 1 : ~__mmask32(0);
            __m512i block[16];
#pragma GCC unroll 16
            for (int64_t m = 0; m < 16; ++m)
                block[m] = m < rows ? _mm512_maskz_loadu_epi16(there, x + m * product.inner + k)
                                    : _mm512_setzero_si512();
            transpose_words(block);
            const int64_t count = least(16, (last - k + 1) / 2);
            if (rows == kRows && count == 16) {
                // What is written behind a pair's rows is overwritten by the next pair.
#pragma GCC unroll 16
                for (int64_t p = 0; p < 15; ++p) _mm512_storeu_si512(out + p * kRows, block[p]);
                _mm512_mask_storeu_epi32(out + 15 * kRows, its_rows, block[15]);
            } else {
#pragma GCC unroll 16
                for (int64_t p = 0; p < 16; ++p)
                    if (p < count) _mm512_mask_storeu_epi32(out + p * rows, its_rows, block[p]);
            }
        }
    }

    const Product& product;
    const uint32_t* x;

    DotProducts(const Product& its_product, const Arranged& arranged) : product(its_product), x(arranged.x) {}

    void multiply(const Panel& panel, const Block& block) {
        const uint32_t* rows = x + panel.chunk * product.rows + block.row * panel.words;
        for (int64_t i = 0; i < panel.tiles; ++i)
            kTileOf[block.rows]({.product = product,
                                 .row = block.row,
                                 .column = (panel.tile + i) * kTileColumns,
                                 .sums = block.sums + i * kTileColumns,
                                 .first = panel.first,
                                 .last = panel.last,
                                 .ahead = block.ahead},
                                rows, panel.right + i * panel.words * kTileColumns, panel.words);
    }

    void finish() {}
};

}  // namespace

void fill_avx512bf16(Kernel& kernel) { kernel = kernel_of<DotProducts>(); }

}  // namespace gemm
}  // namespace peftcore

// 12 rows of x by 32 columns of B in registers, a pair of inner numbers at a time: 24 of 32 registers hold
// sums. A block of x's rows is multiplied by all tiles of a panel, during which the next block is prefetched into L1.
//
// Measured on one core of Zen 4: 230 to 236 GFLOP/s with all operands in the L2 cache, of 237 that the dot
// products allow; 220 with 1020 rows by 4096 x 4096 from 4 bits, where the library reaches 205 to 218 with
// a dense weight. On Zen 5, among other work, dense: 440 to 480 where the library reaches 430 to 475 with Wᵀ and 400 to
// 425 with W; without the prefetch 345 to 390 from 2048 inner numbers on. No better: chunks of 256, 384 or 768 pairs,
// panels of 8 tiles.
#include "gemm/cpu/avx512.h"
#include "gemm/cpu/panels.h"
#include "gemm/cpu/transpose.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int64_t kBlockRows = 12;  // of x that a register tile multiplies
constexpr int64_t kPanelTiles = 4, kPanelColumns = kPanelTiles * kTileColumns;
constexpr int64_t kAheadWords = kBlockRows / kPanelTiles;  // of the next block, during each tile of a panel

struct OutputTile {
    const Product& product;
    int64_t row, column;
    float* sums;  // of this row and column, kPanelColumns a row
    bool first, last;
    Ahead* ahead;
};

// Rows of x and words of a tile of B's columns, or of the addend's factors.
struct Factors {
    const uint32_t *x, *right;
    int64_t pairs;
    const uint32_t* next;  // to be prefetched, kAheadWords with each pair
};

template <int R>
using Sums = __m512[R][2];

template <int R>
inline void accumulate(const Factors& factors, Ahead* next_panel, Sums<R>& sum) {
    const uint32_t *x = factors.x, *right = factors.right, *next = factors.next;
    Ahead ahead = next_panel != nullptr ? *next_panel : Ahead({});
    for (int64_t p = 0; p < factors.pairs; ++p, x += R, right += kTileColumns) {
        ahead.next();
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
        next += kAheadWords;
        const __m512bh first = __m512bh(_mm512_loadu_si512(right)),
                       second = __m512bh(_mm512_loadu_si512(right + 16));
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const __m512bh pair = __m512bh(_mm512_set1_epi32(int(x[r])));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], first, pair);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], second, pair);
        }
    }
    if (next_panel != nullptr) *next_panel = ahead;
}

template <int R>
inline void accumulate_addend(const Factors& addend, bool halves, Sums<R>& sum) {
    if (!halves) return accumulate<R>(addend, nullptr, sum);
    const int64_t pairs = addend.pairs / 2;
    const uint32_t *x = addend.x, *x_rest = x + pairs * R;
    const uint32_t *right = addend.right, *right_rest = right + pairs * kTileColumns;
    accumulate<R>({x, right, pairs, x}, nullptr, sum);
    accumulate<R>({x_rest, right, pairs, x}, nullptr, sum);
    accumulate<R>({x, right_rest, pairs, x}, nullptr, sum);
}

template <int R>
inline void load(const float* from, Sums<R>& sum) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
            sum[r][v] =
                from != nullptr ? _mm512_loadu_ps(from + r * kPanelColumns + 16 * v) : _mm512_setzero_ps();
}

template <int R>
inline void store(const Sums<R>& sum, float* to) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) _mm512_storeu_ps(to + r * kPanelColumns + 16 * v, sum[r][v]);
}

// Adds the addend where it is kept to the sums at `from`.
template <int R>
inline void add_masked(const OutputTile& out, const Factors& addend, const float* from, Sums<R>& sum) {
    load<R>(nullptr, sum);
    accumulate_addend<R>(addend, out.product.addend.halves, sum);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        const TileBits bits =
            bits_of(out.product.right.even_odd, out.product.addend.keep.row(out.row + r) + out.column / 8);
        const __m512 first = _mm512_loadu_ps(from + r * kPanelColumns),
                     second = _mm512_loadu_ps(from + r * kPanelColumns + 16);
        sum[r][0] = _mm512_mask_add_ps(first, bits.first, first, sum[r][0]);
        sum[r][1] = _mm512_mask_add_ps(second, bits.second, second, sum[r][1]);
    }
}

template <int R>
void multiply_tile(const OutputTile& out, const Factors& factors, const Factors& addend) {
    Sums<R> sum;
    const bool masked = out.product.addend.keep.bits != nullptr;
    load<R>(out.first ? nullptr : out.sums, sum);
    accumulate<R>(factors, out.ahead, sum);
    if (!out.last) return store<R>(sum, out.sums);
    // After the whole product, wherever its chunks end, so that results do not depend on cache sizes.
    if (addend.pairs != 0 && masked) {
        store<R>(sum, out.sums);
        add_masked<R>(out, addend, out.sums, sum);
    } else if (addend.pairs != 0) {
        accumulate_addend<R>(addend, out.product.addend.halves, sum);
    }
    const Bias bias = bias_of(out.product, out.column);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) store_row(out.product, out.row + r, out.column, bias, sum[r][0], sum[r][1]);
}

using Tile = void (*)(const OutputTile&, const Factors&, const Factors&);
constexpr Tile kTileOf[kBlockRows + 1] = {
    nullptr,           multiply_tile<1>,  multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,
    multiply_tile<5>,  multiply_tile<6>,  multiply_tile<7>, multiply_tile<8>, multiply_tile<9>,
    multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

struct DotProducts {
    static constexpr int64_t kRows = kBlockRows, kTiles = kPanelTiles, kMultiple = 1, kWords = 512,
                             kWordValues = 2;
    static constexpr bool kTakesAddend = true;

    // Of about equal size: a short last one would load and store sums for few products.
    static int64_t chunk(int64_t words, int64_t fit) {
        return filled_up(ceil_div(words, ceil_div(words, fit)), kChunkMultiple);
    }
    static int64_t rows_in_place(const Product&) { return 0; }

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
    const Arranged arranged;
    alignas(
        64) float block_sums[kRows * kPanelColumns];  // a block's sums, where the product has a single chunk

    DotProducts(const Product& product_arg, const Arranged& arranged_arg)
        : product(product_arg), arranged(arranged_arg) {}

    void multiply(const Panel& panel, const Block& block) {
        const uint32_t *x = arranged.x + panel.chunk * product.rows + block.row * panel.words,
                       *left = arranged.addend_left + block.row * panel.addend_words;
        const uint32_t* next = x + block.rows * panel.words;
        float* sums = panel.first && panel.last ? block_sums : block.sums;
        for (int64_t i = 0; i < panel.tiles; ++i)
            kTileOf[block.rows](
                {.product = product,
                 .row = block.row,
                 .column = (panel.tile + i) * kTileColumns,
                 .sums = sums + i * kTileColumns,
                 .first = panel.first,
                 .last = panel.last,
                 .ahead = block.ahead},
                {x, panel.right + i * panel.words * kTileColumns, panel.words,
                 next + i * panel.words * kAheadWords},
                {left, panel.addend_right + i * panel.addend_words * kTileColumns, panel.addend_words, left});
    }

    void finish() {}
};

}  // namespace

void fill_avx512bf16(Kernel& kernel) {
    kernel = kernel_of<DotProducts>();
    kernel.by_rows = true;
}

}  // namespace gemm
}  // namespace peftcore

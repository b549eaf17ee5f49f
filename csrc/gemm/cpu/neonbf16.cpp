// 12 rows of x by 8 columns of B in registers, four inner numbers at a time: an instruction (bfmmla) adds the products
// of 2 rows and 2 columns, and 24 of 32 registers hold such sums.
//
// A step of four inner numbers is 24 products, 10 loads, and 4 instructions that turn pairs of B's columns into fours.
#include <cstring>

#include "common/neon.h"
#include "gemm/cpu/panels.h"

namespace peftcore {
namespace gemm {
namespace {

constexpr int64_t kBlockRows = 12;  // of x that a register tile multiplies
constexpr int64_t kColumns = 8, kColumnPairs = kColumns / 2;
constexpr int64_t kPanelTiles = 4, kPanelColumns = kPanelTiles * kTileColumns;

struct OutputTile {
    const Product& product;
    int64_t row, rows, column;
    float* sums;  // 4 kColumnPairs of the first two rows, kTwoRows to those of the next two
    bool first, last;
    Ahead* ahead;
};
constexpr int64_t kTwoRows = 2 * kPanelColumns;

inline bfloat16x8_t as_bf16(uint32x4_t words) { return vreinterpretq_bf16_u32(words); }

// Bias of the output tile's columns from `from` on, which has no more than the product's.
inline uint16x8_t bias_of(const OutputTile& out) {
    uint16_t whole[kColumns] = {};
    if (out.product.bias != nullptr)
        std::memcpy(whole, bf16_bias(out.product) + out.column,
                    size_t(least(kColumns, out.product.columns - out.column)) * sizeof *whole);
    return vld1q_u16(whole);
}

// One row of an output tile.
inline void store_row(const OutputTile& out, int64_t row, float32x4_t low, float32x4_t high) {
    BFloat16* to = bf16_result(out.product, out.row + row) + out.column;
    const int64_t count = out.product.columns - out.column;
    const uint16x8_t values = vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
    if (count >= kColumns) return vst1q_u16(bits_of(to), values);
    uint16_t whole[kColumns];
    vst1q_u16(whole, values);
    std::memcpy(to, whole, size_t(count) * sizeof *whole);
}

inline float32x4_t first_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u64(vzip1q_u64(vreinterpretq_u64_f32(a), vreinterpretq_u64_f32(b)));
}
inline float32x4_t second_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u64(vzip2q_u64(vreinterpretq_u64_f32(a), vreinterpretq_u64_f32(b)));
}

// P pairs of rows. sum[i][j]: rows 2 i and 2 i + 1 by columns 2 j and 2 j + 1.
template <int P>
inline void multiply_tile(const OutputTile& out, const uint32_t* x, const uint32_t* right, int64_t pairs) {
    float32x4_t sum[P][kColumnPairs];
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kColumnPairs; ++j)
            sum[i][j] = out.first ? vdupq_n_f32(0) : vld1q_f32(out.sums + i * kTwoRows + 4 * j);
    Ahead ahead = out.ahead != nullptr ? *out.ahead : Ahead({});
    for (int64_t p = 0; p < pairs; p += 2, x += 4 * P, right += 2 * kTileColumns) {
        ahead.next();
        bfloat16x8_t b[kColumnPairs];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const uint32x4_t row0 = vld1q_u32(right + 4 * half),
                             row1 = vld1q_u32(right + kTileColumns + 4 * half);
            b[2 * half] = as_bf16(vzip1q_u32(row0, row1));
            b[2 * half + 1] = as_bf16(vzip2q_u32(row0, row1));
        }
#pragma GCC unroll 6
        for (int i = 0; i < P; ++i) {
            const bfloat16x8_t a = as_bf16(vld1q_u32(x + 4 * i));
#pragma GCC unroll 4
            for (int j = 0; j < kColumnPairs; ++j) sum[i][j] = vbfmmlaq_f32(sum[i][j], a, b[j]);
        }
    }
    if (out.ahead != nullptr) *out.ahead = ahead;
    if (!out.last) {
#pragma GCC unroll 6
        for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < kColumnPairs; ++j) vst1q_f32(out.sums + i * kTwoRows + 4 * j, sum[i][j]);
        return;
    }
    const uint16x8_t bias = bias_of(out);
    const float32x4_t low = from_bfloat16(vget_low_u16(bias)), high = from_bfloat16(vget_high_u16(bias));
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) {
        const float32x4_t* s = sum[i];
        store_row(out, 2 * i, vaddq_f32(first_halves(s[0], s[1]), low),
                  vaddq_f32(first_halves(s[2], s[3]), high));
        if (2 * i + 1 < out.rows)
            store_row(out, 2 * i + 1, vaddq_f32(second_halves(s[0], s[1]), low),
                      vaddq_f32(second_halves(s[2], s[3]), high));
    }
}

using Tile = void (*)(const OutputTile&, const uint32_t*, const uint32_t*, int64_t);
constexpr Tile kTileOf[kBlockRows / 2 + 1] = {nullptr,          multiply_tile<1>, multiply_tile<2>,
                                              multiply_tile<3>, multiply_tile<4>, multiply_tile<5>,
                                              multiply_tile<6>};

struct MatrixProducts {
    static constexpr int64_t kRows = kBlockRows, kTiles = kPanelTiles, kMultiple = 2, kWords = 1024,
                             kWordValues = 2;
    static constexpr bool kTakesAddend = false;

    static int64_t chunk(int64_t, int64_t fit) { return fit; }
    static int64_t rows_in_place(const Product&) { return 0; }

    // out[two pairs][two rows][row][pair], with zeros behind the last row and the last inner number.
    static void arrange_block(const Product& product, int64_t first_row, int64_t rows, int64_t first_pair,
                              int64_t pairs, uint32_t* out) {
        const int64_t first = 2 * first_pair, last = first + 2 * pairs;
        for (int64_t m = 0; m < filled_up(rows, 2); ++m) {
            const BFloat16* from = bf16_row(product, first_row + m);
            const int64_t end = m < rows ? least(last, product.inner) : 0;
            uint32_t* to = out + m / 2 * 4 + m % 2 * 2;
            for (int64_t k = first; k < last; k += 4, to += 2 * filled_up(rows, 2)) {
                uint16_t four[4] = {};
                if (k < end) std::memcpy(four, from + k, size_t(least(4, end - k)) * sizeof *four);
                std::memcpy(to, four, sizeof four);
            }
        }
    }

    const Product& product;
    const uint32_t* x;

    MatrixProducts(const Product& product_arg, const Arranged& arranged)
        : product(product_arg), x(arranged.x) {}

    void multiply(const Panel& panel, const Block& block) {
        const uint32_t* rows = x + panel.chunk * filled_up(product.rows, kMultiple) + block.row * panel.words;
        for (int64_t i = 0; i < panel.tiles * kTileColumns; i += kColumns) {
            const int64_t column = panel.tile * kTileColumns + i;
            if (column >= product.columns) return;
            kTileOf[(block.rows + 1) / 2](
                {.product = product,
                 .row = block.row,
                 .rows = block.rows,
                 .column = column,
                 .sums = block.sums + 2 * i,
                 .first = panel.first,
                 .last = panel.last,
                 .ahead = block.ahead},
                rows, panel.right + i / kTileColumns * panel.words * kTileColumns + i % kTileColumns,
                panel.words);
        }
    }

    void finish() {}
};

}  // namespace

void fill_neonbf16(Kernel& kernel) { kernel = kernel_of<MatrixProducts>(); }

}  // namespace gemm
}  // namespace peftcore

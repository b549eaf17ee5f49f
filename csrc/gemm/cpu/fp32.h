// Products with x and B in fp32, or widened to it, for dtypes that the processor has no dot products for. The loops are
// shared by every level with fused multiply-adds.
//
// A long sum of fp32 values is a sum of short ones, of kChain products each, to reduce the rounding error. For 16 bits
// one sum is exact enough.
//
// Lanes::kRows rows of x by two vectors of B's columns are in registers, an inner number at a time.
#pragma once

#include <concepts>
#include <cstring>

#include "gemm/cpu/panels.h"
#include "gemm/cpu/transpose8.h"

namespace peftcore {
namespace gemm {
namespace {

template <typename Lanes>
concept WideLanes = requires(typename Lanes::Floats floats, const float* from, float* to, const void* values,
                             void* out, uint32_t bits) {
    { Lanes::kRows } -> std::convertible_to<int64_t>;   // of x that are multiplied together
    { Lanes::kLanes } -> std::convertible_to<int64_t>;  // of a vector
    { Lanes::zero() } -> std::same_as<typename Lanes::Floats>;
    { Lanes::load(from) } -> std::same_as<typename Lanes::Floats>;
    { Lanes::all(from) } -> std::same_as<typename Lanes::Floats>;  // one value in every lane
    Lanes::store(to, floats);
    { Lanes::add(floats, floats) } -> std::same_as<typename Lanes::Floats>;
    { Lanes::fma(floats, floats, floats) } -> std::same_as<typename Lanes::Floats>;  // a b + c
    { Lanes::keep(floats, bits) } -> std::same_as<typename Lanes::Floats>;  // zero where a lane's bit is 0
    Lanes::round(floats, Dtype::kHalf, out);  // each value rounded to 16 bits, to nearest, ties to even
};

template <WideLanes Lanes>
struct WideProducts {
    static constexpr int64_t kRows = Lanes::kRows, kTiles = 4, kMultiple = 1, kWordValues = 1;
    static constexpr int64_t kWords =
        kRows > 8 ? 896 : 1024;  // 12 arranged rows are not a multiple of kWay apart
    static constexpr bool kTakesAddend = true;
    static constexpr int64_t kChain = 128;
    static constexpr int64_t kColumns = 2 * Lanes::kLanes;  // of B that are multiplied together
    static constexpr int64_t kPanelColumns = kTiles * kTileColumns;
    static_assert(kTileColumns % kColumns == 0);

    using Floats = typename Lanes::Floats;

    // Chunks of about equal size: a short last one would load and store sums for few products. Chains end with them.
    static int64_t chunk(int64_t words, int64_t fit) {
        return filled_up(ceil_div(words, ceil_div(words, fit)), kChain);
    }
    // Rows of x that begin a multiple of kWay bytes apart share a set of the L1 cache, which has a way for so many bytes.
    static constexpr int64_t kWay = 4096;
    static int64_t rows_in_place(const Product& product) {
        const bool fit = product.inner * int64_t(sizeof(float)) % kWay != 0 || kRows * kWay <= caches().first;
        return product.dtype == Dtype::kFloat && fit ? product.rows : 0;
    }

    // out[row][word].
    static void arrange_block(const Product& product, int64_t first_row, int64_t rows, int64_t first,
                              int64_t words, uint32_t* out) {
        const char* x = static_cast<const char*>(product.x);
        float* to = reinterpret_cast<float*>(out);
        for (int64_t m = 0; m < rows; ++m, to += words)
            widen_row(x + (first_row + m) * product.inner * itemsize(product.dtype), product.dtype, first,
                      words, to);
    }

    const Product& product;
    const Arranged arranged;

    WideProducts(const Product& product_arg, const Arranged& arranged_arg)
        : product(product_arg), arranged(arranged_arg) {}

    // The tiles of a block prefetch the next block's x, some rows each. All of x is read once for each panel; where it
    // comes from the L3 cache and nothing was prefetched, products take 1.1 of the time (AVX2) to 1.2 (AVX-512), for
    // 512 x 3072 -> 1024 on Zen 5.
    static constexpr int64_t kNextRows = (kRows * kColumns + kPanelColumns - 1) / kPanelColumns;
    static constexpr int64_t kLineWords = 64 / sizeof(float);

    struct OutputTile {
        int64_t row, column;
        float* sums;  // of this row and column, kPanelColumns a row
        bool first, last;
        const float* next;  // rows of the next block's x that it prefetches
        Ahead* ahead;
    };
    // Factors of the sums: rows of x, or of the addend's left factor, and a tile of B's words.
    struct Factors {
        const float* x;
        int64_t row;  // values from a row of x to the next
        const float* right;
        int64_t words;
    };

    template <int R>
    using Sums = Floats[R][2];

    template <int R>
    [[gnu::always_inline]]
    static inline void accumulate(const Factors& factors, const float* next, Ahead* next_panel,
                                  Sums<R>& sum) {
        const float *x = factors.x, *right = factors.right;
        const int64_t row = factors.row;
        const auto add_word = [&] {
            const Floats b0 = Lanes::load(right), b1 = Lanes::load(right + Lanes::kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Floats value = Lanes::all(x + r * row);
                sum[r][0] = Lanes::fma(value, b0, sum[r][0]);
                sum[r][1] = Lanes::fma(value, b1, sum[r][1]);
            }
            ++x;
            right += kTileColumns;
        };
        int64_t p = 0;
        const auto add_lines = [&](auto&& prefetch) {
            for (; p + kLineWords <= factors.words; p += kLineWords, next += kLineWords) {
#pragma GCC unroll 4
                for (int r = 0; r < kNextRows; ++r) __builtin_prefetch(next + r * row, 0, 2);
                for (int64_t i = 0; i < kLineWords; i += 4) {
                    prefetch();
                    add_word();
                    add_word();
                    add_word();
                    add_word();
                }
            }
        };
        if (next_panel != nullptr) {
            Ahead ahead = *next_panel;
            add_lines([&] { ahead.next(); });
            *next_panel = ahead;
        } else {
            add_lines([] {});
        }
        for (; p < factors.words; ++p) add_word();
    }

    template <int R>
    static void multiply_tile(const Product& product, const OutputTile& out, const Factors& factors,
                              const Factors& addend) {
        Sums<R> sum;
        const auto at = [&](int r, int v) { return out.sums + r * kPanelColumns + v * Lanes::kLanes; };
        // A lambda that is not inlined would keep the sums in memory: three times as slow.
        const auto store = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) Lanes::store(at(r, v), sum[r][v]);
        };
        const bool chained = product.dtype == Dtype::kFloat;
        const Mask& keep = product.addend.keep;
        const bool masked = addend.words != 0 && keep.bits != nullptr;
        const int64_t chain = chained ? kChain : factors.words + addend.words;
        // The addend's first words belong to the last chain of the product, so that they are rounded with smaller sums than
        // those of the whole product. Chains are the same wherever chunks end, so results do not depend on cache sizes.
        const int64_t joined = masked ? 0 : least(chain, addend.words);
        const auto add_stored = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) sum[r][v] = Lanes::add(Lanes::load(at(r, v)), sum[r][v]);
        };
        bool first = out.first;
        if (!first)
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) __builtin_prefetch(at(r, 0));
        const float* next = out.next;
        for (Factors part = factors;;) {
            const int64_t left = part.words;
            if (chained) part.words = least(kChain, left);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v)
                    sum[r][v] = first || chained ? Lanes::zero() : Lanes::load(at(r, v));
            accumulate<R>(part, next, out.ahead, sum);
            if (part.words == left) break;
            if (chained && !first) add_stored();
            store();
            first = false;
            next += kChain;
            part = {part.x + part.words, part.row, part.right + part.words * kTileColumns, left - part.words};
        }
        if (joined != 0) accumulate<R>({addend.x, addend.row, addend.right, joined}, next, nullptr, sum);
        if (chained && !first) add_stored();
        for (int64_t p = joined, words; p < addend.words; p += words) {
            words = least(chain, addend.words - p);
            store();
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Lanes::zero();
            accumulate<R>({addend.x + p, addend.row, addend.right + p * kTileColumns, words}, next, nullptr,
                          sum);
            if (masked) {
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    uint32_t bits;
                    std::memcpy(&bits, keep.row(out.row + r) + out.column / 32 * 4, sizeof bits);
                    bits >>= out.column % 32;
#pragma GCC unroll 2
                    for (int v = 0; v < 2; ++v)
                        sum[r][v] = Lanes::keep(sum[r][v], bits >> (v * Lanes::kLanes));
                }
            }
            add_stored();
        }
        if (!out.last) {
            store();
            return;
        }
        store_rows<R>(product, out, sum);
    }

    template <int R>
    static void store_rows(const Product& product, const OutputTile& out, const Sums<R>& sum) {
        const int64_t count = least(kColumns, product.columns - out.column);
        float bias[kColumns] = {};
        if (product.bias != nullptr) widen_row(product.bias, product.dtype, out.column, count, bias);
        const Floats first = Lanes::load(bias), second = Lanes::load(bias + Lanes::kLanes);
        if (product.dtype == Dtype::kFloat) {
            float* y = static_cast<float*>(product.y) + out.row * product.columns + out.column;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r, y += product.columns) {
                float padded[kColumns], *to = count == kColumns ? y : padded;
                Lanes::store(to, Lanes::add(sum[r][0], first));
                Lanes::store(to + Lanes::kLanes, Lanes::add(sum[r][1], second));
                if (count != kColumns) std::memcpy(y, padded, size_t(count) * sizeof *padded);
            }
            return;
        }
        uint16_t* y = static_cast<uint16_t*>(product.y) + out.row * product.columns + out.column;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, y += product.columns) {
            uint16_t padded[kColumns], *to = count == kColumns ? y : padded;
            Lanes::round(Lanes::add(sum[r][0], first), product.dtype, to);
            Lanes::round(Lanes::add(sum[r][1], second), product.dtype, to + Lanes::kLanes);
            if (count != kColumns) std::memcpy(y, padded, size_t(count) * sizeof *padded);
        }
    }

    using Tile = void (*)(const Product&, const OutputTile&, const Factors&, const Factors&);
    template <int... R>
    static Tile tile_of(int64_t rows, std::integer_sequence<int, R...>) {
        static constexpr Tile kTileOf[] = {multiply_tile<R + 1>...};
        return kTileOf[rows - 1];
    }

    void multiply(const Panel& panel, const Block& block) {
        // Holds a block's sums of a masked addend, or between chains, where the product has a single chunk.
        const bool in_place = rows_in_place(product) != 0;
        const int64_t row = in_place ? product.inner : panel.words;
        const float* x = in_place ? static_cast<const float*>(product.x) + panel.chunk
                                  : reinterpret_cast<const float*>(arranged.x) + panel.chunk * product.rows;
        x += block.row * row;
        const float *left = static_cast<const float*>(product.addend.left) + block.row * panel.addend_words,
                    *right = reinterpret_cast<const float*>(panel.right),
                    *addend_right = reinterpret_cast<const float*>(panel.addend_right);
        const Tile tile = tile_of(block.rows, std::make_integer_sequence<int, int(kRows)>());
        const float* next = x + (block.next - block.row) * row;
        float* sums = panel.first && panel.last ? block_sums : block.sums;
        for (int64_t i = 0; i < panel.tiles * kTileColumns; i += kColumns, next += kNextRows * row) {
            const int64_t column = panel.tile * kTileColumns + i, at = i % kTileColumns;
            if (column >= product.columns) return;
            tile(product,
                 {.row = block.row,
                  .column = column,
                  .sums = sums + i,
                  .first = panel.first,
                  .last = panel.last,
                  .next = next,
                  .ahead = block.ahead},
                 {x, row, right + i / kTileColumns * panel.words * kTileColumns + at, panel.words},
                 {left, panel.addend_words,
                  addend_right + i / kTileColumns * panel.addend_words * kTileColumns + at,
                  panel.last ? panel.addend_words : 0});
        }
    }

    void finish() {}

 private:
    alignas(64) float block_sums[kRows * kPanelColumns];
};

}  // namespace
}  // namespace gemm
}  // namespace peftcore

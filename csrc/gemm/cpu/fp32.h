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
    { Lanes::kept(floats, bits) } -> std::same_as<typename Lanes::Floats>;  // zero where a lane's bit is 0
    Lanes::round(floats, Dtype::kHalf, out);  // each value rounded to 16 bits, to nearest, ties to even
};

template <WideLanes Lanes>
struct WideProducts {
    static constexpr int64_t kRows = Lanes::kRows, kTiles = 4, kMultiple = 1, kWords = 1024, kWordValues = 1;
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
    static bool in_place(const Product&) { return false; }

    // out[word][row].
    static void arrange_block(const Product& product, int64_t first_row, int64_t rows, int64_t first,
                              int64_t words, uint32_t* out) {
        const int64_t last = least(first + words, product.inner);
        const int64_t row_bytes = product.inner * itemsize(product.dtype);
        const char* x = static_cast<const char*>(product.x) + first_row * row_bytes;
        float* to = reinterpret_cast<float*>(out);
        for (int64_t k = first; k < last; k += 8, to += 8 * rows) {
            const int64_t count = least(8, last - k);
            for (int64_t row = 0; row < rows; row += 8) {
                const int64_t there = least(8, rows - row);
                __m256 block[8];
                for (int64_t m = 0; m < 8; ++m)
                    block[m] = m < there ? widen_some(x + (row + m) * row_bytes, product.dtype, k, count)
                                         : _mm256_setzero_ps();
                transpose8(block);
                for (int64_t p = 0; p < count; ++p) store_some(to + p * rows + row, block[p], there);
            }
        }
    }

    const Product& product;
    const Arranged arranged;

    WideProducts(const Product& its_product, const Arranged& its_arranged)
        : product(its_product), arranged(its_arranged) {}

    // The tiles of a block prefetch the next block's x, each an equal part. All of x is read once for each panel; where it
    // comes from the L3 cache and nothing was prefetched, products take 1.1 of the time (AVX2) to 1.2 (AVX-512), for
    // 512 x 3072 -> 1024 on Zen 5.
    static constexpr int64_t kStep = 4;  // words
    static constexpr int64_t kStepBytes = kRows * kStep * int64_t(sizeof(float)) * kColumns / kPanelColumns;

    struct OutputTile {
        int64_t row, column;
        float* sums;  // of this row and column, kPanelColumns a row
        bool first, last;
        const char* next;  // its part of the next block's x
        Ahead* ahead;
    };
    // Factors of the sums: arranged rows of x, or of the addend, and a tile of B's words.
    struct Factors {
        const float *x, *right;
        int64_t words;
    };

    template <int R>
    using Sums = Floats[R][2];

    template <int R>
    [[gnu::always_inline]]
    static inline void accumulate(const Factors& factors, const char* next, Ahead* next_panel, Sums<R>& sum) {
        const float *x = factors.x, *right = factors.right;
        const auto add_word = [&] {
            const Floats one = Lanes::load(right), other = Lanes::load(right + Lanes::kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Floats value = Lanes::all(x + r);
                sum[r][0] = Lanes::fma(value, one, sum[r][0]);
                sum[r][1] = Lanes::fma(value, other, sum[r][1]);
            }
            x += R;
            right += kTileColumns;
        };
        Ahead ahead = next_panel != nullptr ? *next_panel : Ahead({});
        int64_t p = 0;
        for (; p + kStep <= factors.words; p += kStep, next += kStepBytes) {
            __builtin_prefetch(next, 0, 2);
            ahead.next();
            add_word();
            add_word();
            add_word();
            add_word();
        }
        for (; p < factors.words; ++p) add_word();
        if (next_panel != nullptr) *next_panel = ahead;
    }

    template <int R>
    static void multiply_tile(const Product& product, const OutputTile& out, const Factors& factors,
                              const Factors& addend) {
        Sums<R> sum;
        const auto at = [&](int r, int v) { return out.sums + r * kPanelColumns + v * Lanes::kLanes; };
        const auto store = [&] {
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) Lanes::store(at(r, v), sum[r][v]);
        };
        const bool chained = product.dtype == Dtype::kFloat;
        bool first = out.first;
        if (!first)
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) __builtin_prefetch(at(r, 0));
        const char* next = out.next;
        for (Factors part = factors;;) {
            const int64_t left = part.words;
            if (chained) part.words = least(kChain, left);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v)
                    sum[r][v] = first || chained ? Lanes::zero() : Lanes::load(at(r, v));
            accumulate<R>(part, next, out.ahead, sum);
            if (chained && !first) {
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                    for (int v = 0; v < 2; ++v) sum[r][v] = Lanes::add(Lanes::load(at(r, v)), sum[r][v]);
            }
            if (part.words == left) break;
            store();
            first = false;
            next += kChain / kStep * kStepBytes;
            part = {part.x + part.words * R, part.right + part.words * kTileColumns, left - part.words};
        }
        const Mask& keep = product.addend.keep;
        const bool masked = addend.words != 0 && keep.bits != nullptr;
        // Added after the whole product, wherever its chunks end, so that results do not depend on cache sizes.
        if (addend.words != 0 && !masked) accumulate<R>(addend, next, nullptr, sum);
        if (!out.last || masked) store();
        if (!out.last) return;
        if (masked) {
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Lanes::zero();
            accumulate<R>(addend, next, nullptr, sum);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                uint32_t bits;
                std::memcpy(&bits, keep.row(out.row + r) + out.column / 32 * 4, sizeof bits);
                bits >>= out.column % 32;
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v)
                    sum[r][v] = Lanes::add(Lanes::load(at(r, v)),
                                           Lanes::kept(sum[r][v], bits >> (v * Lanes::kLanes)));
            }
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
                float some[kColumns], *to = count == kColumns ? y : some;
                Lanes::store(to, Lanes::add(sum[r][0], first));
                Lanes::store(to + Lanes::kLanes, Lanes::add(sum[r][1], second));
                if (count != kColumns) std::memcpy(y, some, size_t(count) * sizeof *some);
            }
            return;
        }
        uint16_t* y = static_cast<uint16_t*>(product.y) + out.row * product.columns + out.column;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, y += product.columns) {
            uint16_t some[kColumns], *to = count == kColumns ? y : some;
            Lanes::round(Lanes::add(sum[r][0], first), product.dtype, to);
            Lanes::round(Lanes::add(sum[r][1], second), product.dtype, to + Lanes::kLanes);
            if (count != kColumns) std::memcpy(y, some, size_t(count) * sizeof *some);
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
        const float *x = reinterpret_cast<const float*>(arranged.x) + panel.chunk * product.rows +
                         block.row * panel.words,
                    *left =
                        reinterpret_cast<const float*>(arranged.addend_left) + block.row * panel.addend_words,
                    *right = reinterpret_cast<const float*>(panel.right),
                    *addend_right = reinterpret_cast<const float*>(panel.addend_right);
        const Tile tile = tile_of(block.rows, std::make_integer_sequence<int, int(kRows)>());
        const char* next = reinterpret_cast<const char*>(x + (block.next - block.row) * panel.words);
        float* sums = panel.first && panel.last ? here : block.sums;
        for (int64_t i = 0; i < panel.tiles * kTileColumns; i += kColumns) {
            const int64_t column = panel.tile * kTileColumns + i, at = i % kTileColumns;
            if (column >= product.columns) return;
            tile(product,
                 {.row = block.row,
                  .column = column,
                  .sums = sums + i,
                  .first = panel.first,
                  .last = panel.last,
                  .next = next + i / kColumns * (panel.words / kStep * kStepBytes),
                  .ahead = block.ahead},
                 {x, right + i / kTileColumns * panel.words * kTileColumns + at, panel.words},
                 {left, addend_right + i / kTileColumns * panel.addend_words * kTileColumns + at,
                  panel.last ? panel.addend_words : 0});
        }
    }

    void finish() {}

 private:
    alignas(64) float here[kRows * kPanelColumns];
};

}  // namespace
}  // namespace gemm
}  // namespace peftcore

// The "rows" way (see kernels.h), with loops shared by all SIMD levels.
#pragma once

#include <concepts>
#include <vector>

#include "quant4/cpu/linear/byte_scales.h"
#include "quant4/cpu/linear/kernels.h"

namespace peftcore {
namespace quant4 {

template <typename Level>
concept RowLanes = requires(typename Level::Vector vector, typename Level::Words words, const float* floats,
                            const uint8_t* bytes, const typename Level::Table& table, int64_t within, int n) {
    { Level::kLanes } -> std::convertible_to<int>;  // words of a chunk
    { Level::kRows } -> std::convertible_to<int>;   // of W, read together
    { Level::zero() } -> std::same_as<typename Level::Vector>;
    { Level::load(floats) } -> std::same_as<typename Level::Vector>;
    { Level::fma(vector, vector, vector) } -> std::same_as<typename Level::Vector>;  // a b + c
    { Level::load_words(bytes, n) } -> std::same_as<typename Level::Words>;  // the first n, then zeros
    // The 16 entries by which it is made, looked up by 4 bits of each word from bit n on.
    requires std::constructible_from<typename Level::Table, const float*>;
    { table(words, n) } -> std::same_as<typename Level::Vector>;
    // For each lane's word, with its first value at index i = within + 8 lane: scales[i >> n].
    { Level::scales(floats, within, n) } -> std::same_as<typename Level::Vector>;
    { Level::sum(vector) } -> std::same_as<float>;
};

// Rows of x up to which this way is faster than slabs.
struct Limits {
    int64_t fp32, fp16, bf16;
};

template <RowLanes Level>
struct LinearRows {
    static constexpr int kChunk = Level::kLanes * 8;  // values
    static constexpr int kMaxTile = 4;                // rows of x that share a lookup
    // Prefetch distance in bytes: some rows of W, as the processor's prefetcher stops at the end of a row. A row of x
    // by 1536 x 2048 from memory on one core of Zen 4: 0.17 ms, and 0.29 without.
    static constexpr int64_t kAhead = 4096;
    using Vector = typename Level::Vector;

    static int64_t chunks(int64_t columns) { return ceil_div(columns, kChunk); }

    static int64_t arranged_bytes(int64_t batch, int64_t columns) {
        return batch * chunks(columns) * kChunk * int64_t(sizeof(float));
    }

    // [batch][chunk][j][lane]: value j ^ 1 of the lane's word, as the even value is the high nibble.
    template <typename T>
    static void arrange_as(const T* x, int64_t batch, int64_t columns, float* out) {
        for (int64_t m = 0; m < batch; ++m, x += columns)
            for (int64_t begin = 0; begin < columns; begin += kChunk, out += kChunk)
                for (int lane = 0; lane < Level::kLanes; ++lane)
                    for (int j = 0; j < 8; ++j) {
                        const int64_t k = begin + lane * 8 + (j ^ 1);
                        out[j * Level::kLanes + lane] = k < columns ? to_float(x[k]) : 0.0f;
                    }
    }

    static bool arrange(const void* x, Dtype dtype, int64_t batch, int64_t columns, void* out) {
        float* to = static_cast<float*>(out);
        switch (dtype) {
            case Dtype::kFloat:
                arrange_as(static_cast<const float*>(x), batch, columns, to);
                break;
            case Dtype::kHalf:
                arrange_as(static_cast<const Half*>(x), batch, columns, to);
                break;
            case Dtype::kBFloat16:
                arrange_as(static_cast<const BFloat16*>(x), batch, columns, to);
                break;
        }
        return true;
    }

    // Rows [n, n + kRows) of W by rows [m, m + kTile) of x. `scales[r]` begins with the block of row n + r's
    // first value.
    template <int kRows, int kTile>
    static void multiply(const LinearCall& args, const typename Level::Table& table,
                         const float* const* scales, int64_t n, int64_t m) {
        const WeightView& weight = args.weight;
        const int64_t columns = weight.columns, count = chunks(columns),
                      mask = (int64_t(1) << weight.shift) - 1;
        const float* x = static_cast<const float*>(args.x) + m * count * kChunk;
        Vector sums[kRows][kTile];
        for (auto& row : sums)
            for (Vector& sum : row) sum = Level::zero();
        for (int64_t c = 0; c < count; ++c) {
            const int64_t k = c * kChunk;
            const int words = columns - k < kChunk ? int(columns - k) / 8 : Level::kLanes;
            const uint8_t* ahead = weight.codes + n * columns / 2 + c * kRows * kChunk / 2 + kAhead;
            typename Level::Words word[kRows];
            for (int r = 0; r < kRows; ++r) {
                __builtin_prefetch(ahead + r * kChunk / 2);
                word[r] = Level::load_words(weight.codes + ((n + r) * columns + k) / 2, words);
            }
            Vector part[kRows][kTile];
            for (auto& row : part)
                for (Vector& sum : row) sum = Level::zero();
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j)
#pragma GCC unroll 2
                for (int r = 0; r < kRows; ++r) {
                    const Vector w = table(word[r], 4 * j);
#pragma GCC unroll 4
                    for (int i = 0; i < kTile; ++i)
                        part[r][i] = Level::fma(
                            w, Level::load(x + (i * count + c) * kChunk + j * Level::kLanes), part[r][i]);
                }
            for (int r = 0; r < kRows; ++r) {
                const int64_t first = (n + r) * columns, at = first + k;
                const float* from = scales[r] + ((at >> weight.shift) - (first >> weight.shift));
                const Vector scale = Level::scales(from, at & mask, weight.shift);
                for (int i = 0; i < kTile; ++i) sums[r][i] = Level::fma(scale, part[r][i], sums[r][i]);
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kTile; ++i) store_result(args, m + i, n + r, Level::sum(sums[r][i]));
    }

    template <int kRows>
    static void multiply_all(const LinearCall& args, const typename Level::Table& table,
                             const float* const* scales, int64_t n) {
        int64_t m = 0;
        for (; m + kMaxTile <= args.batch; m += kMaxTile)
            multiply<kRows, kMaxTile>(args, table, scales, n, m);
        switch (args.batch - m) {
            case 3:
                return multiply<kRows, 3>(args, table, scales, n, m);
            case 2:
                return multiply<kRows, 2>(args, table, scales, n, m);
            case 1:
                return multiply<kRows, 1>(args, table, scales, n, m);
        }
    }

    static void run(const LinearCall& args, int64_t first, int64_t last) {
        const WeightView& weight = args.weight;
        const typename Level::Table table(weight.quant_map);
        const int64_t columns = weight.columns, capacity = (columns >> weight.shift) + 2 + 16;
        std::vector<float> memory(size_t(capacity * Level::kRows));
        const float* scales[Level::kRows];
        constexpr int64_t kStrip = 16;  // rows whose scales are checked together
        const ByteScales bytes(weight);
        std::optional<float> factor;
        for (int64_t n = first, checked = first; n < last;) {
            const int rows = last - n < Level::kRows ? 1 : Level::kRows;
            if (n == checked) {
                checked = least(n + kStrip, last);
                factor = bytes.factor(n, checked - n);
            }
            for (int r = 0; r < rows; ++r) {
                float* to = memory.data() + r * capacity;
                if (factor) {
                    bytes.prefetch(n + r + kStrip);  // `factor` would wait for them
                    bytes.decode(n + r, *factor, to);
                } else {
                    copy_scales(weight, (n + r) * columns, (n + r + 1) * columns, to);
                }
                scales[r] = to;
            }
            if (rows == 1)
                multiply_all<1>(args, table, scales, n);
            else
                multiply_all<Level::kRows>(args, table, scales, n);
            n += rows;
        }
    }

    static LinearKernel kernel(Limits limits) {
        return {.max_batch = {limits.fp32, limits.fp16, limits.bf16},
                .column_multiple = 8,
                .min_shift = 4,
                .arranged_bytes = arranged_bytes,
                .arrange = arrange,
                .run = run};
    }
};

}  // namespace quant4
}  // namespace peftcore

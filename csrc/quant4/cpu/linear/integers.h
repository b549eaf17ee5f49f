// The "integers" way (see kernels.h), with loops shared by all SIMD levels: codebook and x in 16-bit integers.
//
// A block's largest value of x is 32,767, the codebook's largest entry 8,191, so that the 8 products that a lane adds
// up stay below 2^31: sums within a block are exact, and are multiplied in fp32 by both scales. Two shuffles of bytes
// look up twice as many values as one of floats, and a 16-bit product has twice as many lanes: with one row of x and W
// in L2, on one core of Cascade Lake, the loop takes half of the "rows" way's time with AVX2, two thirds with AVX-512;
// with W in memory and AVX-512, the same time.
//
// The rounding loses less than 2^-14 of the codebook's largest entry, and 2^-16 of the largest value in each block of
// x. A row of x that would lose more than kLoss of its other values' norm is left to another way, as is a row with
// non-finite values.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstring>
#include <type_traits>
#include <vector>

#include "quant4/cpu/linear/integer_scales.h"
#include "quant4/cpu/linear/kernels.h"

namespace peftcore {
namespace quant4 {

template <typename Level>
concept IntegerLanes =
    requires(typename Level::Words words, typename Level::Floats floats, const uint8_t* bytes,
             const float* of, const int16_t* integers, int16_t* out, const typename Level::Table& table) {
        { Level::kRows } -> std::convertible_to<int>;  // of W, read at once, with few rows of x two
        { Level::kTile } -> std::convertible_to<int>;  // rows of x that share a lookup
        { Level::load_words(bytes) } -> std::same_as<typename Level::Words>;
        // The 16 entries by which it is made, looked up by the low and by the high nibbles of the bytes of words: of
        // each 128 bits the first 8 low ones, the last 8 low ones, the first 8 high ones, the last 8 high ones. Or
        // value i of a chunk at place(i), where a level has that.
        requires std::constructible_from<typename Level::Table, const int16_t*>;
        { table(words) } -> std::same_as<typename Level::Values>;
        // Products of these and of as many from there on, added up in 32-bit lanes.
        { Level::dot(table(words), integers) } -> std::same_as<typename Level::Floats>;
        { Level::zero() } -> std::same_as<typename Level::Floats>;
        { Level::load(of) } -> std::same_as<typename Level::Floats>;
        // One for each block, in its lanes; for each half of a block, of 32 values.
        { Level::scales(of) } -> std::same_as<typename Level::Floats>;
        { Level::half_scales(of) } -> std::same_as<typename Level::Floats>;
        { Level::mul(floats, floats) } -> std::same_as<typename Level::Floats>;
        { Level::fma(floats, floats, floats) } -> std::same_as<typename Level::Floats>;  // a b + c
        { Level::sum(floats) } -> std::same_as<float>;
        { Level::all(0.0f) } -> std::same_as<typename Level::Floats>;
        { Level::larger(floats, floats) } -> std::same_as<typename Level::Floats>;  // max(a, |b|)
        { Level::largest(floats) } -> std::same_as<float>;
        // To whole numbers, which are also stored in `out`.
        { Level::rounded(floats, out) } -> std::same_as<typename Level::Floats>;
    };

template <IntegerLanes Level>
struct LinearIntegers {
    static constexpr int kBlock = kIntegerBlock;  // values of x that share a scale; W's may have two or four
    static constexpr int kBytes = sizeof(typename Level::Words);  // of W
    static constexpr int kChunk = 2 * kBytes, kBlocks = kChunk / kBlock;
    static constexpr int kLanes = kChunk / 8;  // 32-bit ones
    static constexpr int64_t kGroup = 32;      // rows of x that are multiplied by a row of W together
    static constexpr float kEntry = 8191, kUpperEntry = 6144, kInput = 32767, kLoss = 0x1p-12f;
    // The reciprocal of a block's largest value is finite from this value on.
    static constexpr float kSmallest = 1e-30f;
    // Prefetch distance in bytes, in memory order. From memory on Zen 4, 4 rows of x take 0.62 ms, with half of the
    // distance 0.72 (AVX-512, 4096 x 4096); with AVX2 a row takes 0.32 ms, with twice the distance 0.34.
    static constexpr int64_t kAhead = 128 * kBytes;

    // A chunk of a row of x. `values` in the order in which `table` gives those of W.
    struct alignas(64) Inputs {
        int16_t values[kChunk];
        float scales[kLanes];
    };

    // Where the values of a chunk's blocks belong among `Inputs::values`.
    struct Places {
        int16_t of[kBlocks][kBlock];
    };
    static constexpr Places kPlaces = [] {
        constexpr int kPart = 16, kHalf = 8;  // bytes of W that are shuffled together, and unpacked together
        Places places{};
        for (int value = 0; value < kChunk; ++value) {
            const int byte = value / 2, high = 1 - value % 2, vector = 2 * high + byte % kPart / kHalf;
            int place = vector * kBytes / 2 + byte / kPart * kHalf + byte % kHalf;
            if constexpr (requires { Level::place(value); }) place = Level::place(value);
            places.of[value / kBlock][value % kBlock] = int16_t(place);
        }
        return places;
    }();

    static int64_t chunks(int64_t columns) { return ceil_div(columns, kChunk); }

    static int64_t arranged_bytes(int64_t batch, int64_t columns) {
        return batch * chunks(columns) * int64_t(sizeof(Inputs));
    }

    struct Loss {
        float squares = 0, others = 0;  // of the rounding errors; of all values but each block's largest
    };

    // One block. False if it is not finite, or too small to have a reciprocal.
    static bool round_block(const float* x, int16_t* out, float& scale, Loss& loss) {
        auto largest = Level::zero(), squares = Level::zero(), lost = Level::zero();
        for (int i = 0; i < kBlock; i += kLanes) {
            const auto v = Level::load(x + i);
            largest = Level::larger(largest, v);
            squares = Level::fma(v, v, squares);
        }
        const float most = Level::largest(largest), sum = Level::sum(squares);  // only the sum shows a NaN
        if (!std::isfinite(sum) || (most < kSmallest && most != 0)) return false;
        scale = most / kInput;
        const auto inverse = Level::all(most == 0 ? 0 : kInput / most), less = Level::all(-scale);
        for (int i = 0; i < kBlock; i += kLanes) {
            const auto v = Level::load(x + i);
            const auto off = Level::fma(Level::rounded(Level::mul(v, inverse), out + i), less, v);
            lost = Level::fma(off, off, lost);
        }
        loss.squares += Level::sum(lost);
        loss.others += std::max(sum - most * most, 0.0f);
        return true;
    }

    // A block. fp16 is widened by an instruction where a level has one: by arithmetic it takes half of the whole time.
    template <typename T>
    static void widen(const T* from, float* to) {
        if constexpr (requires { Level::widen(from, to); })
            for (int i = 0; i < kBlock; i += kLanes) Level::widen(from + i, to + i);
        else
            for (int i = 0; i < kBlock; ++i) to[i] = to_float(from[i]);
    }

    template <typename T>
    static bool arrange_row(const T* x, int64_t columns, Inputs* out) {
        Loss loss;
        for (int64_t k = 0; k < columns; k += kChunk, ++out)
            for (int block = 0; block < kBlocks; ++block) {
                const int64_t at = k + block * kBlock;
                alignas(64) float floats[kBlock] = {};
                float scale;
                int16_t values[kBlock];
                if (at < columns) widen(x + at, floats);
                if (!round_block(floats, values, scale, loss)) return false;
                for (int i = 0; i < kBlock; ++i) out->values[kPlaces.of[block][i]] = values[i];
                for (int i = 0; i < kLanes / kBlocks; ++i) out->scales[block * kLanes / kBlocks + i] = scale;
            }
        return loss.squares <= kLoss * kLoss * loss.others;
    }

    template <typename T>
    static bool arrange_as(const T* x, int64_t batch, int64_t columns, Inputs* out) {
        for (int64_t m = 0; m < batch; ++m, x += columns, out += chunks(columns))
            if (!arrange_row(x, columns, out)) return false;
        return true;
    }

    static bool arrange(const void* x, Dtype dtype, int64_t batch, int64_t columns, void* out) {
        Inputs* to = static_cast<Inputs*>(out);
        if (dtype == Dtype::kHalf) return arrange_as(static_cast<const Half*>(x), batch, columns, to);
        return arrange_as(static_cast<const BFloat16*>(x), batch, columns, to);
    }

    // The entries as integers, scaled so that the largest one becomes the value up to kEntry that loses least of the
    // squares; or kUpperEntry, if all become multiples of 256. E2M1's do, and half as many bytes are then looked up.
    struct Codebook {
        explicit Codebook(const float* code) {
            std::memcpy(of, code, sizeof of);
            float most = 0, least = 0;
            for (int i = 0; i < 16; ++i) most = std::max(most, std::fabs(code[i]));
            if (most == 0) return;
            inverse = most / kUpperEntry;
            upper = true;
            for (int i = 0; i < 16; ++i) {
                const float entry = code[i] / most * kUpperEntry;
                entries[i] = int16_t(std::nearbyint(entry));
                upper &= entries[i] == entry && entries[i] % 256 == 0;
            }
            if (upper) return;
            for (float largest = kEntry; largest > kEntry / 2; --largest) {
                float squares = 0;
                for (int i = 0; i < 16; ++i) {
                    const float exact = code[i] / most, rounded = std::nearbyint(exact * largest);
                    squares += (rounded / largest - exact) * (rounded / largest - exact);
                }
                if (largest < kEntry && !(squares < least)) continue;
                least = squares;
                inverse = most / largest;
                for (int i = 0; i < 16; ++i) entries[i] = int16_t(std::nearbyint(code[i] / most * largest));
            }
        }

        float of[16];
        int16_t entries[16] = {};
        float inverse = 0;
        bool upper = false;
    };

    // Whether the level takes blocks of 16. Their scales may be floats, or bytes that are decoded as ByteScales says.
    static constexpr int kSmallParts = kBlock >> kSmallShift;
    static constexpr bool kTakesSmall = requires(const uint8_t* bytes) {
        { Level::quarter_scales(bytes) } -> std::same_as<typename Level::Floats>;
    };

    template <int kParts, typename Scale>
    static typename Level::Floats scales_at(const Scale* of_chunk) {
        if constexpr (kParts == 1)
            return Level::scales(of_chunk);
        else if constexpr (kParts == 2)
            return Level::half_scales(of_chunk);
        else
            return Level::quarter_scales(of_chunk);
    }

    // Rows [n, n + kRows) of W by rows [m, m + kTile) of x. `scales[r]`: kParts for each kBlock values of row n + r.
    // Not inlined: with others in one function two rows of x take up to 1.9 times as long.
    template <int kRows, int kTile, int kParts, typename Table, typename Scale>
    [[gnu::noinline]]
    static void multiply(const LinearCall& args, const Table& table, float inverse,
                         const Scale* const* scales, int64_t n, int64_t m) {
        const WeightView& weight = args.weight;
        const int64_t columns = weight.columns, count = chunks(columns);
        const Inputs* x = static_cast<const Inputs*>(args.x) + m * count;
        typename Level::Floats sums[kRows][kTile];
        for (auto& row : sums)
            for (auto& sum : row) sum = Level::zero();
        for (int64_t c = 0; c < count; ++c) {
            const uint8_t* ahead = weight.codes + n * columns / 2 + c * kRows * kBytes + kAhead;
            const bool half = columns - c * kChunk < kChunk;
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                __builtin_prefetch(ahead + r * kBytes);
                const uint8_t* from = weight.codes + (n + r) * columns / 2 + c * kBytes;
                alignas(64) uint8_t padded[kBytes];
                if (half) [[unlikely]] {
                    std::memcpy(padded, from, kBlock / 2);
                    from = padded;
                }
                const auto w = table(Level::load_words(from));
                const auto scale = scales_at<kParts>(scales[r] + c * kBlocks * kParts);
#pragma GCC unroll 4
                for (int i = 0; i < kTile; ++i) {
                    const Inputs& inputs = x[i * count + c];
                    const auto products =
                        Level::mul(Level::dot(w, inputs.values), Level::load(inputs.scales));
                    sums[r][i] = Level::fma(products, scale, sums[r][i]);
                }
                // Without it the compiler loads x once for several rows of W, and has no registers for the sums; it has
                // them with one row of x, which then takes 0.96 of the time (AVX2, Zen 5).
                if constexpr (kTile > 1 && requires { Table::kFewRegisters; }) asm volatile("" ::: "memory");
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < kTile; ++i)
                store_result(args, m + i, n + r, Level::sum(sums[r][i]) * inverse);
    }

    template <int kRows, int kParts, typename Table, typename Scale>
    static void multiply_all(const LinearCall& args, const Table& table, float inverse,
                             const Scale* const* scales, int64_t n, int64_t m, int64_t end) {
        for (; m + Level::kTile <= end; m += Level::kTile)
            multiply<kRows, Level::kTile, kParts>(args, table, inverse, scales, n, m);
        for (; m + 2 <= end; m += 2) multiply<kRows, 2, kParts>(args, table, inverse, scales, n, m);
        if (m < end) multiply<kRows, 1, kParts>(args, table, inverse, scales, n, m);
    }

    // Rows [n, last) of W. scales_of_row(row, r): those of a row, which is the r-th of kRows.
    template <int kRows, int kParts, typename Table, typename ScalesOfRow>
    static void multiply_rows(const LinearCall& args, const Table& table, float inverse,
                              const ScalesOfRow& scales_of_row, int64_t n, int64_t last, int64_t m,
                              int64_t end) {
        decltype(scales_of_row(n, 0)) scales[kRows];
        while (n < last) {
            const int rows = last - n < kRows ? 1 : kRows;
            for (int r = 0; r < rows; ++r) scales[r] = scales_of_row(n + r, r);
            if (rows == 1)
                multiply_all<1, kParts>(args, table, inverse, scales, n, m, end);
            else
                multiply_all<kRows, kParts>(args, table, inverse, scales, n, m, end);
            n += rows;
        }
    }

    // On Zen 5 a row of x takes 0.75 of the time from memory with two rows of W at once instead of four. In cache two
    // rows of x take 0.83, but four 1.05 and sixteen 1.3.
    static void run(const LinearCall& args, int64_t first, int64_t last) {
        constexpr int kFew = std::min(2, Level::kRows);
        const bool few = args.batch <= 2;
        if constexpr (kTakesSmall)
            if (args.weight.shift == kSmallShift)
                return (few ? run_rows<kFew, kSmallParts> : run_rows<Level::kRows, kSmallParts>)(args, first,
                                                                                                 last);
        if (int64_t(1) << args.weight.shift < kBlock)
            (few ? run_rows<kFew, 2> : run_rows<Level::kRows, 2>)(args, first, last);
        else
            (few ? run_rows<kFew, 1> : run_rows<Level::kRows, 1>)(args, first, last);
    }

    template <int kRows, int kParts>
    static void run_rows(const LinearCall& args, int64_t first, int64_t last) {
        const Codebook& code = made_of_code<Codebook>(args.weight.quant_map);
        if constexpr (requires { typename Level::UpperTable; })
            if (code.upper)
                return run_with<kRows, kParts>(args, typename Level::UpperTable(code.entries), code.inverse,
                                               first, last);
        run_with<kRows, kParts>(args, typename Level::Table(code.entries), code.inverse, first, last);
    }

    template <int kRows, int kParts, typename Table>
    static void run_with(const LinearCall& args, const Table& table, float inverse, int64_t first,
                         int64_t last) {
        const WeightView& weight = args.weight;
        const int64_t capacity = weight.columns / kBlock * kParts + 2 + 16;
        std::vector<float> memory(size_t(capacity * kRows));
        const auto floats = [&](int64_t n, int r) -> const float* {
            float* to = memory.data() + r * capacity;
            scales_of_row(weight, n, to);
            return to;
        };
        for (int64_t m = 0; m < args.batch; m += kGroup) {
            const int64_t end = std::min(m + kGroup, args.batch);
            if constexpr (kParts == kSmallParts)
                run_small<kRows>(args, table, inverse, floats, first, last, m, end);
            else
                multiply_rows<kRows, kParts>(args, table, inverse, floats, first, last, m, end);
        }
    }

    // Blocks of 16. Some rows' scales are checked together, because each check ends with a sum of lanes.
    template <int kRows, typename Table, typename FloatsOfRow>
    static void run_small(const LinearCall& args, const Table& table, float inverse,
                          const FloatsOfRow& floats, int64_t first, int64_t last, int64_t m, int64_t end) {
        constexpr int64_t kStrip = 16;
        SmallScales scales(args.weight);
        const auto bytes = [&](int64_t n, int) { return scales.of_row(n); };
        const auto normal = [&](int64_t n, int) {
            return reinterpret_cast<const NormalScale*>(scales.of_row(n));
        };
        for (int64_t n = first, stop; n < last; n = stop) {
            stop = std::min(n + kStrip, last);
            scales.begin(n, stop - n, kBlocks * kSmallParts);
            if (const auto of_normal = scales.normal_factor())
                multiply_rows<kRows, kSmallParts>(args, table, inverse * *of_normal, normal, n, stop, m, end);
            else if (const auto factor = scales.factor())
                multiply_rows<kRows, kSmallParts>(args, table, inverse * *factor, bytes, n, stop, m, end);
            else
                multiply_rows<kRows, kSmallParts>(args, table, inverse, floats, n, stop, m, end);
        }
    }

    static LinearKernel kernel(int64_t max_batch) {
        return {.max_batch = {0, max_batch, max_batch},
                .column_multiple = kBlock,
                .min_shift = kTakesSmall ? kSmallShift : log2_of(kMinBlocksize),
                .arranged_bytes = arranged_bytes,
                .arrange = arrange,
                .run = run};
    }
};

}  // namespace quant4
}  // namespace peftcore

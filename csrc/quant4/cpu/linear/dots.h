// The "dots" way (see kernels.h): several rows of W at once, 8 values (one 32-bit word) a lane.
//
// A 16-bit lane of a word shifted right by 0, 4, 8 or 12 starts with a value's nibble, so one permutation looks up
// 32 values, and the dot product adds up pairs of words: 8 instructions for 128 values, compared with 23 in fp32. x
// is arranged in that order. Two vectors of W exchange words so that a lane has words of one block in both: all their
// products are added before they are scaled.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/avx512.h"
#include "quant4/cpu/linear/chunk_scales.h"
#include "quant4/cpu/linear/kernels.h"
#include "quant4/cpu/linear/rounded.h"

namespace peftcore {
namespace quant4 {
namespace {

// Repeated, so that an index's fifth bit does not matter.
struct Avx512Rounding {
    using Table = __m512i;

    static float round(const float* code, float factor, Table& table) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(factor));
        const __m256i rounded = __m256i(_mm512_cvtneps_pbh(scaled));
        const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
        const __m512 lost = _mm512_mul_ps(_mm512_sub_ps(back, scaled), _mm512_set1_ps(1.0f / factor));
        table = _mm512_broadcast_i64x4(rounded);
        return _mm512_reduce_add_ps(_mm512_mul_ps(lost, lost));
    }
};
using Rounded = RoundedCodebook<Avx512Rounding>;

constexpr int kRows = 16;  // of W with results that are stored together

// Stores results of x's rows from m on, [m][kRows] times the factors of W's rows, in columns from n on.
void store_results(const LinearCall& args, int64_t n, int64_t rows, int64_t m, int64_t count,
                   const float* sums, __m512 factors) {
    const __mmask16 stored = __mmask16((1u << rows) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (args.bias != nullptr)
        bias = from_bf16(_mm256_maskz_loadu_epi16(stored, static_cast<const uint16_t*>(args.bias) + n));
    for (int64_t i = 0; i < count; ++i) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(sums + i * kRows), factors, bias);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + (m + i) * args.weight.rows + n, stored,
                                 to_bf16(sum));
    }
}

struct LinearDots {
    static constexpr int kMultiple = 64;  // of the columns
    static constexpr int kChunk = 256;    // values of two vectors
    static constexpr int kMaxBatch = 4;   // rows of x
    // Prefetch distance in bytes, in memory order, into the L2 cache. A row of x by 40 layers of 4096 x 4096 in turn,
    // on two cores of Zen 4, takes 0.26 ms each, 35 GB/s. Prefetching into L1 takes 0.35, half of the distance 0.38; on
    // one core (1536 x 2048) the same distance within each row took twice as long.
    static constexpr int64_t kAhead = 8192;
    // Chunks of x, 16 KB, that stay in the L1 cache while kRows of W are multiplied by them, one part of x after
    // another.
    static constexpr int64_t kCached = 32;
    static constexpr int64_t kScaled = 64;  // chunks whose scales are written together
    static constexpr int kLanes = 16;

    static int64_t chunks(int64_t columns) { return ceil_div(columns, kChunk); }

    static int64_t arranged_bytes(int64_t batch, int64_t columns) {
        return batch * chunks(columns) * kChunk * int64_t(sizeof(uint16_t));
    }

    static __m512i load_x(const uint16_t* from, int64_t count) {
        if (count >= 32) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi16(count <= 0 ? 0 : __mmask32((1u << count) - 1), from);
    }

    // [batch][chunk][vector][j][lane]: value j ^ 1 of four, the even value being the high nibble, of the lane's word.
    static bool arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        uint16_t* to = static_cast<uint16_t*>(out);
        // Of 32 values from each half of the chunk, those of one vector, as [j][lane]: every other word of both.
        alignas(64) uint16_t of_vector[32];
        for (int i = 0; i < 32; ++i)
            of_vector[i] = uint16_t(i % 8 / 4 * 32 + i / 2 % 2 * 16 + i % 2 * 4 + (i / 8 ^ 1));
        const __m512i first = _mm512_load_si512(of_vector);
        for (int64_t m = 0; m < batch; ++m, from += columns)
            for (int64_t k = 0; k < columns; k += kChunk)
                for (int vector = 0; vector < 2; ++vector, to += kChunk / 2) {
                    const __m512i index = _mm512_add_epi16(first, _mm512_set1_epi16(short(8 * vector)));
                    __m512i part[4];
                    for (int i = 0; i < 4; ++i) {
                        const int64_t at = k + 32 * i, other = at + kChunk / 2;
                        part[i] = _mm512_permutex2var_epi16(load_x(from + at, columns - at), index,
                                                            load_x(from + other, columns - other));
                    }
                    const __m512i a = _mm512_shuffle_i32x4(part[0], part[1], 0x44),
                                  b = _mm512_shuffle_i32x4(part[2], part[3], 0x44),
                                  c = _mm512_shuffle_i32x4(part[0], part[1], 0xee),
                                  d = _mm512_shuffle_i32x4(part[2], part[3], 0xee);
                    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
                    _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(a, b, 0xdd));
                    _mm512_storeu_si512(to + 64, _mm512_shuffle_i32x4(c, d, 0x88));
                    _mm512_storeu_si512(to + 96, _mm512_shuffle_i32x4(c, d, 0xdd));
                }
        return true;
    }

    // Every other word of the chunk's two halves, so that lane i of both has the two words of 16 values,
    // `ChunkScales::part_of(i)`.
    // `values`: number of values, if not a whole chunk; masked loads take 1.2 times as long with 4 rows of x.
    struct Words {
        __m512i of[2];
    };
    template <bool kAll>
    static Words load_words(const uint8_t* from, int64_t values) {
        const auto half = [&](int64_t begin) {
            if (kAll) return _mm512_loadu_si512(from + begin / 2);
            const int64_t count = std::clamp<int64_t>(values - begin, 0, 128) / 8;
            return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), from + begin / 2);
        };
        const __m512 one = _mm512_castsi512_ps(half(0)), other = _mm512_castsi512_ps(half(128));
        return {{_mm512_castps_si512(_mm512_shuffle_ps(one, other, 0x88)),
                 _mm512_castps_si512(_mm512_shuffle_ps(one, other, 0xdd))}};
    }

    // The range of a call: chunks [first, last) of rows of W from `row` on.
    struct Part {
        int64_t row = 0, first = 0, last = 0;
        const uint8_t* scales = nullptr;
        const uint8_t* ahead = nullptr;  // memory to prefetch
        float* sums = nullptr;           // [row][kBatch][16 lanes], to which products are added
    };

    // kCount rows of W by all of x. Not inlined: with others in one function it has too few registers, and one row takes
    // 1.2 times as long, three 1.4.
    template <int kCount, int kBatch, ChunkKind kKind>
    [[gnu::noinline]]
    static void multiply(const LinearCall& args, const __m512i table, const ChunkScales& scales,
                         const Part& part) {
        const int64_t columns = args.weight.columns, count = chunks(columns), row_bytes = columns / 2;
        const uint16_t* x = static_cast<const uint16_t*>(args.x);
        const uint8_t* codes = args.weight.codes + part.row * row_bytes;
        const uint8_t* ahead = part.ahead;
        __m512 sums[kCount][kBatch];
        for (int r = 0; r < kCount; ++r)
            for (int i = 0; i < kBatch; ++i)
                sums[r][i] = _mm512_loadu_ps(part.sums + (r * kBatch + i) * kLanes);
        const auto add_chunk = [&]<bool kAll>(int64_t c, std::bool_constant<kAll>) {
            Words words[kCount];
#pragma GCC unroll 4
            for (int r = 0; r < kCount; ++r) {
                _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
                _mm_prefetch(reinterpret_cast<const char*>(ahead + 64), _MM_HINT_T1);
                ahead += kChunk / 2;
                words[r] = load_words<kAll>(codes + r * row_bytes + c * kChunk / 2, columns - c * kChunk);
            }
            // A sum of 8 products waits 6 cycles for each; two of 4 products wait half as long.
            constexpr int kSums = kCount * kBatch < 4 ? 2 : 1;
            __m512 products[kCount][kBatch][kSums];
#pragma GCC unroll 8
            for (int k = 0; k < 8; ++k) {
                const int sum = k % kSums, j = sum * 4 + k / kSums;
                __m512i pairs[kBatch];
#pragma GCC unroll 4
                for (int i = 0; i < kBatch; ++i) {
                    pairs[i] = _mm512_loadu_si512(x + (i * count + c) * kChunk + 32 * j);
                    // With so many sums the compiler would load it once for each row of W.
                    if constexpr (kBatch == kMaxBatch) asm("" : "+v"(pairs[i]));
                }
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    const __m512i w = _mm512_permutexvar_epi16(
                        _mm512_srli_epi16(words[r].of[j / 4], unsigned(j % 4 * 4)), table);
#pragma GCC unroll 4
                    for (int i = 0; i < kBatch; ++i) {
                        __m512& product = products[r][i][sum];
                        product = _mm512_dpbf16_ps(k < kSums ? _mm512_setzero_ps() : product, __m512bh(w),
                                                   __m512bh(pairs[i]));
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < kCount; ++r) {
                const __m512 scale =
                    scales.vector<kKind, kAll>(part.scales + r * scales.row_bytes, c, columns - c * kChunk);
#pragma GCC unroll 4
                for (int i = 0; i < kBatch; ++i) {
                    const __m512* product = products[r][i];
                    sums[r][i] = _mm512_fmadd_ps(
                        scale, kSums == 1 ? *product : _mm512_add_ps(product[0], product[kSums - 1]),
                        sums[r][i]);
                }
            }
        };
        const int64_t whole = std::min(part.last, columns / kChunk);
        for (int64_t c = part.first; c < whole; ++c) add_chunk(c, std::true_type());
        if (whole < part.last) add_chunk(whole, std::false_type());
        for (int r = 0; r < kCount; ++r)
            for (int i = 0; i < kBatch; ++i)
                _mm512_storeu_ps(part.sums + (r * kBatch + i) * kLanes, sums[r][i]);
    }

    // The sum of the lanes of each row's sums: [kBatch][kRows] of [kRows][kBatch][kLanes].
    template <int kBatch>
    static void add_lanes(const float* sums, float* out) {
        for (int i = 0; i < kBatch; ++i)
            _mm512_storeu_ps(out + i * kRows,
                             sums_of_lanes([&](int row) { return sums + (row * kBatch + i) * kLanes; }));
    }

    // Sums of rows [n, n + rows) that begin with what zero points add, times `by`.
    template <int kBatch>
    static void start_sums(const LinearCall& args, const RowScales& scales, int64_t n, int64_t rows, float by,
                           float* sums) {
        const int64_t stride = sums_stride(args.weight.columns >> args.weight.shift);
        scales.zero_factors(n, rows, [&](int64_t r, const auto& each) {
            __m512 total[kBatch];
            for (__m512& one : total) one = _mm512_setzero_ps();
            each([&](int64_t b, __m512 factors) {
                for (int i = 0; i < kBatch; ++i)
                    total[i] =
                        _mm512_fmadd_ps(factors, _mm512_loadu_ps(args.sums + i * stride + b), total[i]);
            });
            for (int i = 0; i < kBatch; ++i)
                _mm512_storeu_ps(sums + (r * kBatch + i) * kLanes,
                                 _mm512_mul_ps(total[i], _mm512_set1_ps(by)));
        });
    }

    template <int kBatch>
    static void run_all(const LinearCall& args, int64_t first, int64_t last) {
        // Number of W's rows with sums and products that fit into registers; of few rows of x two, which are almost read
        // one after the other: from memory that is faster than four.
        constexpr int kAtOnce = kBatch == 3 ? 3 : 2;
        const WeightView& weight = args.weight;
        const Rounded& rounded = made_of_code<Rounded>(weight.quant_map);
        const int64_t count = chunks(weight.columns);
        const int64_t parts = ceil_div(count * kBatch, kCached), of_part = ceil_div(count, parts);
        StripScales strips(weight, kRows);
        std::vector<float> sums(size_t(kRows * kBatch * kLanes)), results(size_t(kRows * kBatch));
        alignas(64) float factors[kRows] = {};
        for (int64_t n = first, rows; n < last; n += rows) {
            rows = std::min<int64_t>(kRows, last - n);
            const int64_t bytes = rows * weight.columns / 2;
            Part part{.ahead = weight.codes + n * weight.columns / 2};
            part.ahead += parts == 1 ? kAhead : bytes;
            strips.floats().fetch(n + kRows, rows);
            // While scales are written, no codes are read: a few rows' at a time, so that prefetching does not pause. A row
            // of x from memory takes 0.81 of the time that it takes with those of kRows at once, four rows of W and one
            // sum of products for each (a layer of 2048 x 5632, Zen 5).
            const int64_t some = std::max<int64_t>(kScaled / count / kAtOnce, 1) * kAtOnce;
            const int64_t scaled = parts == 1 ? std::min(some, rows) : rows;
            ChunkScales scales;
            if (args.sums == nullptr)
                std::fill(sums.begin(), sums.end(), 0.0f);
            else
                start_sums<kBatch>(args, strips.floats(), n, rows, 1 / rounded.inverse, sums.data());
            const auto multiply_rows = [&](int64_t row_count) {
                switch (scales.kind) {
                    case ChunkKind::kUpper:
                        return row_count == 1 ? multiply<1, kBatch, ChunkKind::kUpper>
                                              : multiply<kAtOnce, kBatch, ChunkKind::kUpper>;
                    case ChunkKind::kPower:
                        return row_count == 1 ? multiply<1, kBatch, ChunkKind::kPower>
                                              : multiply<kAtOnce, kBatch, ChunkKind::kPower>;
                    case ChunkKind::kE4M3:
                        return row_count == 1 ? multiply<1, kBatch, ChunkKind::kE4M3>
                                              : multiply<kAtOnce, kBatch, ChunkKind::kE4M3>;
                    case ChunkKind::kSmallFloats:
                        return row_count == 1 ? multiply<1, kBatch, ChunkKind::kSmallFloats>
                                              : multiply<kAtOnce, kBatch, ChunkKind::kSmallFloats>;
                    default:
                        return row_count == 1 ? multiply<1, kBatch, ChunkKind::kFloats>
                                              : multiply<kAtOnce, kBatch, ChunkKind::kFloats>;
                }
            };
            for (part.first = 0; part.first < count; part.first = part.last) {
                part.last = std::min(part.first + of_part, count);
                for (int64_t r = 0, row_count; r < rows; r += row_count) {
                    row_count = rows - r < kAtOnce ? 1 : kAtOnce;
                    if (part.first == 0 && r % scaled == 0) {
                        const int64_t some_rows = std::min(scaled, rows - r);
                        scales = strips.of_rows(n + r, some_rows);
                        std::fill_n(factors + r, some_rows, rounded.inverse * scales.factor);
                    }
                    part.row = n + r;
                    part.scales = scales.from + r % scaled * scales.row_bytes;
                    part.sums = sums.data() + r * kBatch * kLanes;
                    for (int line = 0; parts > 1 && part.first == 0 && line < 32; ++line)
                        _mm_prefetch(reinterpret_cast<const char*>(part.ahead + 64 * line), _MM_HINT_T1);
                    multiply_rows(row_count)(args, rounded.table, scales, part);
                    part.ahead += row_count * (part.last - part.first) * kChunk / 2;
                }
            }
            add_lanes<kBatch>(sums.data(), results.data());
            store_results(args, n, rows, 0, kBatch, results.data(), _mm512_load_ps(factors));
        }
    }

    static void run(const LinearCall& args, int64_t first, int64_t last) {
        switch (args.batch) {
            case 1:
                return run_all<1>(args, first, last);
            case 2:
                return run_all<2>(args, first, last);
            case 3:
                return run_all<3>(args, first, last);
            default:
                return run_all<4>(args, first, last);
        }
    }

    static LinearKernel kernel() {
        return {.max_batch = {0, 0, kMaxBatch},
                .column_multiple = kMultiple,
                .min_shift = kSmallShift,
                .zero_input = ZeroInput::kSums,
                .arranged_bytes = arranged_bytes,
                .arrange = arrange,
                .run = run};
    }
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore

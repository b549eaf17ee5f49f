// The "tile" way (see kernels.h) on AVX-512 with bf16 dot products: 16 rows of W by up to 16 of x in registers.
//
// A 16-bit lane of a word shifted right by 0, 4, 8 or 12 starts with a value's nibble, so that one
// permutation turns 16 words of 16 rows into 32 bf16 values: (1, 5), (0, 4), (3, 7) and (2, 6) of the eight
// that a word holds. They are multiplied at once, and never stored. x is arranged in the same pairs and broadcast.
//
// On Zen 4 all multiplications of 512 bits share two ports: one dot product a cycle, so that 16 rows by 4096 x 4096
// take 1.14 ms on two cores. Measured: 1.07 cycles with all operands in L1, 1.13 with W in L2, 1.4 with 5 rows, whose
// products wait for one another. No better: 32 rows of W for so few rows of x; cache lines copied to be contiguous,
// although rows a power of two apart share sets of the L1 cache.
#include <algorithm>
#include <vector>

#include "common/avx512.h"
#include "quant4/cpu/linear/dots.h"
#include "quant4/cpu/linear/strip_scales.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kInputs = 16, kMinInputs = 4;  // rows of x, by kRows of W
constexpr int kStep = 64, kHalfStep = 32;    // columns that share a scale, unless blocks have 16
constexpr int kMinExact = 14;  // rows of x from which `multiply_exact` is faster than `multiply_small`

// Number of x's rows multiplied together, from m on: more than kInputs are halved, as few rows cost most each.
int64_t inputs_from(int64_t m, int64_t batch) {
    const int64_t left = batch - m;
    return ceil_div(left, ceil_div(left, kInputs));
}

int64_t arranged_bytes(int64_t batch, int64_t columns) { return batch * columns * int64_t(sizeof(uint16_t)); }

// Rows that are multiplied together, as [columns / 2 pairs][rows] of two values, in the order above.
bool arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    uint32_t* to = static_cast<uint32_t*>(out);
    const __m128i pairs = _mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13);
    for (int64_t m = 0, count; m < batch; m += count, from += count * columns, to += count * columns / 2) {
        count = inputs_from(m, batch);
        for (int64_t k = 0; k < columns; k += 8)
            for (int64_t i = 0; i < count; ++i) {
                const __m128i eight = _mm_shuffle_epi8(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * columns + k)), pairs);
                uint32_t* at = to + k / 2 * count + i;
                at[0] = uint32_t(_mm_cvtsi128_si32(eight));
                at[count] = uint32_t(_mm_extract_epi32(eight, 1));
                at[2 * count] = uint32_t(_mm_extract_epi32(eight, 2));
                at[3 * count] = uint32_t(_mm_extract_epi32(eight, 3));
            }
    }
    return true;
}

// kRows of W.
struct Strip {
    const uint8_t* row[kRows];
    int64_t bytes;       // of a row
    const void* scales;  // [step][kRows], as each loop says
    __m512i table, upper_table;
    const uint8_t* ahead;  // memory to prefetch, as many bytes as these rows have,
    int64_t line;          // one line per call; other calls fetch the first one again
};

// The sum and the products of values and a broadcast pair of x. The compiler would load the pair by itself.
inline __m512 with_products(__m512 sum, __m512bh values, const uint32_t* x) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(values), "m"(*x));
    return sum;
}

// sums[m][row] of kCount rows of x, which are arranged in x.
template <int kCount, int kHalves>
void multiply(const Strip& strip, const uint32_t* x, float* sums) {
    const __m512i table = strip.table;
    const float* scales = static_cast<const float*>(strip.scales);
    const uint8_t* ahead = strip.ahead;
    __m512 sum[kCount];
    for (__m512& one : sum) one = _mm512_setzero_ps();
    for (int64_t at = 0; at < strip.bytes; at += kHalves * kHalfStep / 2, scales += kRows) {
        for (int i = 0; i < kHalves * kRows * kHalfStep / 2 / 64; ++i, ahead += strip.line)
            _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
        // Many sums are cleared first, few are set by their first products: so g++ 12 keeps more of them in registers.
        constexpr bool kCleared = kCount > 8;
        const auto first_of = [](int product) { return !kCleared && product == 0; };
        __m512 part[kCount];
#pragma GCC unroll 16
        for (int m = 0; kCleared && m < kCount; ++m) part[m] = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
            const FourColumns words =
                four_columns([&](int r) { return strip.row[r] + at + half * kHalfStep / 2; });
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j, x += kCount) {
                    const __m512bh values = __m512bh(
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(words.of[i], unsigned(4 * j)), table));
#pragma GCC unroll 16
                    for (int m = 0; m < kCount; ++m)
                        part[m] = _mm512_dpbf16_ps(first_of(half + i + j) ? _mm512_setzero_ps() : part[m],
                                                   values, __m512bh(_mm512_set1_epi32(int(x[m]))));
                }
        }
        const __m512 scale = _mm512_loadu_ps(scales);
#pragma GCC unroll 16
        for (int m = 0; m < kCount; ++m) sum[m] = _mm512_fmadd_ps(part[m], scale, sum[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kCount; ++m) _mm512_storeu_ps(sums + m * kRows, sum[m]);
}

inline __m512 load_scales(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load_scales(const uint16_t* fp16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(fp16)));
}

// As above with blocks of 16, and scales in fp16 or fp32.
template <int kCount, typename Scale>
void multiply_small(const Strip& strip, const uint32_t* x, float* sums) {
    const __m512i table = strip.table;
    const auto* scales = static_cast<const Scale*>(strip.scales);
    const uint8_t* ahead = strip.ahead;
    __m512 sum[kCount];
    for (__m512& one : sum) one = _mm512_setzero_ps();
    for (int64_t at = 0; at < strip.bytes; at += kStep / 2) {
        for (int i = 0; i < kRows * kStep / 2 / 64; ++i, ahead += strip.line)
            _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const FourColumns words =
                four_columns([&](int r) { return strip.row[r] + at + half * kHalfStep / 2; });
#pragma GCC unroll 2
            for (int block = 0; block < 2; ++block, scales += kRows) {
                constexpr bool kCleared = kCount > 8;  // as above
                __m512 part[kCount];
#pragma GCC unroll 16
                for (int m = 0; kCleared && m < kCount; ++m) part[m] = _mm512_setzero_ps();
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j, x += kCount) {
                        const __m512bh values = __m512bh(_mm512_permutexvar_epi16(
                            _mm512_srli_epi16(words.of[2 * block + i], unsigned(4 * j)), table));
#pragma GCC unroll 16
                        for (int m = 0; m < kCount; ++m)
                            part[m] = with_products(!kCleared && i + j == 0 ? _mm512_setzero_ps() : part[m],
                                                    values, x + m);
                    }
                const __m512 scale = load_scales(scales);
#pragma GCC unroll 16
                for (int m = 0; m < kCount; ++m) sum[m] = _mm512_fmadd_ps(part[m], scale, sum[m]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < kCount; ++m) _mm512_storeu_ps(sums + m * kRows, sum[m]);
}

// As above, by products of entries and ExactCodebook's scales, each twice. They take more instructions than entries, but
// all are added to the same sums: 16 rows of x take 0.93 of the time, 13 rows 1.05 (Zen 5).
template <int kCount>
void multiply_exact(const Strip& strip, const uint32_t* x, float* sums) {
    const __m512i table = strip.table, upper_table = strip.upper_table;
    const __m512i magnitude = _mm512_set1_epi16(7), sign = _mm512_set1_epi16(short(0x8000));
    const float* scales = static_cast<const float*>(strip.scales);
    const uint8_t* ahead = strip.ahead;
    __m512 sum[kCount];
    for (__m512& one : sum) one = _mm512_setzero_ps();
    for (int64_t at = 0; at < strip.bytes; at += kStep / 2) {
        for (int i = 0; i < kRows * kStep / 2 / 64; ++i, ahead += strip.line)
            _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const FourColumns words =
                four_columns([&](int r) { return strip.row[r] + at + half * kHalfStep / 2; });
#pragma GCC unroll 2
            for (int block = 0; block < 2; ++block, scales += kRows) {
                const __m512i scale = _mm512_loadu_si512(scales);
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j, x += kCount) {
                        // A nibble's magnitude in the lowest bits, and its sign in the highest one.
                        const __m512i word = words.of[2 * block + i],
                                      low = _mm512_srli_epi16(word, unsigned(4 * j)),
                                      high = _mm512_slli_epi16(word, unsigned(12 - 4 * j));
                        constexpr int kSecondChooses = 0xe2, kOrBoth = 0xf8;  // b ? a : c; a | (b & c)
                        const __m512i index =
                            _mm512_ternarylogic_epi32(low, magnitude, scale, kSecondChooses);
                        const __m512i size =
                            _mm512_subs_epu16(_mm512_permutex2var_epi16(table, index, upper_table), scale);
                        const __m512bh values =
                            __m512bh(_mm512_ternarylogic_epi32(size, high, sign, kOrBoth));
#pragma GCC unroll 16
                        for (int m = 0; m < kCount; ++m) sum[m] = with_products(sum[m], values, x + m);
                    }
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < kCount; ++m) _mm512_storeu_ps(sums + m * kRows, sum[m]);
}

// Called by pointers: with several of these loops in one function, g++ 12 gives each too few registers, and 16 rows
// take 1.2 times as long.
using Multiply = void (*)(const Strip&, const uint32_t*, float*);
template <int kHalves>
constexpr Multiply kMultiply[kInputs - kMinInputs + 1] = {
    multiply<4, kHalves>,  multiply<5, kHalves>,  multiply<6, kHalves>,  multiply<7, kHalves>,
    multiply<8, kHalves>,  multiply<9, kHalves>,  multiply<10, kHalves>, multiply<11, kHalves>,
    multiply<12, kHalves>, multiply<13, kHalves>, multiply<14, kHalves>, multiply<15, kHalves>,
    multiply<16, kHalves>};
template <typename Scale>
constexpr Multiply kMultiplySmall[kInputs - kMinInputs + 1] = {
    multiply_small<4, Scale>,  multiply_small<5, Scale>,  multiply_small<6, Scale>,
    multiply_small<7, Scale>,  multiply_small<8, Scale>,  multiply_small<9, Scale>,
    multiply_small<10, Scale>, multiply_small<11, Scale>, multiply_small<12, Scale>,
    multiply_small<13, Scale>, multiply_small<14, Scale>, multiply_small<15, Scale>,
    multiply_small<16, Scale>};
constexpr Multiply kMultiplyExact[kInputs - kMinExact + 1] = {multiply_exact<14>, multiply_exact<15>,
                                                              multiply_exact<16>};

// Arranges [rows][steps] as [step][kRows], with the last row repeated. Reads up to three behind them.
void turn(const float* from, int64_t rows, int64_t steps, float* out) {
    for (int64_t k = 0; k < steps; k += 4, out += 4 * kRows) {
        const FourColumns turned =
            four_columns([&](int row) { return from + least(row, rows - 1) * steps + k; });
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * kRows, turned.of[i]);
    }
}

// Adds to sums[m][row] what zero points add, times `by`: factors[block][row] by x's sums over blocks.
void add_zeros(const float* factors, int64_t blocks, const float* x, int64_t count, float by, float* sums) {
    constexpr int kTogether = 4;  // rows of x, whose sums do not wait for one another
    const int64_t stride = sums_stride(blocks);
    for (int64_t m = 0; m < count; m += kTogether) {
        const float* row[kTogether];
        __m512 total[kTogether];
        for (int i = 0; i < kTogether; ++i) {
            const int64_t at = least(m + i, count - 1);  // repeats the last row, without storing it
            row[i] = x + at * stride;
            total[i] = _mm512_setzero_ps();
        }
        for (int64_t b = 0; b < blocks; ++b) {
            const __m512 factor = _mm512_loadu_ps(factors + b * kRows);
#pragma GCC unroll 4
            for (int i = 0; i < kTogether; ++i)
                total[i] = _mm512_fmadd_ps(factor, _mm512_set1_ps(row[i][b]), total[i]);
        }
        for (int i = 0; i < kTogether && m + i < count; ++i)
            _mm512_storeu_ps(
                sums + (m + i) * kRows,
                _mm512_fmadd_ps(total[i], _mm512_set1_ps(by), _mm512_loadu_ps(sums + (m + i) * kRows)));
    }
}

// first is a multiple of kRows.
void run(const LinearCall& args, int64_t first, int64_t last) {
    const WeightView& weight = args.weight;
    const Rounded& code = made_of_code<Rounded>(weight.quant_map);
    const bool small = weight.shift == kSmallShift;
    const int step = small ? 1 << kSmallShift : weight.shift < 6 ? kHalfStep : kStep;
    const RowScales scales(weight, step);
    StripBytes bytes(weight, small && args.batch / ceil_div(args.batch, kInputs) >= kMinExact);
    const int64_t columns = weight.columns, steps = columns / step;
    std::vector<float> sums(size_t(kInputs * kRows)),
        by_row(size_t(RowScales::capacity(kRows, columns, step))),
        by_step(size_t(kRows * filled_up(steps, 4)));
    const int64_t blocks = args.sums == nullptr ? 0 : columns >> weight.shift,
                  sums_of_row = sums_stride(blocks);
    std::vector<float> zeros_by_row(size_t(kRows * blocks + kRows)),
        zeros_by_block(size_t(kRows * sums_of_row));
    for (int64_t n = first; n < last; n += kRows) {
        Strip strip{.row = {},
                    .bytes = columns / 2,
                    .scales = by_step.data(),
                    .table = code.table,
                    .upper_table = {},
                    .ahead = weight.codes + (n + kRows) * columns / 2,
                    .line = 64};
        scales.fetch(n + kRows, kRows);
        const int64_t rows = least(weight.rows - n, kRows);  // the last one is repeated, without storing it
        for (int64_t r = 0; r < kRows; ++r)
            strip.row[r] = weight.codes + (n + least(r, rows - 1)) * columns / 2;
        const std::optional<float> factor = bytes.write(n, rows, by_step.data());
        if (!factor) turn(scales.of_rows(n, rows, by_row.data()), rows, steps, by_step.data());
        const ExactCodebook* exact = factor ? bytes.exact() : nullptr;
        if (exact != nullptr) {
            strip.table = _mm512_load_si512(exact->entries);
            strip.upper_table = _mm512_load_si512(exact->entries + 32);
        }
        const float inverse = exact != nullptr ? 1 : code.inverse;
        const Multiply* of_count = exact != nullptr ? kMultiplyExact - (kMinExact - kMinInputs)
                                   : factor         ? kMultiplySmall<uint16_t>
                                   : small          ? kMultiplySmall<float>
                                   : step == kStep  ? kMultiply<2>
                                                    : kMultiply<1>;
        if (blocks > 0) {
            scales.zero_factors(n, rows, [&](int64_t r, const auto& each) {
                each([&](int64_t b, __m512 factors) {
                    _mm512_storeu_ps(zeros_by_row.data() + r * blocks + b, factors);
                });
            });
            turn(zeros_by_row.data(), rows, blocks, zeros_by_block.data());
        }
        const uint32_t* x = static_cast<const uint32_t*>(args.x);
        for (int64_t m = 0, count; m < args.batch; m += count, x += count * columns / 2, strip.line = 0) {
            count = inputs_from(m, args.batch);
            of_count[count - kMinInputs](strip, x, sums.data());
            if (blocks > 0)
                add_zeros(zeros_by_block.data(), blocks, args.sums + m * sums_of_row, count, 1 / code.inverse,
                          sums.data());
            store_results(args, n, least(last - n, kRows), m, count, sums.data(),
                          _mm512_set1_ps(inverse * factor.value_or(1)));
        }
    }
}

}  // namespace

// Measured on Zen 4, 4096 x 4096 in the second cache: 4 rows of x take 0.41 ms by dots and 0.49 by this way, 5 rows
// 0.52.
void fill_avx512bf16(LinearKernels& kernels) {
    kernels.dots = LinearDots::kernel();
    kernels.integers.max_batch[int(Dtype::kBFloat16)] =
        0;  // dot products of bf16 are faster, for many rows as well
    kernels.rows.max_batch[int(Dtype::kBFloat16)] = 8;  // the library is faster from there on
    kernels.tile = {.granule = kRows,
                    .min_batch = kMinInputs,
                    .max_batch = {0, 0, kTileBatch},
                    .column_multiple = kStep,
                    .min_shift = kSmallShift,
                    .zero_input = ZeroInput::kSums,
                    .arranged_bytes = arranged_bytes,
                    .arrange = arrange,
                    .run = run};
}

}  // namespace quant4
}  // namespace peftcore

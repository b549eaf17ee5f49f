// The "dots" and "tile" ways (see kernels.h) by products of bf16: one instruction adds four lanes' pairs (bfdot), or
// the fours of 2 rows of W and 2 of x (bfmmla).
//
// 32 values of a row, two nibbles a byte, become four vectors by 10 instructions. Even ones come first, then odd ones,
// and x is arranged in the same order.
#include <algorithm>
#include <vector>

#include "common/neon.h"
#include "quant4/cpu/linear/kernels.h"
#include "quant4/cpu/linear/rounded.h"

namespace peftcore {
namespace quant4 {
namespace {

struct NeonRounding {
    using Table = ShortTable;

    static float round(const float* code, float factor, Table& table) {
        float32x4_t squares = vdupq_n_f32(0);
        uint16x4_t part[4];
        for (int i = 0; i < 4; ++i) {
            const float32x4_t scaled = vmulq_n_f32(vld1q_f32(code + 4 * i), factor);
            part[i] = rounded(scaled, static_cast<const BFloat16*>(nullptr));
            const float32x4_t lost = vmulq_n_f32(vsubq_f32(from_bfloat16(part[i]), scaled), 1.0f / factor);
            squares = vfmaq_f32(squares, lost, lost);
        }
        table = ShortTable(vcombine_u16(part[0], part[1]), vcombine_u16(part[2], part[3]));
        return vaddvq_f32(squares);
    }
};
using Rounded = RoundedCodebook<NeonRounding>;

constexpr int kStep = 64, kHalfStep = 32;  // columns that share a scale
constexpr int kVectors = kHalfStep / 8;    // in half a step
constexpr int64_t kAhead = 4096;           // prefetch distance in bytes

inline bfloat16x8_t as_bf16(uint16x8_t bits) { return vreinterpretq_bf16_u16(bits); }

// Half a step: even values, then odd ones, as vectors of bf16.
struct Half32 {
    uint16x8_t of[kVectors];
};

inline Half32 decoded(const uint8_t* packed, const ShortTable& table) {
    const uint8x16_t bytes = vld1q_u8(packed);
    const uint16x8x2_t even = table(vshrq_n_u8(bytes, 4)), odd = table(vandq_u8(bytes, vdupq_n_u8(15)));
    return {{even.val[0], even.val[1], odd.val[0], odd.val[1]}};
}

inline Half32 in_that_order(const uint16_t* x) {
    const uint16x8_t a = vld1q_u16(x), b = vld1q_u16(x + 8), c = vld1q_u16(x + 16), d = vld1q_u16(x + 24);
    return {{vuzp1q_u16(a, b), vuzp1q_u16(c, d), vuzp2q_u16(a, b), vuzp2q_u16(c, d)}};
}

inline uint16x8_t first_fours(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_u16_u64(vzip1q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}
inline uint16x8_t second_fours(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_u16_u64(vzip2q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

// One or two rows of x, kRows of W at once.
struct Dots {
    static constexpr int kRows = 4, kMaxBatch = 2;

    static int64_t arranged_bytes(int64_t batch, int64_t columns) {
        return batch * columns * int64_t(sizeof(uint16_t));
    }

    static bool arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        uint16_t* to = static_cast<uint16_t*>(out);
        for (int64_t k = 0; k < batch * columns; k += kHalfStep) {
            const Half32 values = in_that_order(from + k);
            for (int i = 0; i < kVectors; ++i) vst1q_u16(to + k + 8 * i, values.of[i]);
        }
        return true;
    }

    // Rows [n, n + kCount) of W by all of x, with kScales for each step.
    template <int kCount, int kBatch, int kScales>
    static void multiply(const LinearCall& args, const Rounded& code, int64_t n) {
        const WeightView weight = args.weight;
        const int64_t columns = weight.columns;
        const uint16_t* x = static_cast<const uint16_t*>(args.x);
        const ShortTable table = code.table;
        float32x4_t sums[kCount][kBatch], part[kCount][kBatch];
        for (auto& row : sums)
            for (float32x4_t& sum : row) sum = vdupq_n_f32(0);
        for (int64_t k = 0; k < columns; k += kStep) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const int64_t at = k + half * kHalfStep;
                if (half == 0 || kScales == 2)
                    for (auto& row : part)
                        for (float32x4_t& sum : row) sum = vdupq_n_f32(0);
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    const uint8_t* packed = weight.codes + ((n + r) * columns + at) / 2;
                    if (half == 0) __builtin_prefetch(packed + kAhead);
                    const Half32 w = decoded(packed, table);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 2
                        for (int i = 0; i < kBatch; ++i)
                            part[r][i] = vbfdotq_f32(part[r][i], as_bf16(w.of[v]),
                                                     as_bf16(vld1q_u16(x + i * columns + at + 8 * v)));
                }
                if (half == 0 && kScales == 1) continue;
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    const float scale = block_scale(weight, ((n + r) * columns + at) >> weight.shift);
#pragma GCC unroll 2
                    for (int i = 0; i < kBatch; ++i) sums[r][i] = vfmaq_n_f32(sums[r][i], part[r][i], scale);
                }
            }
        }
        for (int r = 0; r < kCount; ++r)
            for (int i = 0; i < kBatch; ++i)
                store_result(args, i, n + r, vaddvq_f32(sums[r][i]) * code.inverse);
    }

    template <int kBatch, int kScales>
    static void run_all(const LinearCall& args, int64_t first, int64_t last) {
        const Rounded& code = made_of_code<Rounded>(args.weight.quant_map);
        for (; last - first >= kRows; first += kRows) multiply<kRows, kBatch, kScales>(args, code, first);
        for (; first < last; ++first) multiply<1, kBatch, kScales>(args, code, first);
    }

    static void run(const LinearCall& args, int64_t first, int64_t last) {
        if (int64_t(1) << args.weight.shift < kStep)
            return args.batch == 1 ? run_all<1, 2>(args, first, last) : run_all<2, 2>(args, first, last);
        args.batch == 1 ? run_all<1, 1>(args, first, last) : run_all<2, 1>(args, first, last);
    }

    static LinearKernel kernel() {
        return {.max_batch = {0, 0, kMaxBatch},
                .column_multiple = kStep,
                .arranged_bytes = arranged_bytes,
                .arrange = arrange,
                .run = run};
    }
};

// More rows of x, in pairs; four rows of W, as two pairs, that are unpacked once for all of them.
struct PairsOfRows {
    static constexpr int kRows = 4, kPairs = kRows / 2;
    static constexpr int kInputPairs = 4;  // of x that are multiplied together: 8 sums

    // A step of a pair of rows: of each vector the first fours, then the second ones.
    static constexpr int kStepVectors = 2 * kStep / 8;
    struct Step {
        uint16x8_t of[kStepVectors];
    };

    static int64_t input_pairs(int64_t batch) { return ceil_div(batch, 2); }

    static int64_t arranged_bytes(int64_t batch, int64_t columns) {
        return input_pairs(batch) * columns / kStep * int64_t(sizeof(Step));
    }

    static void put(const Half32& one, const Half32& other, uint16x8_t* out) {
        for (int i = 0; i < kVectors; ++i) {
            out[2 * i] = first_fours(one.of[i], other.of[i]);
            out[2 * i + 1] = second_fours(one.of[i], other.of[i]);
        }
    }

    // [columns / kStep][pairs of rows], with zeros for the missing row of an odd number.
    static bool arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        Step* to = static_cast<Step*>(out);
        for (int64_t k = 0; k < columns; k += kStep)
            for (int64_t m = 0; m < batch; m += 2, ++to)
                for (int half = 0; half < 2; ++half) {
                    const uint16_t* row = from + m * columns + k + half * kHalfStep;
                    put(in_that_order(row), m + 1 < batch ? in_that_order(row + columns) : Half32{},
                        to->of + half * 2 * kVectors);
                }
        return true;
    }

    // sums[i][j] += scale[j] * (pair i of x by pair j of W), of kCount pairs of x and these vectors of a step.
    template <int kCount>
    static void multiply(const Step* x, const Step* values, Range vectors, const float32x4_t* scale,
                         float32x4_t (*sums)[kPairs]) {
        float32x4_t part[kCount][kPairs];
        for (auto& row : part)
            for (float32x4_t& sum : row) sum = vdupq_n_f32(0);
        for (int64_t q = vectors.first; q < vectors.last; ++q) {
            const bfloat16x8_t first = as_bf16(values[0].of[q]), second = as_bf16(values[1].of[q]);
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) {
                const bfloat16x8_t inputs = as_bf16(x[i].of[q]);
                part[i][0] = vbfmmlaq_f32(part[i][0], inputs, first);
                part[i][1] = vbfmmlaq_f32(part[i][1], inputs, second);
            }
        }
        for (int i = 0; i < kCount; ++i)
            for (int j = 0; j < kPairs; ++j) sums[i][j] = vfmaq_f32(sums[i][j], part[i][j], scale[j]);
    }

    static void multiply_all(const Step* x, int64_t pairs, const Step* values, Range vectors,
                             const float32x4_t* scale, float32x4_t (*sums)[kPairs]) {
        for (; pairs >= kInputPairs; pairs -= kInputPairs, x += kInputPairs, sums += kInputPairs)
            multiply<kInputPairs>(x, values, vectors, scale, sums);
        switch (pairs) {
            case 3:
                return multiply<3>(x, values, vectors, scale, sums);
            case 2:
                return multiply<2>(x, values, vectors, scale, sums);
            case 1:
                return multiply<1>(x, values, vectors, scale, sums);
        }
    }

    static void run(const LinearCall& args, int64_t first, int64_t last) {
        const WeightView& weight = args.weight;
        const Rounded& code = made_of_code<Rounded>(weight.quant_map);
        const ShortTable table = code.table;
        const int64_t columns = weight.columns, pairs = input_pairs(args.batch);
        const int halves = weight.shift < 6 ? 2 : 1;  // of a step, each with its scale
        float32x4_t sums[kTileBatch / 2][kPairs];
        for (int64_t n = first; n < last; n += kRows) {
            int64_t begin[kRows];
            for (int r = 0; r < kRows; ++r)  // repeats the last row, without storing it
                begin[r] = least(n + r, weight.rows - 1) * columns;
            for (auto& row : sums)
                for (float32x4_t& sum : row) sum = vdupq_n_f32(0);
            for (int64_t k = 0; k < columns; k += kStep) {
                Step values[kPairs];
                for (int j = 0; j < kPairs; ++j)
                    for (int half = 0; half < 2; ++half) {
                        const auto row = [&](int r) {
                            const uint8_t* packed = weight.codes + (begin[r] + k + half * kHalfStep) / 2;
                            if (half == 0) __builtin_prefetch(packed + kStep);
                            return decoded(packed, table);
                        };
                        put(row(2 * j), row(2 * j + 1), values[j].of + half * 2 * kVectors);
                    }
                const Step* x = static_cast<const Step*>(args.x) + k / kStep * pairs;
                for (int half = 0; half < halves; ++half) {
                    float32x4_t scale[kPairs];
                    for (int j = 0; j < kPairs; ++j) {
                        const auto of = [&](int r) {
                            return block_scale(weight, (begin[r] + k + half * kHalfStep) >> weight.shift);
                        };
                        const float one = of(2 * j), other = of(2 * j + 1);
                        scale[j] = float32x4_t{one, other, one, other};
                    }
                    const Range vectors{half * kStepVectors / halves, (half + 1) * kStepVectors / halves};
                    multiply_all(x, pairs, values, vectors, scale, sums);
                }
            }
            for (int64_t m = 0; m < args.batch; ++m)
                for (int64_t r = 0; r < least(kRows, last - n); ++r)
                    store_result(args, m, n + r, sums[m / 2][r / 2][m % 2 * 2 + r % 2] * code.inverse);
        }
    }

    static LinearKernel kernel() {
        return {.granule = kRows,
                .min_batch = Dots::kMaxBatch + 1,
                .max_batch = {0, 0, kTileBatch},
                .column_multiple = kStep,
                .arranged_bytes = arranged_bytes,
                .arrange = arrange,
                .run = run};
    }
};

}  // namespace

void fill_neonbf16(LinearKernels& kernels) {
    kernels.dots = Dots::kernel();
    kernels.integers.max_batch[int(Dtype::kBFloat16)] = 0;  // these are faster, for many rows as well
    kernels.rows.max_batch[int(Dtype::kBFloat16)] = 4;
    kernels.tile = PairsOfRows::kernel();
}

}  // namespace quant4
}  // namespace peftcore

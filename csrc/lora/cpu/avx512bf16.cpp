// `down` and `outer` of bf16 rows by dot products of bf16, with factors in two halves (see kernels.h): as many operations
// as in fp32, but x needs no conversion.
#include "lora/cpu/kernels.h"
#include "lora/cpu/split.h"

namespace peftcore {
namespace lora {
namespace {

constexpr int kDownRows = 12;        // 24 of 32 registers hold sums
constexpr int64_t kChainPairs = 32;  // of a short sum; see blocks.h

inline __m512i word(const void* from) {
    int32_t value;
    std::memcpy(&value, from, sizeof value);
    return _mm512_set1_epi32(value);
}

// total[i] += x row i times `pairs` units at `right`, `stride` words apart.
template <int R>
inline void add_down(const BFloat16* const (&x)[R], int64_t k, int64_t pairs, const uint32_t* right,
                     int64_t stride, float (*total)[kSplitSide]) {
    __m512 first[R], rest[R];
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) first[i] = rest[i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p, right += stride) {
        const __m512bh a = __m512bh(_mm512_loadu_si512(right)),
                       b = __m512bh(_mm512_loadu_si512(right + kSplitSide));
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
            const __m512bh pair = __m512bh(word(x[i] + k + 2 * p));
            first[i] = _mm512_dpbf16_ps(first[i], a, pair);
            rest[i] = _mm512_dpbf16_ps(rest[i], b, pair);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
        _mm512_store_ps(total[i], _mm512_add_ps(_mm512_load_ps(total[i]), _mm512_add_ps(first[i], rest[i])));
}

// s of R rows, of which those behind `count` are not written; x has `columns`, and `stride` of them in memory.
template <int R>
void down_rows(const DownArgs& args, const BFloat16* from, int64_t stride, int64_t row, int64_t count) {
    const BFloat16* x[R];
    BFloat16 last[R][2] = {};  // of an odd number of columns, followed by 0
    const BFloat16* lasts[R];
    const int64_t whole = args.columns / 2, width = kHalves * args.width;
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
        x[i] = from + std::min<int64_t>(i, count - 1) * stride;
        if (args.columns % 2 != 0) last[i][0] = x[i][args.columns - 1];
        lasts[i] = last[i];
    }
    alignas(64) float total[R][kSplitSide];
    for (int64_t n = 0; n < args.r; n += kSplitSide) {
        const uint32_t* right = static_cast<const uint32_t*>(args.right) + kHalves * n;
        std::memset(total, 0, sizeof total);
        for (int64_t p = 0; p < whole; p += kChainPairs)
            add_down<R>(x, 2 * p, std::min(kChainPairs, whole - p), right + p * width, width, total);
        if (args.columns % 2 != 0) add_down<R>(lasts, 0, 1, right + whole * width, width, total);
        for (int64_t i = 0; i < count; ++i)
            _mm512_mask_storeu_ps(args.s + (row + i) * args.r + n, first_of(args.r - n),
                                  _mm512_mul_ps(_mm512_load_ps(total[i]), _mm512_set1_ps(args.factor)));
    }
}

void down(const DownArgs& args, int64_t first, int64_t last) {
    const int64_t columns = args.columns, stride = filled_up(columns, 32);
    const bool all = args.keep.bits == nullptr;
    std::vector<BFloat16> staged(all ? 0 : size_t(kDownRows * stride));
    const BFloat16* x = static_cast<const BFloat16*>(args.x);
    for (int64_t m = first; m < last; m += kDownRows) {
        const int64_t rows = std::min<int64_t>(kDownRows, last - m);
        for (int64_t i = 0; i < rows; ++i) {
            if (m + kDownRows + i < last) prefetch(x + (m + kDownRows + i) * columns, columns);
            for (int64_t k = 0; !all && k < columns; k += 32)
                _mm512_storeu_si512(
                    &staged[size_t(i * stride + k)],
                    load_kept(x + (m + i) * columns + k, columns - k, args.keep.row(m + i) + k / 8));
        }
        const BFloat16* from = all ? x + m * columns : staged.data();
        const int64_t step = all ? columns : stride;
        if (rows == kDownRows) {
            down_rows<kDownRows>(args, from, step, m, rows);
            continue;
        }
        for (int64_t i = 0; i < rows; i += 4)
            down_rows<4>(args, from + i * step, step, m + i, std::min<int64_t>(4, rows - i));
    }
}

// sums [8][16 V] += leftᵀ right for `pairs` units.
template <int V>
inline void add_outer(const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t right_stride,
                      int64_t pairs, float* sums, int64_t sums_row) {
    constexpr int kRanks = 8;
    __m512 sum[kRanks][V];
#pragma GCC unroll 8
    for (int j = 0; j < kRanks; ++j)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[j][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p, left += left_stride, right += right_stride) {
        __m512bh x[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) x[v] = __m512bh(_mm512_loadu_si512(right + 16 * v));
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half)
#pragma GCC unroll 8
            for (int j = 0; j < kRanks; ++j) {
                const __m512bh pair = __m512bh(word(left + half * kSplitSide + j));
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) sum[j][v] = _mm512_dpbf16_ps(sum[j][v], x[v], pair);
            }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kRanks; ++j)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float* at = sums + j * sums_row + 16 * v;
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sum[j][v]));
        }
}

void outer(const OuterArgs& args, int64_t first, int64_t last) {
    alignas(64) uint32_t staged[kBlockPairs * kBlockColumns];
    for_each_block<BFloat16>(args, first, last, [&](const OuterBlock<BFloat16>& block) {
        const int64_t width = filled_up(block.columns, kSplitSide), pairs = ceil_div(block.rows, kPair),
                      stride = kHalves * args.width;
        const BFloat16* x = block.x;
        for (int64_t i = 0; i < block.rows; i += kPair, x += kPair * args.columns) {
            prefetch_ahead(block, i, args.columns);
            prefetch_ahead(block, i + 1, args.columns);
            const bool has_second = i + 1 < block.rows;
            stage_rows(x, has_second ? x + args.columns : nullptr, block.columns, block.keep.row(i),
                       has_second ? block.keep.row(i + 1) : nullptr, staged + i / kPair * width);
        }
        const uint32_t* left = static_cast<const uint32_t*>(args.left) + block.row / kPair * stride;
        for (int64_t j = 0; j < args.r; j += 8) {
            const uint32_t* ranks = left + kHalves * (j / kSplitSide * kSplitSide) + j % kSplitSide;
            float* sums = block.sums + j * block.sums_row;
            int64_t k = 0;
            for (; k + 32 <= width; k += 32)
                add_outer<2>(ranks, stride, staged + k, width, pairs, sums + k, block.sums_row);
            if (k < width) add_outer<1>(ranks, stride, staged + k, width, pairs, sums + k, block.sums_row);
        }
    });
}

void halves(const Halves& halves) {
    for (int64_t i = 0; i < halves.rows; ++i)
        for (int64_t k = 0; k < halves.columns; k += kSplitSide) {
            const __mmask16 there = first_of(halves.columns - k);
            const Split split(_mm512_maskz_loadu_ps(there, halves.from + i * halves.columns + k));
            BFloat16* out = halves.out + i * halves.row_stride + k;
            const auto store = [&](int part, __m256i values) {
                _mm256_mask_storeu_epi16(out + part * halves.part_stride, there, values);
            };
            store(0, split.first);
            if (halves.parts == kHalves) {
                store(1, split.rest);
                continue;
            }
            store(1, halves.left ? split.rest : split.first);
            store(2, halves.left ? split.first : split.rest);
        }
}

}  // namespace

void fill_avx512bf16(ThinKernels& thin) {
    thin.arrangement = {.pair = kPair, .unit_size = int(kHalves * sizeof(uint32_t)), .arrange = arrange};
    thin.down = down;
    thin.outer = outer;
    thin.halves = halves;
}

}  // namespace lora
}  // namespace peftcore

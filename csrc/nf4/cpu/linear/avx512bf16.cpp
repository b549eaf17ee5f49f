// The "tile" way (see kernels.h) on AVX-512 with bf16 dot products: 32 rows of W by 8 of x in registers.
//
// A 16-bit lane of a word shifted right by 0, 4, 8 or 12 begins with the nibble of a value, so that one
// permutation turns 16 words of 16 rows into 32 bf16 values: (1, 5), (0, 4), (3, 7) and (2, 6) of the eight
// that a word holds. x is arranged in the same pairs and broadcast.
//
// Measured on one core of Zen 4, half of 4096 x 4096, 16 rows of x: 1.48 ms, of which the dot products alone
// need 1.13 and the loop without reading and decoding W takes 1.27. No better: sums kept in registers with 16
// rows of W, reading and decoding spread over both passes of 8 rows of x, whole lines transposed at once
// (1.74), fetching x ahead.
#include <algorithm>
#include <vector>

#include "common/avx512.h"
#include "nf4/cpu/linear/dots.h"

namespace peftcore {
namespace nf4 {
namespace {

constexpr int kVectors = 2, kRows = 16 * kVectors;
constexpr int kStep = 64, kHalfStep = 32;  // columns that share a scale
constexpr int kInputRows = 8;              // of x, that are multiplied together
constexpr int kDecoded = 8;                // pairs multiplied for each call of `decode`

int64_t arranged_bytes(int64_t batch, int64_t columns) { return batch * columns * int64_t(sizeof(uint16_t)); }

// [columns / 2 pairs][batch] of two values, in the order above. A step at a time, whose part of `out` stays
// in the first cache.
bool arrange(const void* x, Dtype, int64_t batch, int64_t columns, void* out) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    uint32_t* to = static_cast<uint32_t*>(out);
    const __m128i pairs = _mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13);
    for (int64_t k = 0; k < columns; k += kStep, to += kStep / 2 * batch)
        for (int64_t m = 0; m < batch; ++m)
            for (int i = 0; i < kStep / 8; ++i) {
                const __m128i eight = _mm_shuffle_epi8(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + m * columns + k + 8 * i)), pairs);
                uint32_t* at = to + 4 * i * batch + m;
                at[0] = uint32_t(_mm_cvtsi128_si32(eight));
                at[batch] = uint32_t(_mm_extract_epi32(eight, 1));
                at[2 * batch] = uint32_t(_mm_extract_epi32(eight, 2));
                at[3 * batch] = uint32_t(_mm_extract_epi32(eight, 3));
            }
    return true;
}

// A cache line of each row, copied to lie side by side: rows that are a power of two apart share so few sets
// of the first cache that their lines would be gone before their second half is read.
constexpr int kLine = 64, kLineColumns = 2 * kLine;
struct Lines {
    alignas(64) uint8_t row[kRows][kLine];
};

inline void copy_line(const uint8_t* row, int64_t at, int64_t bytes, uint8_t* out) {
    if (at + kLine <= bytes) {
        _mm512_store_si512(out, _mm512_loadu_si512(row + at));
        // Beyond the row's end: the beginning of the row that comes in its place.
        const int64_t ahead = at + 2 * kLine, wrapped = ahead < bytes ? 0 : (kRows - 1) * bytes;
        _mm_prefetch(reinterpret_cast<const char*>(row + ahead + wrapped), _MM_HINT_T1);
    } else if (at < bytes) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + at)));
    }
}

inline __m512i four_rows(const uint8_t* line) {
    const auto at = [&](int i) { return _mm_load_si128(reinterpret_cast<const __m128i*>(line + i * kLine)); };
    __m512i result = _mm512_castsi128_si512(at(0));
    result = _mm512_inserti32x4(result, at(4), 1);
    result = _mm512_inserti32x4(result, at(8), 2);
    return _mm512_inserti32x4(result, at(12), 3);
}

// 32 columns of 16 rows, as 16 vectors of pairs, `stride` vectors apart.
inline void decode(const uint8_t* line, __m512i table, __m512i* out, int stride) {
    const __m512i a = four_rows(line), b = four_rows(line + kLine);
    const __m512i c = four_rows(line + 2 * kLine), d = four_rows(line + 3 * kLine);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    const __m512i words[4] = {_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
                              _mm512_unpacklo_epi64(ab_high, cd_high),
                              _mm512_unpackhi_epi64(ab_high, cd_high)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        out[(4 * i + 0) * stride] = _mm512_permutexvar_epi16(words[i], table);
        out[(4 * i + 1) * stride] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 4), table);
        out[(4 * i + 2) * stride] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 8), table);
        out[(4 * i + 3) * stride] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 12), table);
    }
}

// sums[m][row] += scale[row] * (values x), over `pairs` pairs of columns. `between(i)` runs after every
// kDecoded of them: work that the processor does beside the dot products, which keep only some of its ports
// busy.
template <int kCount, typename Between>
inline void multiply(const __m512i* values, int pairs, const uint32_t* x, int64_t batch, const __m512* scale,
                     float* sums, const Between& between) {
    __m512 part[kCount][kVectors];
    for (auto& row : part)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
    for (int begin = 0; begin < pairs; begin += kDecoded) {
        between(begin / kDecoded);
        for (int p = 0; p < kDecoded; ++p, x += batch, values += kVectors)
#pragma GCC unroll 8
            for (int m = 0; m < kCount; ++m) {
                const __m512bh pair = __m512bh(_mm512_set1_epi32(int(x[m])));
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v)
                    part[m][v] = _mm512_dpbf16_ps(part[m][v], __m512bh(values[v]), pair);
            }
    }
    for (int m = 0; m < kCount; ++m)
        for (int v = 0; v < kVectors; ++v) {
            float* sum = sums + m * kRows + 16 * v;
            _mm512_storeu_ps(sum, _mm512_fmadd_ps(part[m][v], scale[v], _mm512_loadu_ps(sum)));
        }
}

template <typename... Arguments>
inline void multiply_some(int64_t count, const Arguments&... arguments) {
    switch (count) {
        case 1:
            return multiply<1>(arguments...);
        case 2:
            return multiply<2>(arguments...);
        case 3:
            return multiply<3>(arguments...);
        case 4:
            return multiply<4>(arguments...);
        case 5:
            return multiply<5>(arguments...);
        case 6:
            return multiply<6>(arguments...);
        case 7:
            return multiply<7>(arguments...);
        default:
            return multiply<kInputRows>(arguments...);
    }
}

// The scale of each step of a row that begins with element `begin`, kRows apart. Its own loop: by
// `copy_scales` and a transposition scales took as long as the decoding of their values.
void spread_scales(const WeightView& weight, int64_t begin, int step, float* out) {
    const int64_t end = begin + weight.columns;
    if (weight.nested_absmax == nullptr) {
        const float* absmax = static_cast<const float*>(weight.absmax);
        for (int64_t at = begin; at < end; at += step, out += kRows) *out = absmax[at >> weight.shift];
        return;
    }
    const uint8_t* absmax = static_cast<const uint8_t*>(weight.absmax);
    const float offset = *weight.nested_offset;
    const int nested_shift = weight.shift + weight.nested_shift;
    const int64_t before = weight.first_block << weight.shift;  // values
    for (int64_t at = begin; at < end;) {
        const int64_t nested = (before + at) >> nested_shift;
        const int64_t stop = std::min(end, ((nested + 1) << nested_shift) - before);
        const float outer = weight.nested_absmax[nested];
#pragma GCC unroll 4
        for (; at < stop; at += step, out += kRows) {
            const float product = weight.nested_quant_map[absmax[at >> weight.shift]] * outer;
            *out = product + offset;
        }
    }
}

// `store_result` of kRows columns, of sums times `factor`.
void store_results(const LinearCall& args, int64_t n, int64_t rows, const float* sums, float factor) {
    for (int64_t first = 0; first < rows; first += 16, n += 16, sums += 16) {
        const __mmask16 stored = __mmask16(rows - first < 16 ? (1u << (rows - first)) - 1 : 0xffff);
        __m512 bias = _mm512_setzero_ps();
        if (args.bias != nullptr) {
            bias = from_bf16(_mm256_maskz_loadu_epi16(stored, static_cast<const uint16_t*>(args.bias) + n));
        }
        for (int64_t m = 0; m < args.batch; ++m) {
            const __m512 sum =
                _mm512_fmadd_ps(_mm512_loadu_ps(sums + m * kRows), _mm512_set1_ps(factor), bias);
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + m * args.weight.rows + n, stored,
                                     to_bf16(sum));
        }
    }
}

// first is a multiple of kRows.
void run(const LinearCall& args, int64_t first, int64_t last) {
    const WeightView& weight = args.weight;
    const Rounded& code = Rounded::made_of(weight.quant_map);
    const __m512i table = code.table;
    const int step = weight.shift < 6 ? kHalfStep : kStep;
    const int64_t columns = weight.columns, batch = args.batch;
    std::vector<float> sums(size_t(batch * kRows)), scales(size_t(columns / step * kRows));
    const int parts = step / kHalfStep * kVectors;
    Lines lines[3];                                       // that are decoded, that come next, that are copied
    alignas(64) __m512i values[2][kStep / 2 * kVectors];  // of this step and of the next
    for (int64_t n = first; n < last; n += kRows) {
        const uint8_t* packed[kRows];
        for (int r = 0; r < kRows; ++r) {
            const int64_t row =
                n + r < weight.rows ? n + r : weight.rows - 1;  // the last one again, and not stored
            packed[r] = weight.codes + row * columns / 2;
            spread_scales(weight, row * columns, step, scales.data() + r);
        }
        std::fill(sums.begin(), sums.end(), 0.0f);
        // Part i of the columns from k on: one vector of rows, half a step.
        const auto decode_part = [&](int64_t k, int i, __m512i* out) {
            const int v = i % kVectors, half = i / kVectors;
            const uint8_t* line = lines[k / kLineColumns % 3].row[16 * v] + k % kLineColumns / 2 + half * 16;
            decode(line, table, out + half * 16 * kVectors + v, kVectors);
        };
        const auto copy_rows = [&](int64_t line, int begin, int end) {
            for (int r = begin; r < end; ++r)
                copy_line(packed[r], line * kLine, columns / 2, lines[line % 3].row[r]);
        };
        copy_rows(0, 0, kRows);
        copy_rows(1, 0, kRows);
        for (int i = 0; i < parts; ++i) decode_part(0, i, values[0]);
        for (int64_t k = 0; k < columns; k += step) {
            __m512i *now = values[k / step % 2], *next = values[(k / step + 1) % 2];
            const bool more = k + step < columns;
            const float* scale = scales.data() + k / step * kRows;
            const __m512 factor[kVectors] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + 16)};
            const uint32_t* x = static_cast<const uint32_t*>(args.x) + k / 2 * batch;
            multiply_some(std::min<int64_t>(batch, kInputRows), now, step / 2, x, batch, factor, sums.data(),
                          [&](int i) {
                              const int done =
                                  int(k % kLineColumns / kHalfStep) * kVectors + i;  // of 8 for each line
                              copy_rows(k / kLineColumns + 2, 4 * done, 4 * done + 4);
                              if (more) decode_part(k + step, i, next);
                          });
            for (int64_t m = kInputRows; m < batch; m += kInputRows)
                multiply_some(std::min<int64_t>(batch - m, kInputRows), now, step / 2, x + m, batch, factor,
                              sums.data() + m * kRows, [](int) {});
        }
        store_results(args, n, std::min<int64_t>(last - n, kRows), sums.data(), code.inverse);
    }
}

}  // namespace

// Measured on Zen 4, 4096 x 4096: for fewer rows of x, unpacking 32 rows of W into bf16 costs more than products
// of fp32.
void fill_avx512bf16(LinearKernels& kernels) {
    kernels.dots = LinearDots::kernel();
    kernels.integers.max_batch[int(Dtype::kBFloat16)] =
        0;  // dot products of bf16 are faster, for many rows as well
    kernels.tile = {.granule = kRows,
                    .min_batch = 3,
                    .max_batch = {0, 0, kTileBatch},
                    .column_multiple = kStep,
                    .arranged_bytes = arranged_bytes,
                    .arrange = arrange,
                    .run = run};
}

}  // namespace nf4
}  // namespace peftcore

// Shared by the kernels of AVX-512: addresses of results, the bias, and the rounding.
#pragma once

#include <cstring>

#include "common/avx512.h"
#include "common/integers.h"
#include "gemm/cpu/kernels.h"

namespace peftcore {
namespace gemm {
namespace {

inline __mmask32 columns_there(const Product& product, int64_t column) {
    const int64_t left = product.columns - column;
    return left < kTileColumns ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
}

// The bias of a tile's columns, in the tile's order of columns.
struct Bias {
    __m512 first, second;
};

inline Bias bias_of(const Product& product, int64_t column) {
    if (product.bias == nullptr) return {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512i values =
        _mm512_maskz_loadu_epi16(columns_there(product, column), bf16_bias(product) + column);
    if (product.right.even_odd)
        return {_mm512_castsi512_ps(_mm512_slli_epi32(values, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32(int(0xffff0000))))};
    return {from_bf16(_mm512_castsi512_si256(values)), from_bf16(_mm512_extracti64x4_epi64(values, 1))};
}

// Bits of a tile's columns: 0, 2, .. 30 in the first, 1, 3, .. 31 in the second, or in order.
struct TileBits {
    __mmask16 first, second;
};

inline TileBits bits_of(bool even_odd, const uint8_t* keep) {
    uint32_t bits;
    std::memcpy(&bits, keep, sizeof bits);
    if (!even_odd) return {__mmask16(bits), __mmask16(bits >> 16)};
    const __m512i lanes = _mm512_movm_epi16(bits);
    return {_mm512_test_epi32_mask(lanes, _mm512_set1_epi32(0xffff)),
            _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(int(0xffff0000)))};
}

// Rounded by the processor, which flushes subnormals as in the products.
inline __m512i rounded(const Product& product, __m512 first, __m512 second) {
    const __m512i pair = __m512i(_mm512_cvtne2ps_pbh(second, first));
    if (!product.right.even_odd) return pair;
    alignas(64) static const uint16_t kInterleaved[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                          21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                          11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), pair);
}

// Sums of a tile's columns in one row.
inline void store_row(const Product& product, int64_t row, int64_t column, const Bias& bias, __m512 first,
                      __m512 second) {
    _mm512_mask_storeu_epi16(
        bf16_result(product, row) + column, columns_there(product, column),
        rounded(product, _mm512_add_ps(first, bias.first), _mm512_add_ps(second, bias.second)));
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore

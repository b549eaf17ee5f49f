// 4-bit blockwise formats (NF4, FP4 or any 16-entry codebook; MXFP4), shared by host and device.
//
//   a[b]    = max |x[i]| over the block, i / blocksize == b, of the flattened tensor
//   q[i]    = the codebook entry nearest to x[i] / a[b]; of two equally near ones the smaller value
//   byte[j] = q[2j] << 4 | q[2j + 1]
//   y[i]    = round(quant_map[q[i]] * a[b]), the product in fp32, rounded once
//
// Double quantization stores a[b] itself in 8 bits:
//   a[b]    = nested_quant_map[s[b]] * nested_absmax[b / nested_blocksize] + nested_offset
//             product and sum rounded to fp32
//
// Source: QLoRA (arXiv 2305.14314, section 3). Details that make the bits equal to bitsandbytes 0.50:
//   - the scale is max(a, 1e-38); a full block multiplies by its fp32 reciprocal, the partial block at the
//     end divides by it and stores the raised value as its absmax;
//   - thresholds are fp32 midpoints of neighbouring entries, compared with a strict >;
//   - a NaN takes the highest entry, and makes its block's absmax NaN; an infinity makes it infinite;
//   - the unused nibble after an odd count holds the code of zero.
//
// MXFP4 (OCP Microscaling Formats 1.0) has E2M1 codes, blocks of 32 and scales that are powers of two:
//   e[b]    = floor(log2(max |x[i]|)) - 2, at least -127, stored as e[b] + 127; 255 if a value is not finite
//   q[i]    = x[i] / 2^e[b] rounded to the nearest entry, of two equally near ones to the even code; at most 6
//
// What differs between formats is a policy: a codebook with thresholds, and how the scale of a block follows from its
// largest magnitude. Reading has the policies of weight/view.h.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/half.h"
#include "common/integers.h"

namespace peftcore {
namespace quant4 {

using peftcore::Dtype, peftcore::log2_of;  // for the launchers, which are outside this namespace

constexpr float kSmallestScale = 1e-38f;

// A codebook prepared for encoding: `order[k]` is the code of the k-th smallest entry (equal entries in code
// order), `threshold[k]` the midpoint of entries k and k + 1 of that order.
struct Codebook {
    float value[16];
    float threshold[15];
    uint8_t order[16];
};

static PEFTCORE_HD Codebook make_codebook(const float* quant_map) {
    Codebook book;
    for (int i = 0; i < 16; ++i) {
        int rank = 0;
        for (int j = 0; j < 16; ++j)
            rank += quant_map[j] < quant_map[i] || (quant_map[j] == quant_map[i] && j < i);
        book.value[i] = quant_map[i];
        book.order[rank] = uint8_t(i);
    }
    for (int k = 0; k < 15; ++k)
        book.threshold[k] = (quant_map[book.order[k]] + quant_map[book.order[k + 1]]) / 2;
    return book;
}

namespace {

// Policy of NF4 and FP4: the scale is the largest magnitude, as fp32.
struct AbsmaxFormat {
    using Scale = float;
    static constexpr bool kHasPartialBlocks = true;

    // `bits`: the largest magnitude's. The scale as it is stored, and what values are multiplied by.
    static PEFTCORE_HD Scale scale(uint32_t bits) { return bits_float(bits); }
    static PEFTCORE_HD float inverse(Scale scale) {
        return 1.0f / (scale < kSmallestScale ? kSmallestScale : scale);
    }
};

// Policy of MXFP4: the scale is a power of two, as E8M0.
struct PowerOfTwoFormat {
    using Scale = uint8_t;
    static constexpr bool kHasPartialBlocks = false;
    static constexpr int kLargestExponent = 2;  // of an entry: 4 = 2^2, and 6 is below the next power

    static PEFTCORE_HD Scale scale(uint32_t bits) {
        const uint32_t exponent = bits >> 23;
        if (exponent == 255) return 255;
        return exponent < kLargestExponent ? 0 : Scale(exponent - kLargestExponent);
    }
    // 2^(127 - e): exact, as is the product unless it is subnormal. Blocks that are not finite have any codes.
    static PEFTCORE_HD float inverse(Scale e) {
        return e == 255 ? 1.0f : bits_float(uint32_t(254 - e) << 23);
    }

    // The 16 entries in the order of their codes: sign, two bits of exponent, one of mantissa.
    static PEFTCORE_HD Codebook codebook() {
        const float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
        Codebook book;
        for (int i = 0; i < 8; ++i) {
            book.value[i] = magnitudes[i];
            book.value[8 + i] = -magnitudes[i];
            book.order[7 - i] = uint8_t(8 + i);
            book.order[8 + i] = uint8_t(i);
        }
        // A value on a threshold takes the lower entry. Where that is the odd code, the threshold moves below it.
        for (int k = 0; k < 15; ++k) {
            const uint8_t lower = book.order[k];
            const float middle = (book.value[lower] + book.value[book.order[k + 1]]) / 2;
            const uint32_t bits = float_bits(middle);
            book.threshold[k] = lower % 2 == 0 ? middle : bits_float(middle > 0 ? bits - 1 : bits + 1);
        }
        book.threshold[7] = -1.17549435e-38f;  // between -0 and 0, which is not above it
        return book;
    }
};

}  // namespace

// The code of a value already divided by its scale.
static PEFTCORE_HD uint8_t encode(float scaled, const Codebook& book) {
    int rank = 0;
    for (int k = 0; k < 15; ++k) rank += !(scaled <= book.threshold[k]);  // true for NaN
    return book.order[rank];
}

}  // namespace quant4
}  // namespace peftcore

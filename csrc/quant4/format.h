// 4-bit blockwise format (NF4, FP4 or any 16-entry codebook), shared by host and device.
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

// The code of a value already divided by its scale.
static PEFTCORE_HD uint8_t encode(float scaled, const Codebook& book) {
    int rank = 0;
    for (int k = 0; k < 15; ++k) rank += !(scaled <= book.threshold[k]);  // true for NaN
    return book.order[rank];
}

}  // namespace quant4
}  // namespace peftcore

// Unpacking of a matrix into tiles by NEON.
#pragma once

#include "common/neon.h"
#include "gemm/cpu/product.h"

namespace peftcore {
namespace gemm {
namespace {

// Four pairs of each of four rows, as four of each pair, `kTileColumns` words apart; the first `pairs` of them.
inline void transpose(const uint16x8_t (&rows)[4], int64_t pairs, uint32_t* out) {
    uint32x4_t row[4];
    for (int i = 0; i < 4; ++i) row[i] = vreinterpretq_u32_u16(rows[i]);
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(row[0], row[1])),
                     b = vreinterpretq_u64_u32(vtrn2q_u32(row[0], row[1])),
                     c = vreinterpretq_u64_u32(vtrn1q_u32(row[2], row[3])),
                     d = vreinterpretq_u64_u32(vtrn2q_u32(row[2], row[3]));
    const uint64x2_t of[4] = {vtrn1q_u64(a, c), vtrn1q_u64(b, d), vtrn2q_u64(a, c), vtrn2q_u64(b, d)};
    for (int64_t p = 0; p < pairs; ++p) vst1q_u32(out + p * kTileColumns, vreinterpretq_u32_u64(of[p]));
}

// Eight columns of two rows as pairs.
inline void store_pairs(uint16x8_t above, uint16x8_t below, uint32_t* out) {
    vst1q_u32(out, vreinterpretq_u32_u16(vzip1q_u16(above, below)));
    vst1q_u32(out + 4, vreinterpretq_u32_u16(vzip2q_u16(above, below)));
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore

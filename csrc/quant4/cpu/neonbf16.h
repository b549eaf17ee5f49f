// Values of 4-bit codes in bf16, each rounded once: code[index] times scale.
#pragma once

#include "common/neon.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {
namespace {

// The codebook's values in a block of a weight.
inline ShortTable scaled(const WeightView& weight, int64_t block) {
    float entries[16];
    const float* code = weight.quant_map;
    if (weight.zeros != nullptr) {
        block_entries(weight, block, entries);
        code = entries;
    }
    const float scale = block_scale(weight, block);
    const auto eight = [&](const float* from) {
        const EightFloats values = load_eight(from);
        const BFloat16* as = nullptr;
        return vcombine_u16(rounded(vmulq_n_f32(values.low, scale), as),
                            rounded(vmulq_n_f32(values.high, scale), as));
    };
    return {eight(code), eight(code + 8)};
}

// 32 values in order.
struct Decoded {
    uint16x8_t of[4];
};

inline Decoded decoded(const uint8_t* packed, const ShortTable& table) {
    const uint8x16x2_t index = nibbles(vld1q_u8(packed));
    const uint16x8x2_t first = table(index.val[0]), second = table(index.val[1]);
    return {{first.val[0], first.val[1], second.val[0], second.val[1]}};
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore

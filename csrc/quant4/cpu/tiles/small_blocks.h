// Scales of blocks of 16 (NVFP4's nested ones) by their bytes, as tables that are made once for a weight.
#pragma once

#include <cstring>

#include "quant4/cpu/linear/byte_scales.h"

namespace peftcore {
namespace quant4 {
namespace {

// All that the values of a block depend on but its byte and codes.
struct SmallKey {
    float nested_map[256], outer, offset, quant_map[16];
};

static inline bool has_small_blocks(const WeightView& weight) { return weight.shift == kSmallShift; }

// Fp32 scales by byte: the same bits as `block_scale`.
struct ScaleTable {
    using Key = SmallKey;

    explicit ScaleTable(const float* key) {
        Key parts;
        std::memcpy(&parts, key, sizeof parts);
        std::memcpy(of, key, sizeof of);
        for (int i = 0; i < 256; ++i) {
            const float product = parts.nested_map[i] * parts.outer;
            scale[i] = product + parts.offset;
        }
    }

    float scale[256];
    float of[sizeof(Key) / sizeof(float)];
};

// The table of a weight; nullptr if blocks from that of element `first` to that of element `last` have different scales
// of their own. Valid as made_of_code says.
template <typename Table>
const Table* table_of(const WeightView& weight, int64_t first, int64_t last) {
    const int64_t begin = (weight.first_block + (first >> weight.shift)) >> weight.nested_shift,
                  end = (weight.first_block + (last >> weight.shift)) >> weight.nested_shift;
    SmallKey key;
    key.outer = weight.nested_absmax[begin];
    for (int64_t i = begin + 1; i <= end; ++i)
        if (weight.nested_absmax[i] != key.outer) return nullptr;
    std::memcpy(key.nested_map, weight.nested_quant_map, sizeof key.nested_map);
    key.offset = *weight.nested_offset;
    std::memcpy(key.quant_map, weight.quant_map, sizeof key.quant_map);
    return &made_of_code<Table>(key.nested_map);
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore

// Memory regions that tiles of a weight are unpacked from.
#pragma once

#include "common/integers.h"
#include "gemm/cpu/product.h"
#include "weight/view.h"

namespace peftcore {
namespace gemm {
namespace {

inline Region region(const WeightView& weight, Range rows, Range columns) {
    const bool packed = weight.dense == nullptr;
    const auto bytes = [&](int64_t count) { return packed ? count / 2 : count * weight.itemsize; };
    const int64_t row = bytes(weight.columns);
    const void* values = packed ? weight.codes : weight.dense;
    return {.first = static_cast<const char*>(values) + rows.first * row + bytes(columns.first),
            .rows = least(rows.last, weight.rows) - rows.first,
            .bytes = bytes(least(columns.last, weight.columns) - columns.first),
            .stride = row};
}

// `Tiles::region` of the transposed weight, and of the weight.
inline Region region_transposed(const void* source, int64_t column, int tiles, int64_t first, int64_t last) {
    return region(*static_cast<const WeightView*>(source), {column, column + tiles * kTileColumns},
                  {first, last});
}

inline Region region_plain(const void* source, int64_t column, int tiles, int64_t first, int64_t last) {
    return region(*static_cast<const WeightView*>(source), {first, last},
                  {column, column + tiles * kTileColumns});
}

}  // namespace
}  // namespace gemm
}  // namespace peftcore

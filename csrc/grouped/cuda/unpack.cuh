// Unpacking of a stage of an expert's weight from 4 bits into a tile in shared memory: code * scale in fp32, rounded
// once to T, the same bits as dequantization.
#pragma once

#include "lora/cuda/tiles.cuh"
#include "quant4/cuda/block_scale.cuh"

namespace peftcore {
namespace grouped {
namespace {

using lora::kThreads;

// Position of a stage in the stored weight.
struct Position {
    int64_t row, column;
};

// Fetches the codes of a stage in pieces of 16 bytes, 32 codes each; codes out of range are zero.
template <typename Tile>
__device__ __forceinline__ void fetch_codes(uint8_t* to, const WeightView& weight, const Position& position) {
    constexpr int kPieces = Tile::kColumns / 32;  // of a row
    for (int i = threadIdx.x; i < Tile::kRows * kPieces; i += kThreads) {
        const int64_t row = position.row + i / kPieces, column = position.column + i % kPieces * 32;
        const bool inside = row < weight.rows && column < weight.columns;
        const int64_t offset = inside ? (row * weight.columns + column) / 2 : 0;
        cp_async_16(to + i * 16, weight.codes + offset, inside ? 16 : 0);
    }
}

// Unpacks 16 codes at a time; a thread has kUnits such units of a stage.
template <typename Tile, typename Scales>
struct Unpacker {
    using T = typename Tile::Element;
    using Decoded = typename Scales::Decoded;
    static constexpr int kPerRow = Tile::kColumns / 16;
    static constexpr int kUnits = Tile::kRows * kPerRow / kThreads;
    static_assert(Tile::kRows * kPerRow % kThreads == 0, "");

    const WeightView& weight;
    const float* quant_map;
    Scales scales;
    bool vectors;  // 32 codes are in one row, 16-byte aligned, and 16 have one scale
    quant4::StoredScale scale[kUnits];

    __device__ Position position_of(int unit, const Position& position) const {
        const int i = int(threadIdx.x) + unit * kThreads;
        return {position.row + i / kPerRow, position.column + i % kPerRow * 16};
    }
    __device__ uint8_t* tile_unit(uint8_t* tile, int unit) const {
        const int i = int(threadIdx.x) + unit * kThreads;
        return tile + i / kPerRow * Tile::kPitch + i % kPerRow * 16 * int(sizeof(T));
    }
    __device__ bool inside(const Position& at_unit) const {
        return at_unit.row < weight.rows && at_unit.column < weight.columns;
    }

    // Begins to load the scales of a stage.
    __device__ void fetch_scales(const Position& position) {
        if (!vectors) return;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            const Position at_unit = position_of(unit, position);
            if (!inside(at_unit)) continue;
            const int64_t block = (at_unit.row * weight.columns + at_unit.column) >> weight.shift;
            scale[unit] = scales.stored(weight, block);
        }
    }

    __device__ void unpack(uint8_t* tile, const uint8_t* codes, const Position& position) const {
        if (!vectors) {
#pragma unroll 1
            for (int unit = 0; unit < kUnits; ++unit)
                one_by_one(tile_unit(tile, unit), position_of(unit, position));
            return;
        }
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            const int i = int(threadIdx.x) + unit * kThreads;
            uint8_t* to = tile_unit(tile, unit);
            const Position at_unit = position_of(unit, position);
            const bool there = inside(at_unit);
            const Decoded factor = there ? scales.of(weight, scale[unit]) : Decoded{};
            const uint2 bytes = *reinterpret_cast<const uint2*>(codes + i * 8);
            eight(to, bytes.x, factor, there);
            eight(to + 8 * sizeof(T), bytes.y, factor, there);
        }
    }

    __device__ void eight(uint8_t* to, uint32_t bytes, const Decoded& factor, bool there) const {
        uint32_t words[2 * sizeof(T)];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t byte = bytes >> 8 * i;
            if constexpr (sizeof(T) == 2) {
                words[i] = there ? quant4::value_pair<T>(quant_map, byte, factor) : 0;
            } else {
                words[i * 2] = there ? float_bits(factor.value(quant_map[byte >> 4 & 15])) : 0;
                words[i * 2 + 1] = there ? float_bits(factor.value(quant_map[byte & 15])) : 0;
            }
        }
#pragma unroll
        for (int i = 0; i < int(sizeof(T)) / 2; ++i)
            reinterpret_cast<uint4*>(to)[i] = {words[i * 4], words[i * 4 + 1], words[i * 4 + 2],
                                               words[i * 4 + 3]};
    }

    __device__ void one_by_one(uint8_t* to, const Position& at_unit) const {
#pragma unroll 1
        for (int i = 0; i < 16; ++i) {
            float value = 0;
            if (at_unit.row < weight.rows && at_unit.column + i < weight.columns) {
                const int64_t at = at_unit.row * weight.columns + at_unit.column + i,
                              block = at >> weight.shift;
                const uint8_t byte = weight.codes[at / 2];
                const Decoded factor = scales.of(weight, scales.stored(weight, block));
                value = factor.value(quant_map[at % 2 ? byte & 15 : byte >> 4]);
            }
            reinterpret_cast<T*>(to)[i] = from_float<T>(value);
        }
    }
};

}  // namespace
}  // namespace grouped
}  // namespace peftcore

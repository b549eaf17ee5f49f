// AMX: eight tile registers, each used at its full size of 16 rows by 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace peftcore {
namespace {

constexpr int64_t kSide = 16;         // rows of a tile, and 32-bit words in each
constexpr int kRowBytes = 4 * kSide;  // of a tile
constexpr int64_t kTileWords = kSide * kSide;

// Intel's palette 1.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Static: the compiler does not know that the instruction reads all of it.
const TileShapes kTileShapes;

// The compiler does not know that the instructions read and write this memory.
inline void memory_barrier_of_tiles() { asm volatile("" ::: "memory"); }

}  // namespace
}  // namespace peftcore

// Shared by the LoRA kernels: tiles of matrices in shared memory, dropout in them, and their mma fragments.
//
// A tile's rows are kColumns values and 8 more, which spread rows over the banks.
#pragma once

#include "common/alignment.h"
#include "common/cuda_launch.cuh"
#include "common/dropout.h"
#include "common/dtype.h"
#include "common/half.h"
#include "common/tensor_core.cuh"
#include "common/tf32.cuh"
#include "lora/cuda/lora_cuda.h"

namespace peftcore {
namespace lora {

using peftcore::Dtype;  // for the launchers, which are outside this namespace

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSharedBytes = 48 * 1024;  // of static shared memory that a block may have
constexpr int kRankChunk = 64;           // ranks that a block takes at most

template <typename Element_, int kRows_, int kColumns_>
struct Tile {
    using Element = Element_;
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr int kPitch = (kColumns + 8) * int(sizeof(Element));  // in bytes
    static constexpr int kBytes = kRows * kPitch;
    static constexpr int kPerPiece = 16 / int(sizeof(Element)), kPieces = kColumns / kPerPiece;  // of a row
};

// Number of a pipeline's stages that fit together with `other` bytes and 256 of the block's small arrays. No more than
// six: with those, the blocks of a multiprocessor wait for more bytes than memory delivers in its latency.
template <int stage_bytes, int other = 0>
constexpr int kStagesThatFit =
    (kSharedBytes - 256 - other) / stage_bytes > 6 ? 6 : (kSharedBytes - 256 - other) / stage_bytes;

// A matrix that tiles are read from; it may be part of a larger one.
template <typename Element>
struct Source {
    const Element* data;
    int64_t stride;
    bool vectors;  // rows are 16-byte aligned

    __device__ Source(const void* data, int64_t stride)
        : data(static_cast<const Element*>(data)),
          stride(stride),
          vectors(is_aligned(data) && stride * int(sizeof(Element)) % 16 == 0) {}
};

// Begins to fetch the tile at (row, column); values at or beyond `rows` and `columns` are zero.
template <typename Tile, typename Element>
__device__ __forceinline__ void fetch(uint8_t* tile, const Source<Element>& source, int64_t row, int64_t rows,
                                      int64_t column, int64_t columns) {
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kPieces; i += kThreads) {
        const int r = i / Tile::kPieces, piece = i % Tile::kPieces;
        const int64_t k = column + piece * Tile::kPerPiece;
        const int64_t beyond = row + r < rows ? columns - k : 0;
        const int count = beyond < 0 ? 0 : beyond < Tile::kPerPiece ? int(beyond) : Tile::kPerPiece;
        const Element* from = count ? source.data + (row + r) * source.stride + k : source.data;
        uint8_t* to = tile + r * Tile::kPitch + piece * 16;
        if (source.vectors) {
            cp_async_16(to, from, count * int(sizeof(Element)));
        } else {
            union {
                uint4 vector;
                Element items[Tile::kPerPiece];
            } values;
#pragma unroll
            for (int e = 0; e < Tile::kPerPiece; ++e) values.items[e] = e < count ? from[e] : Element{};
            *reinterpret_cast<uint4*>(to) = values.vector;
        }
    }
}

// Mask of a word: all ones for each of its two values that is kept.
__device__ __forceinline__ uint32_t keep_pair(uint32_t random, uint32_t threshold) {
    return ((random & 0xffffu) >= threshold ? 0xffffu : 0u) | (random >> 16 >= threshold ? 0xffff0000u : 0u);
}

__device__ __forceinline__ uint4 keep_eight(uint4 values, const Dropout& dropout, int64_t row,
                                            int64_t columns_over_8) {
    const PhiloxWords words = dropout_words(dropout, row, columns_over_8);
    values.x &= keep_pair(words.word[0], dropout.threshold);
    values.y &= keep_pair(words.word[1], dropout.threshold);
    values.z &= keep_pair(words.word[2], dropout.threshold);
    values.w &= keep_pair(words.word[3], dropout.threshold);
    return values;
}

// Mask of four fp32 values, which take half of a counter.
__device__ __forceinline__ uint4 keep_four(uint4 values, const Dropout& dropout, int64_t row,
                                           int64_t columns_over_4) {
    const PhiloxWords words = dropout_words(dropout, row, columns_over_4 / 2);
    const bool odd = columns_over_4 % 2;
    const uint32_t random[2] = {odd ? words.word[2] : words.word[0], odd ? words.word[3] : words.word[1]};
    const auto mask = [&](int i) {
        return (random[i / 2] >> 16 * (i % 2) & 0xffffu) >= dropout.threshold ? ~0u : 0u;
    };
    return {values.x & mask(0), values.y & mask(1), values.z & mask(2), values.w & mask(3)};
}

// Dropout in a tile at (row, column). Each thread takes the pieces that it fetched, so that waiting for its copies is
// enough.
template <typename Tile>
__device__ __forceinline__ void drop(uint8_t* tile, const Dropout& dropout, int64_t row, int64_t rows,
                                     int64_t column) {
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kPieces; i += kThreads) {
        const int r = i / Tile::kPieces, piece = i % Tile::kPieces;
        if (row + r >= rows) break;
        uint4* values = reinterpret_cast<uint4*>(tile + r * Tile::kPitch + piece * 16);
        if constexpr (sizeof(typename Tile::Element) == 2)
            *values = keep_eight(*values, dropout, row + r, column / kColumnsPerCounter + piece);
        else
            *values = keep_four(*values, dropout, row + r, column / 4 + piece);
    }
}

// The left operand of products, of 16-bit values or of fp32.
template <typename T>
struct LeftOperand {
    using type = uint32_t[4];
};
template <>
struct LeftOperand<float> {
    using type = Tf32Left;
};
template <typename T>
using Left = typename LeftOperand<T>::type;

// The 16 x 16 left operand of an mma at (row, column).
template <typename Tile>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const uint8_t* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(a, tile + (row + lane % 16) * Tile::kPitch + (column + lane / 16 * 8) * 2);
}
template <typename Tile>
__device__ __forceinline__ void load_left(Tf32Left& a, const uint8_t* tile, int row, int column) {
    const int group = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint8_t* from = tile + (row + group + i % 2 * 8) * Tile::kPitch;
        a.piece[i / 2][i % 2] =
            tf32_pieces(*reinterpret_cast<const float*>(from + (column + tf32_inner(i / 2)) * 4));
    }
}

// Of a tile that has the operand's columns as rows: its 16 rows from `column` on, the sum from `row` on.
template <typename Tile>
__device__ __forceinline__ void load_left_across(uint32_t (&a)[4], const uint8_t* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(
        a, tile + (row + lane / 16 * 8 + lane % 8) * Tile::kPitch + (column + lane / 8 % 2 * 8) * 2);
}
template <typename Tile>
__device__ __forceinline__ void load_left_across(Tf32Left& a, const uint8_t* tile, int row, int column) {
    const int group = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint8_t* from = tile + (row + tf32_inner(i / 2)) * Tile::kPitch;
        a.piece[i / 2][i % 2] =
            tf32_pieces(*reinterpret_cast<const float*>(from + (column + group + i % 2 * 8) * 4));
    }
}

// Right operands of some products, of a tile of fp32 that has the 8 columns of each from `column` on as rows,
// its values along the sum; or, kAcross, as columns.
template <typename Tile, bool kAcross = false, int kProducts>
__device__ __forceinline__ void load_right(Tf32Right (&b)[kProducts], const uint8_t* tile, int column,
                                           int inner) {
    const int group = threadIdx.x % 32 / 4;
#pragma unroll
    for (int j = 0; j < kProducts; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int outer = column + j * 8 + group, along = inner + tf32_inner(i);
            const int row = kAcross ? along : outer, place = kAcross ? outer : along;
            b[j].piece[i] =
                tf32_pieces(*reinterpret_cast<const float*>(tile + row * Tile::kPitch + place * 4));
        }
}

// d += the products of 16 columns.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const Left<T>& left, const Tf32Right& right) {
    if constexpr (sizeof(T) == 2)
        tf32_multiply<T>(d, left, right);
    else
        tf32_multiply(d, left, right);
}

// Adapters of one launch, passed by value; launchers loop over more.
constexpr int kMaxAdapters = 64;

struct Adapters {
    const float* factor[kMaxAdapters];
    float scale[kMaxAdapters];
    int rank[kMaxAdapters];
    int first, count, total;  // of all, those in this launch
};

inline Adapters adapters_from(int first, const Factors& factors) {
    Adapters adapters = {};
    adapters.first = first;
    adapters.total = factors.count;
    adapters.count = factors.count - first < kMaxAdapters ? factors.count - first : kMaxAdapters;
    for (int i = 0; i < adapters.count; ++i) {
        adapters.factor[i] = factors.values[first + i];
        adapters.rank[i] = factors.ranks[first + i];
        adapters.scale[i] = factors.scales != nullptr ? factors.scales[first + i] : 1;
    }
    return adapters;
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

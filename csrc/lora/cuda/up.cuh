// A block's 64 x 64 values of out = bias + keep ∘ (thin Fᵀ), or of that added to out: on tensor cores, a warp 16 rows of
// them, and through shared memory, so that a thread has the eight columns of one Philox call and of 16-byte stores.
#pragma once

#include "common/cuda_stages.cuh"
#include "common/typed.cuh"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kTileSide = 64;

struct UpTile {
    int64_t row, last_row;    // of thin and out, as dropout counts them
    int64_t column, columns;  // of out
    const float* thin;
    int stride;           // of thin
    const float* factor;  // F [columns, rank]
    int rank;
    bool missing;  // there is no such F: NaN
    Dropout dropout;
    const void* bias;  // [columns], or nullptr
    bool add;
    void* out;
};

// Eight values of out, or fewer at its edge.
template <typename T>
__device__ __forceinline__ void store_eight(const UpTile& p, const float* values, const Dropout& dropout,
                                            int64_t row, int64_t column, bool vectors) {
    const int64_t left = p.columns - column;
    T* out = static_cast<T*>(p.out) + row * p.columns + column;
    const T* bias = p.bias != nullptr ? static_cast<const T*>(p.bias) + column : nullptr;
    PhiloxWords words = {};
    if (dropout.threshold != 0) words = dropout_words(dropout, row, column / kColumnsPerCounter);
    Vector<T, 8> result = {};
    if (p.add && vectors) result = load_vector<8>(out);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i >= left) break;
        float sum = keeps(words, i, dropout.threshold) ? values[i] : 0;
        if (bias != nullptr) sum += to_float(bias[i]);
        if (p.add) sum += to_float(vectors ? result.item[i] : out[i]);
        result.item[i] = from_float<T>(sum);
    }
    if (vectors) return store_vector(out, result);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < left) out[i] = result.item[i];
}

template <typename T>
__device__ void up_tile(const UpTile& p) {
    using Thin = Tile<float, kTileSide, kRankChunk>;
    using Factor = Thin;
    using Result = Tile<float, kTileSide, kTileSide>;
    constexpr int kBytes =
        Thin::kBytes + Factor::kBytes > Result::kBytes ? Thin::kBytes + Factor::kBytes : Result::kBytes;
    PEFTCORE_SHARED(uint8_t, memory, [kBytes]);
    const Source<float> thin(p.thin, p.stride), factor(p.factor, p.rank);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[kTileSide / 8][4] = {};
    const auto fetch_chunk = [&](int64_t first) {
        fetch<Thin>(memory, thin, p.row, p.last_row, first, p.rank);
        fetch<Factor>(memory + Thin::kBytes, factor, p.column, p.columns, first, p.rank);
    };
    for_stages_in_turn(0, p.rank, kRankChunk, fetch_chunk, [&](int64_t first) {
        if (p.row + warp * 16 >= p.last_row) return;
#pragma unroll
        for (int step = 0; step < kRankChunk; step += 16) {
            if (first + step >= p.rank) break;
            Tf32Left left;
            load_left<Thin>(left, memory, warp * 16, step);
#pragma unroll
            for (int t = 0; t < kTileSide / 8; t += 2) {
                Tf32Right right[2];
                load_right<Factor>(right, memory + Thin::kBytes, t * 8, step);
                tf32_multiply(d[t], left, right[0]);
                tf32_multiply(d[t + 1], left, right[1]);
            }
        }
    });

    constexpr int kPitch = Result::kPitch / 4;
    float* result = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int t = 0; t < kTileSide / 8; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            result[(warp * 16 + lane / 4 + i / 2 * 8) * kPitch + t * 8 + lane % 4 * 2 + i % 2] =
                p.missing ? bits_float(0x7fc00000u) : d[t][i];
    __syncthreads();
    const bool vectors = is_aligned(p.out) && p.columns % 8 == 0;
    const Dropout dropout = with_key(p.dropout);
    for (int i = threadIdx.x; i < kTileSide * kTileSide / 8; i += kThreads) {
        const int r = i / (kTileSide / 8), first = i % (kTileSide / 8) * 8;
        if (p.row + r >= p.last_row || p.column + first >= p.columns) continue;
        store_eight<T>(p, result + r * kPitch + first, dropout, p.row + r, p.column + first, vectors);
    }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

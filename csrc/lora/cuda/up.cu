// out = keep ∘ (bias + thin Fᵀ), or added to out: T A with the dropout of x, and S Bᵀ, with per-sample adapters, too.
// Written for bandwidth and tested on the emulator; not measured on a GPU.
//
// A block computes 64 x 64 values on tensor cores, a warp 16 rows of them, and passes them through shared
// memory, so that a thread has the eight columns of one Philox call and of a 16-byte store.
#include "common/cuda_dispatch.cuh"
#include "common/cuda_stages.cuh"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kTileSide = 64;

struct UpParams {
    const float* thin;
    int64_t rows, columns;  // of a sample's out
    const int64_t* index;
    Adapters adapters;
    int stride;  // of thin
    int64_t column_tiles;
    Dropout dropout;
    const void* bias;
    bool add;
    void* out;
};

// Eight values of out, or fewer at its edge.
template <typename T>
__device__ __forceinline__ void store_eight(T* out, const float* values, const T* bias, int count,
                                            bool vector, bool add, const Dropout& dropout, int64_t row,
                                            int64_t column) {
    union {
        uint4 vector;
        T items[8];
    } before, after;
    if (add) {
        if (vector) {
            before.vector = *reinterpret_cast<const uint4*>(out);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) before.items[i] = i < count ? out[i] : T{};
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float base = add                            ? to_float(before.items[i])
                           : bias != nullptr && i < count ? to_float(bias[i])
                                                          : 0;
        after.items[i] = from_float<T>(base + values[i]);
    }
    if (dropout.threshold != 0)
        after.vector = keep_eight(after.vector, dropout, row, column / kColumnsPerCounter);
    if (vector) {
        *reinterpret_cast<uint4*>(out) = after.vector;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) out[i] = after.items[i];
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) up_kernel(const UpParams p) {
    using Thin = Tile<float, kTileSide, kRankChunk>;
    using Factor = Thin;
    using Result = Tile<float, kTileSide, kTileSide>;
    constexpr int kBytes =
        Thin::kBytes + Factor::kBytes > Result::kBytes ? Thin::kBytes + Factor::kBytes : Result::kBytes;
    PEFTCORE_SHARED(uint8_t, memory, [kBytes]);

    const int64_t row_tiles = (p.rows + kTileSide - 1) / kTileSide;
    const int64_t tile = blockIdx.x / p.column_tiles, sample = tile / row_tiles;
    const int64_t row = sample * p.rows + tile % row_tiles * kTileSide, last_row = (sample + 1) * p.rows;
    const int64_t column = blockIdx.x % p.column_tiles * kTileSide;
    const int64_t wanted = p.index != nullptr ? p.index[sample] : 0;
    const bool none = wanted < -1 || wanted >= p.adapters.total;  // no such adapter: NaN, to be noticed
    const int64_t adapter = wanted - p.adapters.first;
    if (none ? p.adapters.first != 0 : adapter < 0 || adapter >= p.adapters.count) return;
    const int rank = none ? 0 : p.adapters.rank[adapter];
    const Source<float> thin(p.thin, p.stride);
    const Source<float> factor(none ? nullptr : p.adapters.factor[adapter], rank);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[kTileSide / 8][4] = {};
    const auto fetch_chunk = [&](int64_t first) {
        fetch<Thin>(memory, thin, row, last_row, first, rank);
        fetch<Factor>(memory + Thin::kBytes, factor, column, p.columns, first, rank);
    };
    for_stages_in_turn(0, rank, kRankChunk, fetch_chunk, [&](int64_t first) {
        if (row + warp * 16 >= last_row) return;
#pragma unroll
        for (int step = 0; step < kRankChunk; step += 16) {
            if (first + step >= rank) break;
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
                none ? bits_float(0x7fc00000u) : d[t][i];
    __syncthreads();
    const bool vectors = is_aligned(p.out) && p.columns % 8 == 0;
    const Dropout dropout = with_key(p.dropout);
    for (int i = threadIdx.x; i < kTileSide * kTileSide / 8; i += kThreads) {
        const int r = i / (kTileSide / 8), first = i % (kTileSide / 8) * 8;
        const int64_t left = p.columns - column - first;
        if (row + r >= last_row || left <= 0) continue;
        T* out = static_cast<T*>(p.out) + (row + r) * p.columns + column + first;
        const T* bias = p.bias != nullptr ? static_cast<const T*>(p.bias) + column + first : nullptr;
        store_eight<T>(out, result + r * kPitch + first, bias, left < 8 ? int(left) : 8, vectors, p.add,
                       dropout, row + r, column + first);
    }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" const char* peftcore_lora_up(const float* thin, const peftcore::lora::Factors* factors,
                                        const peftcore::lora::Dropout* dropout, const void* bias, bool add,
                                        const peftcore::lora::Wide* out, void* stream) {
    using namespace peftcore::lora;
    if (out->samples == 0 || out->rows == 0 || out->columns == 0) return nullptr;
    if (out->dtype == Dtype::kFloat) return "out must have 16 bits";
    UpParams p = {};
    p.thin = thin;
    p.rows = out->rows;
    p.columns = out->columns;
    p.index = factors->index;
    p.stride = factors->stride;
    p.column_tiles = (p.columns + kTileSide - 1) / kTileSide;
    p.dropout = *dropout;
    p.bias = bias;
    p.add = add;
    p.out = out->values;
    const int64_t blocks = out->samples * ((p.rows + kTileSide - 1) / kTileSide) * p.column_tiles;
    for (int first = 0; first == 0 || first < factors->count; first += kMaxAdapters) {
        p.adapters = adapters_from(first, *factors);
        const char* error = peftcore::dispatch_16_bits(out->dtype, [&](auto type) {
            return PEFTCORE_LAUNCH(up_kernel<typename decltype(type)::type>, blocks, kThreads, 0, stream, p);
        });
        if (error != nullptr) return error;
    }
    return nullptr;
}

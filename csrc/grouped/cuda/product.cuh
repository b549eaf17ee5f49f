// out = keep ∘ (thin Fᵀ) + wide W + bias for rows sorted by expert: y, including S Bᵀ, or dx, including T A. Written
// for bandwidth and tensor cores and tested on the emulator; not measured on a GPU.
//
// A block takes 16, 64 or 128 rows of one expert and 64 columns; blocks of the same rows have consecutive indices, so
// that they find these rows, and then the expert's weight, in L2. The low-rank product comes first, so that dropout
// applies to it alone; the base's product is added to its sums, and the result is rounded once. Both operands arrive by
// cp.async in stages, several of them pending at a time. A weight in 4 bits arrives as it is stored, its scales in
// registers, and is unpacked in shared memory (unpack.cuh).
//
// fp16 and bf16 are multiplied directly, fp32 as in common/tf32.cuh.
#pragma once

#include "common/cuda_dispatch.cuh"
#include "common/cuda_stages.cuh"
#include "grouped/cuda/groups.cuh"
#include "grouped/cuda/unpack.cuh"

namespace peftcore {
namespace grouped {
namespace {

using lora::Source, lora::Tile;

constexpr int kColumns = 64;
constexpr int kRankStage = 32;

// kRowTiles: tiles of 16 rows. kPacked: W is in 4 bits; kZeros: and affine. kAcross: it is stored as [inner, columns].
template <typename T, int kRowTiles, bool kPacked_, bool kZeros, bool kAcross_>
struct Shape {
    static constexpr bool kPacked = kPacked_, kAcross = kAcross_;
    static constexpr int kRows = 16 * kRowTiles;
    // With few rows, memory is the limit: more copies are pending.
    static constexpr int kStage = kRowTiles > 1 ? 32 : sizeof(T) == 2 ? 128 : 64;
    using Input = Tile<T, kRows, kStage>;
    using Frozen = Tile<T, kAcross ? kStage : kColumns, kAcross ? kColumns : kStage>;
    using Scales =
        std::conditional_t<kZeros, quant4::KnownScales<ScaleKind::kAffine>, quant4::AnyScales<false>>;
    static constexpr int kCodeBytes = kPacked ? kStage * kColumns / 2 : 0;
    static constexpr int kStageBytes = Input::kBytes + (kPacked ? kCodeBytes : Frozen::kBytes);
    static constexpr int kUnpackedBytes = kPacked ? Frozen::kBytes : 0;
    static constexpr int kBookBytes = kPacked ? (16 + 256) * 4 : 0;
    static constexpr int kStages = lora::kStagesThatFit<kStageBytes, kUnpackedBytes + kBookBytes>;
    static_assert(kStages >= 2, "");
    using Thin = Tile<float, kRows, kRankStage>;
    static constexpr int kThinBytes = Thin::kBytes + kColumns * (kRankStage + 8) * 4;  // and a factor's
    static constexpr int kStagesBytes = kStages * kStageBytes + kUnpackedBytes;
    static constexpr int kBytes = kThinBytes > kStagesBytes ? kThinBytes : kStagesBytes;
    // A warp has kM * 16 rows and kN * 8 columns.
    static constexpr int kWarpsOfRows = kRowTiles > 1 ? 2 : 1;
    static constexpr int kM = kRowTiles / kWarpsOfRows, kN = kColumns / 8 / (kWarps / kWarpsOfRows);
};

template <typename Shape>
using Sums = float[Shape::kM][Shape::kN][4];

// Position of this warp's sums in the block's tile.
template <typename Shape>
__device__ __forceinline__ int warp_row() {
    return int(threadIdx.x) / 32 % Shape::kWarpsOfRows * 16 * Shape::kM;
}
template <typename Shape>
__device__ __forceinline__ int warp_column() {
    return int(threadIdx.x) / 32 / Shape::kWarpsOfRows * 8 * Shape::kN;
}

// d += thin Fᵀ.
template <typename Shape, bool kAcross>
__device__ void add_thin(const Product& p, const Rows& rows, int64_t column, uint8_t* memory,
                         Sums<Shape>& d) {
    using Thin = typename Shape::Thin;
    using Factor = Tile<float, kAcross ? kRankStage : kColumns, kAcross ? kColumns : kRankStage>;
    static_assert(Thin::kBytes + Factor::kBytes <= Shape::kThinBytes, "");
    const Source<float> thin(p.thin, p.rank);
    const Source<float> factor(p.factor + rows.expert * p.columns * p.rank, kAcross ? p.columns : p.rank);
    uint8_t* factor_stage = memory + Thin::kBytes;
    const auto fetch_stage = [&](int64_t first) {
        lora::fetch<Thin>(memory, thin, rows.first, rows.last, first, p.rank);
        if constexpr (kAcross)
            lora::fetch<Factor>(factor_stage, factor, first, p.rank, column, p.columns);
        else
            lora::fetch<Factor>(factor_stage, factor, column, p.columns, first, p.rank);
    };
    for_stages_in_turn(0, p.rank, kRankStage, fetch_stage, [&](int64_t first) {
#pragma unroll 1
        for (int step = 0; step < kRankStage; step += 16) {
            if (first + step >= p.rank) break;
#pragma unroll
            for (int n = 0; n < Shape::kN; n += 2) {
                Tf32Right right[2];
                lora::load_right<Factor, kAcross>(right, factor_stage, warp_column<Shape>() + n * 8, step);
#pragma unroll
                for (int m = 0; m < Shape::kM; ++m) {
                    Tf32Left left;
                    lora::load_left<Thin>(left, memory, warp_row<Shape>() + m * 16, step);
#pragma unroll
                    for (int i = 0; i < 2; ++i) tf32_multiply(d[m][n + i], left, right[i]);
                }
                __syncwarp();  // else the compiler loads `left` once, into more registers than there are
            }
        }
    });
}

template <typename Shape>
__device__ void drop_sums(const lora::Dropout& dropout, const Rows& rows, int64_t column, Sums<Shape>& d) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
        for (int n = 0; n < Shape::kN; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t row = rows.first + warp_row<Shape>() + m * 16 + half * 8 + lane / 4;
                const int64_t counter = (column + warp_column<Shape>()) / lora::kColumnsPerCounter + n;
                const PhiloxWords words = lora::dropout_words(dropout, row, counter);
                // Word lane % 4, without an index, so that words stay in registers.
                const uint32_t low = lane & 1 ? words.word[1] : words.word[0];
                const uint32_t high = lane & 1 ? words.word[3] : words.word[2];
                const uint32_t mask = lora::keep_pair(lane & 2 ? high : low, dropout.threshold);
                if (!(mask & 0xffffu)) d[m][n][half * 2] = 0;
                if (!(mask & 0xffff0000u)) d[m][n][half * 2 + 1] = 0;
            }
}

// --- the product ---

// Right operands of two products, for columns from `column` on.
template <typename Shape>
__device__ __forceinline__ void load_pair(uint32_t (&b)[4], const uint8_t* tile, int column, int inner) {
    using Frozen = typename Shape::Frozen;
    const int lane = threadIdx.x % 32;
    if constexpr (Shape::kAcross)
        ldmatrix_x4_trans(b, tile + (inner + lane % 16) * Frozen::kPitch + (column + lane / 16 * 8) * 2);
    else
        ldmatrix_x4(
            b, tile + (column + lane / 16 * 8 + lane % 8) * Frozen::kPitch + (inner + lane / 8 % 2 * 8) * 2);
}

// d += the products of a stage. Tensor cores add those of 32 columns of 16 bits, or of 16 of fp32 (common/tf32.cuh).
template <typename T, typename Shape>
__device__ __forceinline__ void add_stage(const uint8_t* input, const uint8_t* frozen, Sums<Shape>& d) {
    using Input = typename Shape::Input;
    constexpr int kSteps = sizeof(T) == 2 ? 2 : 1;
#pragma unroll 1
    for (int k = 0; k < Shape::kStage; k += kSteps * 16) {
        if constexpr (sizeof(T) == 2) {
            uint32_t right[Shape::kN / 2][kSteps][4];
#pragma unroll
            for (int n = 0; n < Shape::kN; n += 2)
#pragma unroll
                for (int step = 0; step < kSteps; ++step)
                    load_pair<Shape>(right[n / 2][step], frozen, warp_column<Shape>() + n * 8, k + step * 16);
#pragma unroll
            for (int m = 0; m < Shape::kM; ++m) {
                uint32_t left[kSteps][4];
#pragma unroll
                for (int step = 0; step < kSteps; ++step)
                    lora::load_left<Input>(left[step], input, warp_row<Shape>() + m * 16, k + step * 16);
#pragma unroll
                for (int n = 0; n < Shape::kN; ++n) {
                    float sum[4] = {};
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        const uint32_t (&pair)[4] = right[n / 2][step];
                        mma_m16n8k16<T>(sum, left[step], {pair[n % 2 * 2], pair[n % 2 * 2 + 1]});
                    }
                    add_to(d[m][n], sum);
                }
            }
        } else {
            Tf32Left left[Shape::kM];
#pragma unroll
            for (int m = 0; m < Shape::kM; ++m)
                lora::load_left<Input>(left[m], input, warp_row<Shape>() + m * 16, k);
#pragma unroll
            for (int n = 0; n < Shape::kN; n += 2) {
                Tf32Right right[2];
                lora::load_right<typename Shape::Frozen, Shape::kAcross>(right, frozen,
                                                                         warp_column<Shape>() + n * 8, k);
#pragma unroll
                for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
                    for (int i = 0; i < 2; ++i) tf32_multiply(d[m][n + i], left[m], right[i]);
            }
        }
    }
}

template <typename T, typename Shape>
__device__ void store_sums(const Product& p, const Rows& rows, int64_t first_column, const Sums<Shape>& d) {
    const int lane = threadIdx.x % 32;
    const T* bias = p.bias != nullptr ? static_cast<const T*>(p.bias) + rows.expert * p.columns : nullptr;
    T* out = static_cast<T*>(p.out);
    const bool pairs = p.columns % 2 == 0 && is_aligned(out, 2 * sizeof(T));
#pragma unroll
    for (int n = 0; n < Shape::kN; ++n) {
        const int64_t column = first_column + warp_column<Shape>() + n * 8 + lane % 4 * 2;
        if (column >= p.columns) continue;
        const bool second = column + 1 < p.columns;
        const float added[2] = {bias ? to_float(bias[column]) : 0,
                                bias && second ? to_float(bias[column + 1]) : 0};
#pragma unroll
        for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t row = rows.first + warp_row<Shape>() + m * 16 + half * 8 + lane / 4;
                if (row >= rows.last) continue;
                struct alignas(2 * sizeof(T)) {
                    T value[2];
                } both = {{from_float<T>(d[m][n][half * 2] + added[0]),
                           from_float<T>(d[m][n][half * 2 + 1] + added[1])}};
                T* to = out + row * p.columns + column;
                if (pairs) {
                    *reinterpret_cast<decltype(both)*>(to) = both;
                } else {
                    to[0] = both.value[0];
                    if (second) to[1] = both.value[1];
                }
            }
    }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, 3) product_kernel(const Product p, unsigned column_tiles) {
    PEFTCORE_SHARED(uint8_t, memory, [Shape::kBytes]);
    PEFTCORE_SHARED(float, quant_map, [16]);
    PEFTCORE_SHARED(float, nested_quant_map, [Shape::kPacked ? Shape::Scales::kEntries : 1]);
    using Input = typename Shape::Input;
    using Frozen = typename Shape::Frozen;
    constexpr int kStage = Shape::kStage, kStages = Shape::kStages;

    const int64_t column = int64_t(blockIdx.x % column_tiles) * kColumns;
    const Rows found = rows_of_tile<Shape::kRows>(p.groups, blockIdx.x / column_tiles);
    if (found.first >= found.last) return;
    if (found.expert < 0) return fill(found, static_cast<T*>(p.out), p.columns, column, column + kColumns);
    PEFTCORE_SHARED(Rows, kept, [1]);  // not in registers, of which the sums need almost all
    if (threadIdx.x == 0) kept[0] = found;
    __syncthreads();
    const Rows& rows = kept[0];

    float d[Shape::kM][Shape::kN][4] = {};
    if (p.rank > 0) {
        if (p.factor_across)
            add_thin<Shape, true>(p, rows, column, memory, d);
        else
            add_thin<Shape, false>(p, rows, column, memory, d);
        if (p.dropout.threshold != 0) drop_sums<Shape>(lora::with_key(p.dropout), rows, column, d);
    }

    const WeightView weight = expert_of(p.weight, rows.expert, p.groups.experts);
    const Source<T> input(p.wide, p.inner), dense(weight.dense, weight.columns);
    Unpacker<Frozen, typename Shape::Scales> unpacker{weight, quant_map, {}, false, {}};
    if constexpr (Shape::kPacked) {
        unpacker.vectors = weight.columns % 32 == 0 && is_aligned(weight.codes);
        unpacker.scales = Shape::Scales::load(weight, quant_map, nested_quant_map);
    }
    const auto position_of = [&](int64_t k) -> Position {
        return Shape::kAcross ? Position{k, column} : Position{column, k};
    };
    const auto fetch_stage = [&](int64_t k, int slot) {
        uint8_t* to = memory + slot * Shape::kStageBytes;
        const Position position = position_of(k);
        lora::fetch<Input>(to, input, rows.first, rows.last, k, p.inner);
        if constexpr (!Shape::kPacked)
            lora::fetch<Frozen>(to + Input::kBytes, dense, position.row, weight.rows, position.column,
                                weight.columns);
        else if (unpacker.vectors)
            fetch_codes<Frozen>(to + Input::kBytes, weight, position);
    };
    const auto multiply_stage = [&](int64_t k, int slot) {
        const uint8_t *now = memory + slot * Shape::kStageBytes, *frozen = now + Input::kBytes;
        if constexpr (Shape::kPacked) {
            uint8_t* unpacked = memory + kStages * Shape::kStageBytes;
            unpacker.unpack(unpacked, frozen, position_of(k));
            unpacker.fetch_scales(position_of(k + kStage));
            frozen = unpacked;
            __syncthreads();
        }
        add_stage<T, Shape>(now, frozen, d);
    };
    if constexpr (Shape::kPacked) unpacker.fetch_scales(position_of(0));
    for_stages<kStages, Readers::kBlock>(0, p.inner, kStage, fetch_stage, NothingToDo(), multiply_stage);
    store_sums<T, Shape>(p, rows, column, d);
}

// --- launches ---

// body(whether the weight is in 4 bits, whether it has zero points).
template <typename Body>
const char* dispatch_storage(const WeightView& weight, const Body& body) {
    if (weight.quant_map == nullptr) return body(std::false_type(), std::false_type());
    return dispatch_flag(weight.scales == ScaleKind::kAffine,
                         [&](auto zeros) { return body(std::true_type(), zeros); });
}

// Row tiles are chosen by the average number of rows per expert: the host does not know the actual numbers.
template <typename T>
const char* launch_product(const Product& p, void* stream) {
    constexpr int kMost = sizeof(T) == 4 ? 4 : 8;
    const int row_tiles = p.groups.rows <= 16 * p.groups.experts   ? 1
                          : p.groups.rows <= 64 * p.groups.experts ? 4
                                                                   : 8;
    return dispatch_size<1, 4, kMost>(row_tiles, [&](auto tiles) {
        return dispatch_storage(p.weight, [&](auto packed, auto zeros) {
            return dispatch_flag(p.across, [&](auto across) {
                using Own = Shape<T, decltype(tiles)::value, decltype(packed)::value, decltype(zeros)::value,
                                  decltype(across)::value>;
                const int64_t column_tiles = ceil_div(p.columns, kColumns);
                const int64_t blocks = most_tiles(p.groups, Own::kRows) * column_tiles;
                return PEFTCORE_LAUNCH((product_kernel<T, Own>), blocks, kThreads, 0, stream, p,
                                       unsigned(column_tiles));
            });
        });
    });
}

}  // namespace
}  // namespace grouped
}  // namespace peftcore

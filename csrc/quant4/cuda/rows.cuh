// A block's part of y = x Wᵀ + b + s Fᵀ for at most 16 rows of x, directly from 4 bits: 8 or 16 rows of W, whose
// columns its warps divide. Columns must be whole blocks of 64, with one scale or a few (LaneScales).
//
// A lane has 64 columns of two rows of W, whose codes are loaded into registers one step ahead. A weight is code *
// scale (block_scale.cuh) in fp32, rounded once to x's dtype: the same bits as dequantization. The 16 possible values of one row are a
// table in registers, looked up by byte permutes; those of the other row are exchanged between lanes by shuffles: the
// two use different pipes, and either alone would take longer than memory. An mma may take its columns in any order
// that is the same for W and x: each lane supplies those that it has.
//
// Up to 4 rows of x need half of an mma's 8 columns: the other half then takes the following 256 columns of W (kParts),
// as do the lower 8 rows of the mma, and one half of each is read from the result.
#pragma once

#include <type_traits>

#include "common/cuda_dispatch.cuh"
#include "common/integers.h"
#include "quant4/cuda/linear.cuh"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kLaneColumns = 64;  // whose codes are 32 bytes

// The lower and the upper bytes of the 16 codes' values in T.
struct ValueTable {
    uint32_t low[4], high[4];
};

template <typename T, typename Decoded>
__device__ __forceinline__ ValueTable value_table(const float* quant_map, const Decoded& scale) {
    ValueTable table;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 map = reinterpret_cast<const float4*>(quant_map)[i];
        const uint32_t first = pair_bits<T>(scale.value(map.x), scale.value(map.y));
        const uint32_t second = pair_bits<T>(scale.value(map.z), scale.value(map.w));
        table.low[i] = permute_bytes(first, second, 0x6420);
        table.high[i] = permute_bytes(first, second, 0x7531);
    }
    return table;
}

// The values of eight codes, two a word, in order.
__device__ __forceinline__ void eight_values(uint32_t codes, const ValueTable& table, uint32_t (&values)[4]) {
    // For each code its position in a half of the table, and which half.
    uint32_t place = codes & 0x77777777u, half = (codes >> 1 & 0x44444444u) | 0x32103210u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const auto look_up = [&](const uint32_t (&bytes)[4]) {
            return permute_bytes(permute_bytes(bytes[0], bytes[1], place),
                                 permute_bytes(bytes[2], bytes[3], place), half);
        };
        const uint32_t low = look_up(table.low), high = look_up(table.high);
        values[2 * i] = permute_bytes(low, high, 0x4051);  // the even code is a byte's upper half
        values[2 * i + 1] = permute_bytes(low, high, 0x6273);
        place >>= 16;
        half >>= 16;
    }
}

// The values of eight codes, where lane i of each 16 lanes has the value of code i.
template <typename T, typename Decoded>
__device__ __forceinline__ void eight_values(uint32_t codes, float value_of_lane, const Decoded& scale,
                                             uint32_t (&values)[4]) {
    const auto value = [&](int i) {  // the lane's number is the lower four bits of the code's position
        return scale.value(__shfl_sync(0xffffffffu, value_of_lane, int(codes >> 4 * i), 16));
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = pair_bits<T>(value(2 * i + 1), value(2 * i));
}

// Scales of a lane's 64 columns, which are a part of a block, or kBlocks of them: two of 32, or four of 16 (NVFP4's),
// whose codes are one word. `half`: of the columns.
template <ScaleKind kScales, int kBlocks>
struct LaneScales {
    using Known = KnownScales<kScales>;
    using Decoded = typename Known::Decoded;
    static constexpr int kEntries = Known::kEntries;
    static constexpr bool kSixteens = kBlocks == 4;
    static constexpr int kLoads = kBlocks == 2 ? 2 : 1;

    Known known;

    static __device__ __forceinline__ LaneScales load(const WeightView& weight, float* quant_map,
                                                      float* nested_quant_map) {
        return {Known::load(weight, quant_map, nested_quant_map)};
    }

    // Whether scales are loaded for this half, and those of columns that begin `sixty_fours` times 64 columns behind
    // the first one.
    static __device__ __forceinline__ bool loads(const WeightView& weight, int half) {
        return half == 0 || (kBlocks == 2 && weight.shift == 5);
    }
    static __device__ __forceinline__ StoredScale stored(const WeightView& weight, uint32_t sixty_fours,
                                                         int half) {
        if constexpr (kSixteens) {
            StoredScale result = Known::stored(weight, 4 * sixty_fours);
            result.other = static_cast<const uint32_t*>(weight.absmax)[sixty_fours];
            return result;
        }
        return Known::stored(weight, kBlocks == 2 ? (2 * sixty_fours + half) >> (weight.shift - 5)
                                                  : sixty_fours >> (weight.shift - 6));
    }

    // Of what was loaded, the scale of the 16 columns of this number.
    __device__ __forceinline__ Decoded decode(const WeightView& weight, const StoredScale& stored,
                                              int sixteen) const {
        if constexpr (kSixteens)
            return known.decode(weight, {stored.bits, stored.other >> 8 * sixteen & 255});
        return known.decode(weight, stored);
    }
};

__device__ __forceinline__ uint4 load_16_bytes(const void* from) { return *static_cast<const uint4*>(from); }

// An s that is complete when the kernel begins.
struct ReadyBranch {
    static constexpr bool kLater = false;
    const LinearLaunch& p;
    __device__ void begin() const {}
    __device__ void wait() const {}
    __device__ float thin(int64_t m, int j) const { return thin_value(p, m, j); }
    __device__ float factor(int64_t n, int j) const { return factor_value(p, n, j); }
};

// Rows of W from `first_row` on. kTiles: tiles of 8 / kParts rows of x. `branch`: s and F, further work of the block
// while its first codes are loaded, and how it waits for an s that is computed meanwhile (lora/cuda/one_launch.cu).
template <typename T, int kParts, int kTiles, typename Scales, typename Branch>
__device__ void rows_tile(const LinearLaunch& p, int64_t first_row, const Branch& branch) {
    using Decoded = typename Scales::Decoded;
    constexpr int kTileRows = 16 / kParts, kBatch = 8 / kParts;  // rows of W, and of x in a tile
    constexpr int kPartColumns = 4 * kLaneColumns, kStep = kWarps * kParts * kPartColumns;
    PEFTCORE_SHARED(float, quant_map, [16]);
    PEFTCORE_SHARED(float, nested_quant_map, [Scales::kEntries]);
    PEFTCORE_SHARED(float, sums, [kWarps * kParts][kTiles * kBatch][kTileRows + 1]);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, pair = lane % 4;  // of mma fragments
    const uint32_t columns = uint32_t(p.weight.columns);
    const uint32_t begin = warp * kParts * kPartColumns + pair * kLaneColumns;  // of the lane, in its part

    // Left operands: rows `group` and `group + 8` of the mma.
    uint32_t column[2], row_block[2];  // the latter of 64 columns
    const uint8_t* codes[2];           // of the row
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t row = least(first_row + group + (kParts == 1 ? 8 * r : 0), p.weight.rows - 1);
        column[r] = begin + (kParts == 1 ? 0 : r * kPartColumns);
        row_block[r] = uint32_t(row * (columns / kLaneColumns));
        codes[r] = p.weight.codes + row * (columns / 2);
    }
    // Right operand: a row of x. Columns of the mma without a row repeat the last one, and are not read.
    const uint32_t x_column = begin + group / kBatch * kPartColumns;
    const T* x[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        x[tile] = static_cast<const T*>(p.x) +
                  least(tile * kBatch + group % kBatch, p.batch - 1) * int64_t(columns) + x_column;

    uint4 ahead[2][2];  // codes
    StoredScale scale_ahead[2][Scales::kLoads];
    const auto place = [&](int r, uint32_t k) {  // behind a row its end is repeated
        return column[r] + k < columns ? column[r] + k : columns - kLaneColumns;
    };
    const auto fetch_codes = [&](int half, uint32_t k) {
#pragma unroll
        for (int r = 0; r < 2; ++r) ahead[r][half] = load_16_bytes(codes[r] + place(r, k) / 2 + 16 * half);
    };
    const auto fetch_scales = [&](int half, uint32_t k) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
            scale_ahead[r][half] = Scales::stored(p.weight, row_block[r] + place(r, k) / kLaneColumns, half);
    };
    fetch_codes(0, 0);
    fetch_codes(1, 0);
#pragma unroll
    for (int half = 0; half < Scales::kLoads; ++half)
        if (Scales::loads(p.weight, half)) fetch_scales(half, 0);
    const Scales scales = Scales::load(p.weight, quant_map, nested_quant_map);
    branch.begin();

    // s Fᵀ: a warp has every kWarps-th rank; with two parts a lane every second of those.
    constexpr int kResults = 4 / kParts;  // of a tile
    const int part = kParts == 1 ? 0 : pair / 2;
    const auto row_of = [&](int i) { return group + i / 2 * 8; };  // of the lane's results, in the tile
    const auto batch_of = [&](int tile, int i) { return tile * kBatch + pair % (4 / kParts) * 2 + i % 2; };
    float thin[kTiles][kResults] = {};
    const auto multiply_thin = [&] {
        for (int j = warp * kParts + part; j < p.rank; j += kWarps * kParts)
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int i = 0; i < kResults; ++i)
                    thin[tile][i] +=
                        branch.factor(first_row + row_of(i), j) * branch.thin(batch_of(tile, i), j);
    };
    if (!Branch::kLater) multiply_thin();  // while the codes are loaded
    __syncthreads();

    const float value_of_lane = quant_map[lane % 16];
    float d[kTiles][4] = {};
    // A step of the warp; with kWhole, no lane is beyond the end.
    const auto add_step = [&](uint32_t k, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        StoredScale stored[2];
        Decoded scale[2];
        ValueTable table;
        const bool inside = kWhole || x_column + k < columns;
        const auto decode = [&](int sixteen) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                scale[r] = scales.decode(p.weight, stored[r], sixteen);
                if (!kWhole && column[r] + k >= columns) scale[r] = {};
            }
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (Scales::loads(p.weight, half)) {
#pragma unroll
                for (int r = 0; r < 2; ++r) stored[r] = scale_ahead[r][half % Scales::kLoads];
                if (!Scales::kSixteens) decode(0);
                fetch_scales(half % Scales::kLoads, k + kStep);
                if (!Scales::kSixteens) table = value_table<T>(quant_map, scale[0]);
            }
            float sum[2][kTiles][4] = {};  // two, so that an mma rarely waits for the previous one
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (Scales::kSixteens && i % 2 == 0) {
                    decode(2 * half + i / 2);
                    table = value_table<T>(quant_map, scale[0]);
                }
                const auto word = [&](int r) {
                    const uint4& four = ahead[r][half];
                    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
                };
                uint32_t upper[4], lower[4];
                eight_values(word(0), table, upper);
                eight_values<T>(word(1), value_of_lane, scale[1], lower);
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const uint4 piece =
                        inside ? load_16_bytes(x[tile] + k + kLaneColumns / 2 * half + 8 * i) : uint4{};
                    mma_m16n8k16<T>(sum[0][tile], {upper[0], lower[0], upper[1], lower[1]},
                                    {piece.x, piece.y});
                    mma_m16n8k16<T>(sum[1][tile], {upper[2], lower[2], upper[3], lower[3]},
                                    {piece.z, piece.w});
                }
            }
            fetch_codes(half, k + kStep);  // these have been read
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int i = 0; i < 2; ++i) add_to(d[tile], sum[i][tile]);
        }
    };
    uint32_t k = 0;
    const uint32_t first = warp * kParts * kPartColumns, behind = first + kParts * kPartColumns;
    for (; behind + k <= columns; k += kStep) add_step(k, std::true_type());
    if (first + k < columns) add_step(k, std::false_type());

    branch.wait();
    if (Branch::kLater) multiply_thin();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < kResults; ++i) {
            const float sum = kParts == 1 || part == 0 ? d[tile][i] : d[tile][i + 2];
            sums[warp * kParts + part][batch_of(tile, i)][row_of(i)] = sum + thin[tile][i];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < kTiles * kBatch * kTileRows; i += kThreads) {
        const int m = i / kTileRows, row = i % kTileRows;
        if (m >= p.batch || first_row + row >= p.weight.rows) continue;
        float total = 0;
#pragma unroll
        for (int w = 0; w < kWarps * kParts; ++w) total += sums[w][m][row];
        store_result<T>(p, m, first_row + row, total);
    }
}

// Formats in which blocks of 32 are common, and NVFP4.
constexpr bool has_small_blocks(ScaleKind scales) {
    return scales == ScaleKind::kPowerOfTwo || scales == ScaleKind::kAffine;
}
inline bool has_sixteens(const WeightView& weight) {
    return weight.scales == ScaleKind::kNested && weight.shift == 4;
}

// body(TypeTag of the weight's LaneScales)
template <typename Body>
const char* dispatch_lane_scales(const WeightView& weight, const Body& body) {
    if (has_sixteens(weight)) return body(TypeTag<LaneScales<ScaleKind::kNested, 4>>());
    return dispatch_scales(weight.scales, [&](auto scales) {
        constexpr ScaleKind kScales = decltype(scales)::value;
        return body(TypeTag<LaneScales<kScales, has_small_blocks(kScales) ? 2 : 1>>());
    });
}

// Whether rows_tile takes this weight: rows of whole 64 columns on 16 bytes, blocks as LaneScales has them, and numbers
// of 32 bits for blocks.
inline bool in_lanes(const WeightView& weight) {
    const int shift = has_sixteens(weight) ? 4 : has_small_blocks(weight.scales) ? 5 : 6;
    const int64_t blocks = weight.first_block + (weight.numel() >> shift);
    return weight.columns > 0 && weight.columns % kLaneColumns == 0 && weight.shift >= shift &&
           (shift > 4 || is_aligned(weight.absmax, 4)) && blocks <= INT32_MAX &&
           weight.columns <= INT32_MAX / 2;
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore

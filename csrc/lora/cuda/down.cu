// s = c (keep ∘ x) Aᵀ in one kernel: x comes from memory once. No GPU was at hand: written for bandwidth,
// proved on the emulator.
//
// A block takes 16 or 64 rows of x and up to 64 ranks (more ranks are further blocks, next to each other, so
// that they find x in L2). x and A arrive by cp.async in stages of columns, several on their way at a time. A
// thread drops elements of the 16 bytes that it fetched, in shared memory: one Philox call for eight. The
// four warps share out the rows, or with 16 rows the columns of a stage; their sums are added in a fixed
// order.
//
// Few rows are few blocks: then the columns are split over blocks too, and peftcore_lora_sum adds their sums
// in order.
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kSmallRows = 256;         // up to here, 16 rows a block
constexpr int kBlocksWanted = 264;      // about two for each multiprocessor of a large GPU
constexpr int64_t kSplitColumns = 512;  // at least, of a split

struct DownParams {
    const void* x;
    int64_t rows, columns;  // of a sample
    const int64_t* index;
    Adapters adapters;
    int stride;  // of s
    int chunks;  // of ranks
    Dropout dropout;
    int64_t split_columns;
    int64_t all_rows;
    float* partial;  // [splits, all_rows, stride], or nullptr: s is written
    float* s;
};

// kRowTiles: of 16 rows of x. kRankTiles: of 8 rows of A.
template <typename T, int kRowTiles, int kRankTiles>
__global__ void __launch_bounds__(kThreads) down_kernel(const DownParams p) {
    constexpr int kRows = 16 * kRowTiles, kRanks = 8 * kRankTiles, kStage = kRowTiles == 1 ? 64 : 32;
    constexpr int kParts = kWarps / kRowTiles;  // warps that share rows
    using Input = Tile<T, kRows, kStage>;
    using Factor = Tile<float, kRanks, kStage>;
    constexpr int kStageBytes = Input::kBytes + Factor::kBytes, kStages = kStagesThatFit<kStageBytes>;
    static_assert(kStages >= 2 && kParts * kRows * (kRanks + 1) * 4 <= kStages * kStageBytes, "");
    PEFTCORE_SHARED(uint8_t, memory, [kStages * kStageBytes]);

    const int64_t row_tiles = (p.rows + kRows - 1) / kRows;
    const int64_t tile = blockIdx.x / p.chunks, sample = tile / row_tiles;
    const int first_rank = int(blockIdx.x % p.chunks) * kRanks;
    const int64_t adapter = (p.index != nullptr ? p.index[sample] : 0) - p.adapters.first;
    if (adapter < 0 || adapter >= p.adapters.count) return;
    const int rank = p.adapters.rank[adapter];
    // Rows of x as one matrix: dropout counts them so.
    const int64_t row = sample * p.rows + tile % row_tiles * kRows, last_row = (sample + 1) * p.rows;
    const int64_t first_column = int64_t(blockIdx.y) * p.split_columns;
    const int64_t last_column =
        first_column + p.split_columns < p.columns ? first_column + p.split_columns : p.columns;
    const Source<T> x(p.x, p.columns);
    const Source<float> a(p.adapters.factor[adapter], p.columns);
    const auto fetch_stage = [&](int64_t stage, int slot) {
        uint8_t* to = memory + slot * kStageBytes;
        const int64_t column = first_column + stage * kStage;
        if (column < last_column) {
            fetch<Input>(to, x, row, last_row, column, last_column);
            fetch<Factor>(to + Input::kBytes, a, first_rank, rank, column, last_column);
        }
        cp_async_commit();
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp % kRowTiles * 16, part = warp / kRowTiles;
    float d[kRankTiles][4] = {};
    const int64_t stages = (last_column - first_column + kStage - 1) / kStage;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch_stage(s, s);
    int slot = 0;
    for (int64_t stage = 0; stage < stages; ++stage) {
        uint8_t* input = memory + slot * kStageBytes;
        cp_async_wait<kStages - 2>();
        if (p.dropout.threshold != 0)
            drop<Input>(input, p.dropout, row, last_row, first_column + stage * kStage);
        __syncthreads();  // this stage has arrived, and the one before has been read
        fetch_stage(stage + kStages - 1, (slot + kStages - 1) % kStages);
#pragma unroll
        for (int step = 0; step < kStage / 16 / kParts; ++step) {
            const int column = (step * kParts + part) * 16;
            uint32_t left[4];
            load_left<Input>(left, input, warp_row, column);
#pragma unroll
            for (int t = 0; t < kRankTiles; t += 2) {
                if (first_rank + t * 8 >= rank) break;
                Tf32Right right[2];
                load_right<Factor>(right, input + Input::kBytes, t * 8, column);
                tf32_multiply<T>(d[t], left, right[0]);
                tf32_multiply<T>(d[t + 1], left, right[1]);
            }
        }
        slot = (slot + 1) % kStages;
    }
    cp_async_wait<0>();
    __syncthreads();  // stages have been read: their memory is free

    auto sums = reinterpret_cast<float (*)[kRows][kRanks + 1]>(memory);
#pragma unroll
    for (int t = 0; t < kRankTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[part][warp_row + lane / 4 + i / 2 * 8][t * 8 + lane % 4 * 2 + i % 2] = d[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
        const int r = i / kRanks, j = i % kRanks;
        if (row + r >= last_row || first_rank + j >= rank) continue;
        float total = 0;
#pragma unroll
        for (int w = 0; w < kParts; ++w) total += sums[w][r][j];
        const int64_t at = (row + r) * p.stride + first_rank + j;
        if (p.partial != nullptr)
            p.partial[blockIdx.y * p.all_rows * p.stride + at] = total;
        else
            p.s[at] = p.adapters.scale[adapter] * total;
    }
}

// Chosen by the shape alone, so that results are the same on every GPU.
struct Plan {
    int row_tiles, chunks, splits;
    int64_t row_blocks, split_columns;
};

Plan plan_of(int64_t samples, int64_t rows, int64_t columns, int rank, bool split) {
    Plan plan;
    plan.row_tiles = rows <= kSmallRows ? 1 : 4;
    plan.row_blocks = samples * ((rows + 16 * plan.row_tiles - 1) / (16 * plan.row_tiles));
    plan.chunks = (rank + kRankChunk - 1) / kRankChunk;
    const int64_t blocks = plan.row_blocks * plan.chunks;
    const int64_t wanted = split && blocks < kBlocksWanted ? kBlocksWanted / blocks : 1;
    const int64_t most = columns / kSplitColumns > 1 ? columns / kSplitColumns : 1;
    const int64_t splits = wanted < most ? wanted : most;
    // Whole stages, so that only the last split has a tail.
    plan.split_columns = ((columns + splits - 1) / splits + 63) / 64 * 64;
    if (plan.split_columns == 0) plan.split_columns = 64;
    plan.splits = columns == 0 ? 1 : int((columns + plan.split_columns - 1) / plan.split_columns);
    return plan;
}

template <typename T>
const char* launch(const DownParams& p, const Plan& plan, int rank, void* stream) {
    const dim3 grid(unsigned(plan.row_blocks * plan.chunks), unsigned(plan.splits));
    if (plan.row_tiles == 1)
        return rank <= 16 ? PEFTCORE_LAUNCH((down_kernel<T, 1, 2>), grid, kThreads, 0, stream, p)
                          : PEFTCORE_LAUNCH((down_kernel<T, 1, 8>), grid, kThreads, 0, stream, p);
    return rank <= 16 ? PEFTCORE_LAUNCH((down_kernel<T, 4, 2>), grid, kThreads, 0, stream, p)
                      : PEFTCORE_LAUNCH((down_kernel<T, 4, 8>), grid, kThreads, 0, stream, p);
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" int64_t peftcore_lora_down_workspace(int64_t rows, int64_t columns, int rank) {
    using namespace peftcore::lora;
    if (rows == 0 || rank == 0) return 0;
    const Plan plan = plan_of(1, rows, columns, rank, true);
    return plan.splits == 1 ? 0 : plan.splits * rows * rank;
}

extern "C" const char* peftcore_lora_down(const peftcore::lora::Wide* x,
                                          const peftcore::lora::Factors* factors,
                                          const peftcore::lora::Dropout* dropout, float* partial, float* s,
                                          void* stream) {
    using namespace peftcore::lora;
    const int stride = factors->stride;
    if (x->samples == 0 || x->rows == 0 || stride == 0) return nullptr;
    const bool half = x->dtype == Dtype::kHalf;
    if (!half && x->dtype != Dtype::kBFloat16) return "x must have 16 bits";
    const Plan plan = plan_of(x->samples, x->rows, x->columns, stride, factors->index == nullptr);
    DownParams p = {};
    p.x = x->values;
    p.rows = x->rows;
    p.columns = x->columns;
    p.index = factors->index;
    p.stride = stride;
    p.chunks = plan.chunks;
    p.dropout = *dropout;
    p.split_columns = plan.split_columns;
    p.all_rows = x->samples * x->rows;
    p.partial = plan.splits > 1 ? partial : nullptr;
    p.s = s;
    for (int first = 0; first < factors->count; first += kMaxAdapters) {
        p.adapters = adapters_from(first, *factors);
        const char* error = half ? launch<peftcore::Half>(p, plan, stride, stream)
                                 : launch<peftcore::BFloat16>(p, plan, stride, stream);
        if (error != nullptr) return error;
    }
    if (p.partial == nullptr) return nullptr;
    return peftcore_lora_sum(partial, plan.splits, p.all_rows * stride, factors->scales[0], s,
                             int(Dtype::kFloat), stream);
}

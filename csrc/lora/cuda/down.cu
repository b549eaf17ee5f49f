// s = c (keep ∘ x) Aᵀ in one kernel: x comes from memory once. No GPU was at hand: written for bandwidth,
// proved on the emulator.
//
// Blocks of one part of the rows and several of the ranks (down.cuh) lie next to each other, so that they find
// x in L2. Few rows are few blocks: then the columns are split over blocks too, and peftcore_sum adds their
// sums in order. Up to 8 rows, as in generation, a block has one rank instead: no sums are left to add, which
// would be a launch that takes as long as this one.
#include "common/integers.h"
#include "lora/cuda/down.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kFewRows = 8;             // up to here, a block for each rank
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

template <typename T, int kRowTiles, int kRankTiles>
__global__ void __launch_bounds__(kThreads) down_kernel(const DownParams p) {
    constexpr int kRows = 16 * kRowTiles;
    const int64_t row_tiles = (p.rows + kRows - 1) / kRows;
    const int64_t tile = blockIdx.x / p.chunks, sample = tile / row_tiles;
    const int64_t adapter = (p.index != nullptr ? p.index[sample] : 0) - p.adapters.first;
    if (adapter < 0 || adapter >= p.adapters.count) return;
    DownTile own = {};
    own.x = p.x;
    own.columns = p.columns;
    own.row = sample * p.rows + tile % row_tiles * kRows;
    own.last_row = (sample + 1) * p.rows;
    own.first_column = int64_t(blockIdx.y) * p.split_columns;
    own.last_column = least(own.first_column + p.split_columns, p.columns);
    own.factor = p.adapters.factor[adapter];
    own.rank = p.adapters.rank[adapter];
    own.first_rank = int(blockIdx.x % p.chunks) * 8 * kRankTiles;
    own.dropout = p.dropout;
    own.scale = p.partial != nullptr ? 1 : p.adapters.scale[adapter];
    own.out = p.partial != nullptr ? p.partial + blockIdx.y * p.all_rows * p.stride : p.s;
    own.stride = p.stride;
    down_tile<T, kRowTiles, kRankTiles>(own);
}

// Eight values from column k on, zero behind the last.
template <typename T>
__device__ __forceinline__ void load_eight(const T* row, int64_t k, int64_t columns, bool vectors,
                                           float (&values)[8]) {
    union {
        uint4 vectors[sizeof(T) / 2];
        T items[8];
    } loaded;
    if (vectors) {
#pragma unroll
        for (int i = 0; i < int(sizeof(T)) / 2; ++i)
            loaded.vectors[i] = reinterpret_cast<const uint4*>(row + k)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) loaded.items[i] = k + i < columns ? row[k + i] : T{};
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(loaded.items[i]);
}

// A block: at most kFewRows rows of a sample and one rank.
template <typename T>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(const DownParams p) {
    PEFTCORE_SHARED(float, sums, [kWarps][kFewRows]);
    const int64_t sample = blockIdx.x / p.stride;
    const int rank = int(blockIdx.x % p.stride), rows = int(p.rows);
    const int64_t adapter = (p.index != nullptr ? p.index[sample] : 0) - p.adapters.first;
    if (adapter < 0 || adapter >= p.adapters.count || rank >= p.adapters.rank[adapter]) return;
    const Source<T> x(static_cast<const T*>(p.x) + sample * p.rows * p.columns, p.columns);
    const Source<float> a(p.adapters.factor[adapter] + rank * p.columns, p.columns);
    const bool vectors = x.vectors && a.vectors && p.columns % 8 == 0;
    float total[kFewRows] = {};
    for (int64_t k = threadIdx.x * 8; k < p.columns; k += kThreads * 8) {
        float factor[8], values[8];
        load_eight(a.data, k, p.columns, vectors, factor);
#pragma unroll
        for (int m = 0; m < kFewRows; ++m) {
            if (m >= rows) break;
            load_eight(x.data + m * p.columns, k, p.columns, vectors, values);
            if (p.dropout.threshold != 0) {
                const PhiloxWords words =
                    dropout_words(p.dropout, sample * p.rows + m, k / kColumnsPerCounter);
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (!keeps(words, i, p.dropout.threshold)) values[i] = 0;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) total[m] += values[i] * factor[i];
        }
    }
#pragma unroll
    for (int m = 0; m < kFewRows; ++m) {
        if (m >= rows) break;
        for (int distance = 16; distance > 0; distance /= 2)
            total[m] += __shfl_xor_sync(0xffffffffu, total[m], distance);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][m] = total[m];
    }
    __syncthreads();
    const int m = threadIdx.x;
    if (m >= rows) return;
    float all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[w][m];
    p.s[(sample * p.rows + m) * p.stride + rank] = p.adapters.scale[adapter] * all;
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
    const int64_t wanted = split && rows > kFewRows && blocks < kBlocksWanted ? kBlocksWanted / blocks : 1;
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
    if (p.rows <= kFewRows)
        return PEFTCORE_LAUNCH(few_rows_kernel<T>, unsigned(p.all_rows / p.rows * p.stride), kThreads, 0,
                               stream, p);
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
    return peftcore_sum(partial, plan.splits, p.all_rows * stride, factors->scales[0], s, int(Dtype::kFloat),
                        stream);
}

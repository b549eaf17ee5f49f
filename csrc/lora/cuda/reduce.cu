// R = (keep ∘ W)ᵀ V, the sums over rows of a gradient: dA from x and T, dB from dy and S; and in the same
// pass P = c W Fᵀ, T from dy and B. No GPU was at hand: written for bandwidth, proved on the emulator.
//
// A block takes 128 columns of W and a part of its rows, 32 at a time; a warp has 32 of the columns. Sums
// over the rows of a part stay in registers. Parts, a fixed split of the rows, are added in order by
// peftcore_lora_sum, so every run gives the same bits. P needs all columns: blocks leave partial products,
// which are added in the same way.
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kRows = 32, kColumns = 128;
constexpr int kBlocksWanted = 264;          // about two for each multiprocessor of a large GPU
constexpr int64_t kRowsOfPart = 8 * kRows;  // at least: partial sums are written and read once more

struct ReduceParams {
    const void* wide;
    const float *thin, *factor;
    int64_t rows, columns;
    int rank, chunks;
    int64_t part_rows;
    int64_t column_step, rank_step;  // of partial sums
    Dropout dropout;
    float *partial, *product;  // [parts, columns * rank], [columns / kColumns, rows, rank]
};

template <typename T, int kRankTiles, bool kProduct>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const ReduceParams p) {
    constexpr int kRanks = 8 * kRankTiles;
    using Wide = Tile<T, kRows, kColumns>;
    using Thin = Tile<float, kRows, kRanks>;
    using Factor = Tile<float, kProduct ? kRanks : 1, kColumns>;
    constexpr int kStageBytes = Wide::kBytes + Thin::kBytes;
    constexpr int kStages = kStagesThatFit<kStageBytes, Factor::kBytes>;
    static_assert(kStages >= 2, "");
    PEFTCORE_SHARED(uint8_t, memory, [kStages * kStageBytes]);
    PEFTCORE_SHARED(uint8_t, factor_tile, [Factor::kBytes]);

    const int64_t chunk = blockIdx.x / p.chunks, column = chunk * kColumns;
    const int first_rank = int(blockIdx.x % p.chunks) * kRanks;
    const int64_t first_row = int64_t(blockIdx.y) * p.part_rows;
    const int64_t last_row = first_row + p.part_rows < p.rows ? first_row + p.part_rows : p.rows;
    const Source<T> wide(p.wide, p.columns);
    const Source<float> thin(p.thin, p.rank);
    const auto fetch_stage = [&](int64_t stage, int slot) {
        uint8_t* to = memory + slot * kStageBytes;
        const int64_t row = first_row + stage * kRows;
        if (row < last_row) {
            fetch<Wide>(to, wide, row, last_row, column, p.columns);
            fetch<Thin>(to + Wide::kBytes, thin, row, last_row, first_rank, p.rank);
        }
        cp_async_commit();
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[2][kRankTiles][4] = {};
    const int64_t stages = (last_row - first_row + kRows - 1) / kRows;
    if constexpr (kProduct)  // arrives with the first stage
        fetch<Factor>(factor_tile, Source<float>(p.factor, p.columns), 0, p.rank, column, p.columns);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch_stage(s, s);
    int slot = 0;
    for (int64_t stage = 0; stage < stages; ++stage) {
        uint8_t *input = memory + slot * kStageBytes, *beside = input + Wide::kBytes;
        const int64_t row = first_row + stage * kRows;
        cp_async_wait<kStages - 2>();
        if (p.dropout.threshold != 0) drop<Wide>(input, p.dropout, row, last_row, column);
        __syncthreads();  // this stage has arrived, and the one before has been read
        fetch_stage(stage + kStages - 1, (slot + kStages - 1) % kStages);
#pragma unroll
        for (int step = 0; step < kRows; step += 16) {
            uint32_t left[2][4];  // columns of W are rows of the result: transposed
#pragma unroll
            for (int c = 0; c < 2; ++c)
                ldmatrix_x4_trans(left[c], input + (step + lane / 16 * 8 + lane % 8) * Wide::kPitch +
                                               (warp * 32 + c * 16 + lane / 8 % 2 * 8) * 2);
#pragma unroll
            for (int t = 0; t < kRankTiles; t += 2) {
                if (first_rank + t * 8 >= p.rank) break;
                Tf32Right right[2];
                load_right<Thin, true>(right, beside, t * 8, step);
#pragma unroll
                for (int c = 0; c < 2; ++c)
#pragma unroll
                    for (int i = 0; i < 2; ++i) tf32_multiply<T>(d[c][t + i], left[c], right[i]);
            }
        }
        if constexpr (kProduct) {  // a warp has 16 rows and 8 ranks
            static_assert(kRows == 32 && kRankTiles == 2 && kWarps == 4, "");
            const int warp_row = warp % 2 * 16, warp_rank = warp / 2 * 8;
            float e[4] = {};
#pragma unroll
            for (int k = 0; k < kColumns; k += 16) {
                uint32_t left[4];
                load_left<Wide>(left, input, warp_row, k);
                Tf32Right right[1];
                load_right<Factor>(right, factor_tile, warp_rank, k);
                tf32_multiply<T>(e, left, right[0]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t m = row + warp_row + lane / 4 + i / 2 * 8;
                const int j = warp_rank + lane % 4 * 2 + i % 2;
                if (m < last_row && j < p.rank) p.product[(chunk * p.rows + m) * p.rank + j] = e[i];
            }
        }
        slot = (slot + 1) % kStages;
    }
    cp_async_wait<0>();

    float* partial = p.partial + blockIdx.y * p.columns * p.rank;
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int t = 0; t < kRankTiles; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t k = column + warp * 32 + c * 16 + lane / 4 + i / 2 * 8;
                const int j = first_rank + t * 8 + lane % 4 * 2 + i % 2;
                if (k < p.columns && j < p.rank) partial[k * p.column_step + j * p.rank_step] = d[c][t][i];
            }
}

// Chosen by the shape alone, so that results are the same on every GPU.
struct Plan {
    int64_t column_chunks, rank_chunks, part_rows, parts;
};

Plan plan_of(int64_t rows, int64_t columns, int rank) {
    Plan plan;
    plan.column_chunks = (columns + kColumns - 1) / kColumns;
    plan.rank_chunks = (rank + kRankChunk - 1) / kRankChunk;
    const int64_t blocks = plan.column_chunks * plan.rank_chunks;
    const int64_t wanted = (kBlocksWanted + blocks - 1) / blocks;
    const int64_t most = (rows + kRowsOfPart - 1) / kRowsOfPart;
    const int64_t parts = wanted < most ? wanted : most;
    plan.part_rows = ((rows + parts - 1) / parts + kRows - 1) / kRows * kRows;
    plan.parts = (rows + plan.part_rows - 1) / plan.part_rows;
    return plan;
}

template <typename T>
const char* launch(const ReduceParams& p, const Plan& plan, void* stream) {
    const dim3 grid(unsigned(plan.column_chunks * plan.rank_chunks), unsigned(plan.parts));
    if (p.product != nullptr)
        return PEFTCORE_LAUNCH((reduce_kernel<T, 2, true>), grid, kThreads, 0, stream, p);
    return p.rank <= 16 ? PEFTCORE_LAUNCH((reduce_kernel<T, 2, false>), grid, kThreads, 0, stream, p)
                        : PEFTCORE_LAUNCH((reduce_kernel<T, 8, false>), grid, kThreads, 0, stream, p);
}

const char* reduce(ReduceParams& p, Dtype dtype, void* out, int out_dtype, bool transposed, void* stream) {
    const Plan plan = plan_of(p.rows, p.columns, p.rank);
    p.chunks = int(plan.rank_chunks);
    p.part_rows = plan.part_rows;
    p.column_step = transposed ? 1 : p.rank;
    p.rank_step = transposed ? p.columns : 1;
    const char* error = "W must have 16 bits";
    if (dtype == Dtype::kHalf) error = launch<Half>(p, plan, stream);
    if (dtype == Dtype::kBFloat16) error = launch<BFloat16>(p, plan, stream);
    if (error != nullptr) return error;
    return peftcore_lora_sum(p.partial, plan.parts, p.columns * p.rank, 1, out, out_dtype, stream);
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" int64_t peftcore_lora_reduce_workspace(int64_t rows, int64_t columns, int rank) {
    if (rows == 0 || columns == 0 || rank == 0) return 0;
    return peftcore::lora::plan_of(rows, columns, rank).parts * columns * rank;
}

extern "C" int64_t peftcore_lora_product_workspace(int64_t rows, int64_t columns, int rank) {
    using namespace peftcore::lora;
    return (columns + kColumns - 1) / kColumns * rows * rank;
}

extern "C" const char* peftcore_lora_reduce(const peftcore::lora::Wide* wide, const float* thin, int rank,
                                            const peftcore::lora::Dropout* dropout, float* partial, void* out,
                                            int out_dtype, bool transposed, void* stream) {
    using namespace peftcore::lora;
    if (wide->columns == 0 || rank == 0) return nullptr;
    if (wide->rows == 0)
        return peftcore_lora_sum(partial, 0, wide->columns * rank, 1, out, out_dtype, stream);
    ReduceParams p = {};
    p.wide = wide->values;
    p.thin = thin;
    p.rows = wide->rows;
    p.columns = wide->columns;
    p.rank = rank;
    p.dropout = *dropout;
    p.partial = partial;
    return reduce(p, wide->dtype, out, out_dtype, transposed, stream);
}

extern "C" const char* peftcore_lora_reduce_and_product(const peftcore::lora::Wide* wide, const float* thin,
                                                        const float* factor, int rank, float scale,
                                                        float* partial, float* product_partial, void* out,
                                                        int out_dtype, float* product, void* stream) {
    using namespace peftcore::lora;
    const int64_t rows = wide->rows, columns = wide->columns;
    if (rank > kOnePassMaxRank) return "more ranks than one pass takes";
    if (rows == 0 || columns == 0 || rank == 0) {  // sums of nothing
        const char* error = peftcore_lora_sum(partial, 0, columns * rank, 1, out, out_dtype, stream);
        return error ? error
                     : peftcore_lora_sum(partial, 0, rows * rank, 1, product, int(Dtype::kFloat), stream);
    }
    ReduceParams p = {};
    p.wide = wide->values;
    p.thin = thin;
    p.factor = factor;
    p.rows = rows;
    p.columns = columns;
    p.rank = rank;
    p.partial = partial;
    p.product = product_partial;
    const char* error = reduce(p, wide->dtype, out, out_dtype, false, stream);
    if (error != nullptr) return error;
    return peftcore_lora_sum(product_partial, (columns + kColumns - 1) / kColumns, rows * rank, scale,
                             product, int(Dtype::kFloat), stream);
}

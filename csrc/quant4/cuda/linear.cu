// y = x Wᵀ + b for few rows of x, directly from 4 bits, with LoRA's s Fᵀ, whose operands are fp32. Written for
// bandwidth and tested on the emulator; not measured on a GPU.
//
// rows_kernel (fp16, bf16; up to 8 rows, columns that are whole blocks of 64): rows.cuh; panel_kernel (up to 64):
// panel.cuh. tensor_kernel (fp16, bf16; other columns): linear.cuh. s is computed by an earlier launch; in
// lora/cuda/one_launch.cu by the same one.
//
// simple_kernel (fp32, and shapes without 16-byte pieces): a warp for each row of W, simple.cuh.
#include "common/cuda_dispatch.cuh"
#include "common/cuda_sum.h"
#include "common/cuda_tickets.h"
#include "quant4/cuda/linear.cuh"
#include "quant4/cuda/panel.cuh"
#include "quant4/cuda/quant4_cuda.h"
#include "quant4/cuda/rows.cuh"
#include "quant4/cuda/simple.cuh"
#include "quant4/format.h"

namespace peftcore {
namespace quant4 {
namespace {

template <typename T, int kTiles, int kStage, int kStages>
__global__ void __launch_bounds__(kThreads) tensor_kernel(const LinearLaunch p) {
    tensor_tile<T, kTiles, kStage, kStages>(p, int64_t(blockIdx.x) * kRows);
}

template <typename T, int kParts, typename Scales>
__global__ void __launch_bounds__(kThreads, 4) rows_kernel(const LinearLaunch p) {
    rows_tile<T, kParts, 1, Scales>(p, int64_t(blockIdx.x) * (16 / kParts), ReadyBranch{p});
}

template <typename T, int kTiles, typename Scales>
__global__ void __launch_bounds__(kPanelThreads, 1)
    panel_kernel(const LinearLaunch p, unsigned row_blocks, uint32_t split_columns) {
    const unsigned splits = gridDim.x / row_blocks, split = blockIdx.x % splits;  // the splits of a cluster
    const uint32_t begin = split * split_columns, columns = uint32_t(p.weight.columns);
    panel_tile<T, kTiles, Scales>(p, int64_t(blockIdx.x / splits) * kPanelRows, begin,
                                  begin + split_columns < columns ? begin + split_columns : columns,
                                  int(split), int(splits));
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) simple_kernel(const LinearLaunch p) {
    PEFTCORE_SHARED(float, quant_map, [16]);
    using Scales = AnyScales<true>;
    PEFTCORE_SHARED(float, nested_quant_map, [Scales::kEntries]);
    const Scales scales = Scales::load(p.weight, quant_map, nested_quant_map);
    __syncthreads();
    const int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (n < p.weight.rows) simple_row<T, kVector>(p, quant_map, scales, n, int(blockIdx.y) * kSimpleTile);
}

// Division of W among panel_kernel's blocks: chosen by the shape only, so that results are the same on every GPU.
struct PanelPlan {
    unsigned row_blocks, splits;  // 0 splits: a shape for another kernel
    uint32_t split_columns;
};

PanelPlan panel_plan(const void* x, Dtype dtype, int batch, const WeightView& weight) {
    constexpr int64_t kMostColumns = INT32_MAX / kLinearMaxBatch;  // x has numbers of 32 bits
    if (dtype == Dtype::kFloat || batch <= 8 || weight.columns == 0 || weight.columns > kMostColumns ||
        !in_pieces(x, weight) || !in_lanes(weight))
        return {};
    PanelPlan plan;
    plan.row_blocks = unsigned(ceil_div(weight.rows, kPanelRows));
    const int64_t wanted = ceil_div(cuda_tuning().panel_blocks, plan.row_blocks);
    const Parts splits = parts_of(weight.columns, kPanelStep, wanted, wanted);
    plan.splits = unsigned(splits.count);
    plan.split_columns = uint32_t(splits.size);
    return plan;
}

template <typename T, int kTiles, typename Scales>
const char* launch_panel(LinearLaunch p, const PanelPlan& plan, Dtype dtype, void* stream) {
    constexpr int kBytes = panel_bytes<kTiles>();
    constexpr auto kernel = panel_kernel<T, kTiles, Scales>;
    if (const char* error = PEFTCORE_ALLOW_SHARED(kernel, kBytes)) return error;
    const unsigned blocks = plan.row_blocks * plan.splits;
    p.clusters = (plan.splits == 2 || plan.splits == 4 || plan.splits == 8) &&
                 PEFTCORE_CLUSTERS_FIT(kernel, plan.splits, kPanelThreads, kBytes, stream);
    if (p.clusters)
        return PEFTCORE_LAUNCH_CLUSTERS(kernel, plan.splits, blocks, kPanelThreads, kBytes, stream, p,
                                        plan.row_blocks, plan.split_columns);
    p.tickets = plan.splits > 1 ? peftcore_tickets(int(plan.row_blocks), stream) : nullptr;
    if (const char* error = PEFTCORE_LAUNCH(kernel, blocks, kPanelThreads, kBytes, stream, p, plan.row_blocks,
                                            plan.split_columns))
        return error;
    if (plan.splits == 1 || p.tickets != nullptr) return nullptr;
    return peftcore_sum(p.partial, plan.splits, p.batch * p.weight.rows, 1, p.y, int(dtype), stream);
}

template <typename T>
const char* launch_simple(const LinearLaunch& p, void* stream) {
    const Grid grid(ceil_div(p.weight.rows, kWarps), ceil_div(p.batch, kSimpleTile));
    return dispatch_flag(in_vectors(p.x, 4 * sizeof(T), 4, p.weight), [&](auto vectors) {
        constexpr int kVector = decltype(vectors)::value ? 4 : 1;
        return PEFTCORE_LAUNCH((simple_kernel<T, kVector>), grid, kThreads, 0, stream, p);
    });
}

template <typename T, typename Scales>
const char* launch_rows(const LinearLaunch& p, void* stream) {
    return dispatch_flag(p.batch <= 4, [&](auto halves) {
        constexpr int kParts = decltype(halves)::value ? 2 : 1;
        const int64_t blocks = ceil_div(p.weight.rows, kRows / kParts);
        return PEFTCORE_LAUNCH((rows_kernel<T, kParts, Scales>), blocks, kThreads, 0, stream, p);
    });
}

template <typename T>
const char* launch_tensor(const LinearLaunch& p, void* stream) {
    const int64_t blocks = ceil_div(p.weight.rows, kRows);
    return dispatch_size<1, 2, 3, 4, 8>(ceil_div(p.batch, 8), [&](auto tiles) {
        constexpr int kTiles = decltype(tiles)::value;
        // As many stages as fit in 48 KiB of shared memory.
        constexpr int kStage = kTiles < 4 ? 64 : 32;
        constexpr int kStages = kTiles == 1 ? 4 : kTiles == 3 || kTiles == 8 ? 2 : 3;
        return PEFTCORE_LAUNCH((tensor_kernel<T, kTiles, kStage, kStages>), blocks, kThreads, 0, stream, p);
    });
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore

extern "C" int64_t peftcore_quant4_linear_workspace(const void* x, int dtype, int batch,
                                                    const peftcore::WeightView* weight) {
    using namespace peftcore::quant4;
    const unsigned splits = panel_plan(x, Dtype(dtype), batch, *weight).splits;
    return splits > 1 ? splits * batch * weight->rows : 0;
}

extern "C" const char* peftcore_quant4_linear(const void* x, int dtype, int batch,
                                              const peftcore::WeightView* weight, const void* bias,
                                              const float* thin, const float* factor, int rank,
                                              float* partial, void* y, void* stream) {
    using namespace peftcore;
    using namespace peftcore::quant4;
    if (batch == 0 || weight->rows == 0) return nullptr;
    if (batch > kLinearMaxBatch) return "more rows of x than the kernel takes";
    const LinearLaunch p{*weight, batch, x, bias, thin, factor, rank, y, partial, nullptr, false};
    const PanelPlan plan = panel_plan(x, Dtype(dtype), batch, *weight);
    return dispatch_dtype(Dtype(dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr (sizeof(T) == 2) {
            if (in_pieces(x, *weight) && in_lanes(*weight) && (plan.splits > 0 || batch <= 8))
                return dispatch_lane_scales(*weight, [&](auto scales) {
                    using Scales = typename decltype(scales)::type;
                    if (plan.splits == 0) return launch_rows<T, Scales>(p, stream);
                    return dispatch_size<2, 4, 8>(ceil_div(batch, 8), [&](auto tiles) {
                        return launch_panel<T, decltype(tiles)::value, Scales>(p, plan, Dtype(dtype), stream);
                    });
                });
            if (in_pieces(x, *weight)) return launch_tensor<T>(p, stream);
        }
        return launch_simple<T>(p, stream);
    });
}

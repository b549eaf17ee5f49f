// y = x Wᵀ + b for few rows of x, directly from 4 bits, with LoRA's s Fᵀ, whose operands are fp32. Written for
// bandwidth and tested on the emulator; not measured on a GPU.
//
// rows_kernel (up to 8 rows): rows.cuh; panel_kernel (up to 64): panel.cuh. Both take fp16 and bf16, and a W whose rows
// are whole blocks of 64 columns; every other x and W is for the library, with W unpacked (ops.cpp). s is computed by an
// earlier launch; in lora/cuda/one_launch.cu by the same one.
#include "common/cuda_dispatch.cuh"
#include "common/cuda_sum.h"
#include "common/cuda_tickets.h"
#include "quant4/cuda/linear.cuh"
#include "quant4/cuda/panel.cuh"
#include "quant4/cuda/quant4_cuda.h"
#include "quant4/cuda/rows.cuh"

namespace peftcore {
namespace quant4 {
namespace {

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

// Estimated, not measured: at 64 rows panel_kernel takes about half of the time of only unpacking W to memory
// (benchmarks/cuda_bounds). Sums of more rows would not fit into registers.
constexpr int kRowsMaxBatch = 8, kPanelMaxBatch = 64;

// Division of W among panel_kernel's blocks: chosen by the shape only, so that results are the same on every GPU.
struct PanelPlan {
    unsigned row_blocks, splits;
    uint32_t split_columns;
};

PanelPlan panel_plan(const WeightView& weight) {
    PanelPlan plan;
    plan.row_blocks = unsigned(ceil_div(weight.rows, kPanelRows));
    const int64_t target_splits = ceil_div(cuda_tuning().panel_blocks, plan.row_blocks);
    const Parts splits = parts_of(weight.columns, kPanelStep, target_splits, target_splits);
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
    p.clusters = cuda_tuning().clusters && (plan.splits == 2 || plan.splits == 4 || plan.splits == 8) &&
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

template <typename T, typename Scales>
const char* launch_rows(const LinearLaunch& p, void* stream) {
    return dispatch_flag(p.batch <= 4, [&](auto halves) {
        constexpr int kParts = decltype(halves)::value ? 2 : 1;
        const int64_t blocks = ceil_div(p.weight.rows, kRows / kParts);
        return PEFTCORE_LAUNCH((rows_kernel<T, kParts, Scales>), blocks, kThreads, 0, stream, p);
    });
}

}  // namespace
}  // namespace quant4
}  // namespace peftcore

extern "C" bool peftcore_quant4_linear_takes(const void* x, int dtype, int64_t batch,
                                             const peftcore::WeightView* weight) {
    using namespace peftcore;
    using namespace peftcore::quant4;
    constexpr int64_t kMostColumns = INT32_MAX / kPanelMaxBatch;  // x has numbers of 32 bits
    return Dtype(dtype) != Dtype::kFloat && batch <= kPanelMaxBatch && batch <= cuda_tuning().panel_rows &&
           weight->columns <= kMostColumns && in_pieces(x, *weight) && in_lanes(*weight);
}

extern "C" int64_t peftcore_quant4_linear_workspace(int batch, const peftcore::WeightView* weight) {
    using namespace peftcore::quant4;
    const unsigned splits = batch <= kRowsMaxBatch ? 1 : panel_plan(*weight).splits;
    return splits > 1 ? splits * batch * weight->rows : 0;
}

extern "C" const char* peftcore_quant4_linear(const void* x, int dtype, int batch,
                                              const peftcore::WeightView* weight, const void* bias,
                                              const float* thin, const float* factor, int rank,
                                              float* partial, void* y, void* stream) {
    using namespace peftcore;
    using namespace peftcore::quant4;
    if (batch == 0 || weight->rows == 0) return nullptr;
    const LinearLaunch p{*weight, batch, x, bias, thin, factor, rank, y, partial, nullptr, false};
    return dispatch_16_bits(Dtype(dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        return dispatch_lane_scales(*weight, [&](auto scales) {
            using Scales = typename decltype(scales)::type;
            if (batch <= kRowsMaxBatch) return launch_rows<T, Scales>(p, stream);
            return dispatch_size<2, 4, 8>(ceil_div(batch, 8), [&](auto tiles) {
                return launch_panel<T, decltype(tiles)::value, Scales>(p, panel_plan(*weight), Dtype(dtype),
                                                                       stream);
            });
        });
    });
}

// y = x Wᵀ + b + s Bᵀ and s = c x Aᵀ in one launch, for few rows of x and a W in 4 bits, as in generation, where a
// launch takes as long as the work. Tested on the emulator; not measured on a GPU.
//
// A block has rows of W (quant4/cuda/rows.cuh). While its first codes are loaded it takes a rank of s that no block has
// yet; at its end it waits until all ranks are complete, and meanwhile takes any that are left. It waits only for
// blocks that are already running, so all blocks finish in whatever order the GPU starts them. A rank is the same sum
// in every block: every run gives the same bits.
#include "common/cuda_dispatch.cuh"
#include "common/cuda_tickets.cuh"
#include "common/cuda_tickets.h"
#include "lora/cuda/rank_dot.cuh"
#include "quant4/cuda/rows.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kCounters = 3;  // ranks taken, ranks done, blocks done

struct Launch {
    quant4::LinearLaunch linear;
    OneLaunch lora;
    unsigned* counters;
};

// s and B for rows_tile. kRows: most rows of x.
template <typename T, int kRows>
struct SameLaunchBranch {
    static constexpr bool kLater = true;
    const Launch& p;
    int64_t first_row;
    int rows;  // of W, in a block

    // Computes the first rank that no block has taken, if any.
    __device__ bool take_rank() const {
        const unsigned rank = take_ticket<Order::kNone>(p.counters);
        if (rank >= unsigned(p.lora.rank)) return false;
        const int64_t columns = p.linear.weight.columns, bytes = p.lora.a_dtype == Dtype::kFloat ? 4 : 2;
        RankDot part = {};
        part.x = p.linear.x;
        part.rows = p.linear.batch;
        part.columns = columns;
        part.factor = static_cast<const uint8_t*>(p.lora.a) + rank * columns * bytes;
        part.factor_dtype = p.lora.a_dtype;
        part.scale = p.lora.scale;
        part.out = p.lora.s + rank;
        part.stride = p.lora.rank;
        rank_dot<T, kRows, true>(part);
        take_ticket<Order::kRelease>(p.counters + 1);
        return true;
    }
    __device__ void begin() const {
        const int64_t row = first_row + threadIdx.x,
                      bytes = p.lora.rank * (p.lora.b_dtype == Dtype::kFloat ? 4 : 2);
        if (int(threadIdx.x) < rows && row < p.linear.weight.rows)
            for (int64_t at = 0; at < bytes; at += 128)
                prefetch(static_cast<const uint8_t*>(p.lora.b) + row * bytes + at);
        take_rank();
    }
    __device__ void wait() const {
        bool left = true;
        while (read_counter(p.counters + 1) < unsigned(p.lora.rank)) left = left && take_rank();
    }
    // Not through L1, which does not see the writes of other blocks.
    __device__ float thin(int64_t m, int j) const {
        return m < p.linear.batch ? __ldcg(p.lora.s + m * p.lora.rank + j) : 0;
    }
    __device__ float factor(int64_t n, int j) const {
        return n < p.linear.weight.rows ? value_at(p.lora.b, p.lora.b_dtype, n * p.lora.rank + j) : 0;
    }
};

template <typename T, int kParts, typename Scales>
__global__ void __launch_bounds__(kThreads, 4) one_launch_kernel(const Launch p) {
    constexpr int kRows = 16 / kParts;
    const int64_t row = int64_t(blockIdx.x) * kRows;
    quant4::rows_tile<T, kParts, 1, Scales>(p.linear, row, SameLaunchBranch<T, 8 / kParts>{p, row, kRows});
    if (comes_last(p.counters + 2, gridDim.x) && threadIdx.x < 2) p.counters[threadIdx.x] = 0;
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" const char* peftcore_lora_one_launch(const peftcore::lora::OneLaunch* call,
                                                const peftcore::WeightView* weight, bool* launched,
                                                void* stream) {
    using namespace peftcore::lora;
    const OneLaunch& lora = *call;
    *launched = false;
    if (lora.dtype == Dtype::kFloat || lora.batch == 0 || lora.batch > kRankDotRows || lora.rank == 0)
        return nullptr;
    if (lora.batch > peftcore::cuda_tuning().one_launch_rows) return nullptr;
    if (weight->rows == 0 || weight->columns == 0 || !peftcore::quant4::in_pieces(lora.x, *weight) ||
        !peftcore::quant4::in_lanes(*weight))
        return nullptr;
    unsigned* counters = peftcore_tickets(kCounters, stream);
    if (counters == nullptr) return nullptr;
    *launched = true;
    Launch p = {};
    p.linear = {*weight,   lora.batch, lora.x,  lora.bias, nullptr, nullptr,
                lora.rank, lora.y,     nullptr, nullptr,   false};
    p.lora = lora;
    p.counters = counters;
    return peftcore::dispatch_16_bits(lora.dtype, [&](auto type) {
        return peftcore::quant4::dispatch_lane_scales(*weight, [&](auto scales) {
            return peftcore::dispatch_flag(lora.batch <= 4, [&](auto halves) {
                using T = typename decltype(type)::type;
                using Scales = typename decltype(scales)::type;
                constexpr int kParts = decltype(halves)::value ? 2 : 1;
                const int64_t blocks = peftcore::ceil_div(weight->rows, 16 / kParts);
                return PEFTCORE_LAUNCH((one_launch_kernel<T, kParts, Scales>), blocks, kThreads, 0, stream,
                                       p);
            });
        });
    });
}

// LoRA's factors as the other kernels take them, fp32 and some of them transposed: both in one launch, for they are
// small, and a launch is not.
#include "common/integers.h"
#include "common/typed.cuh"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kSide = 32;  // of a block's tile

struct Copies {  // by name: an index known only at run time would put them on the stack
    FactorCopy first, second;
};

__global__ void __launch_bounds__(kThreads) copy_kernel(const Copies copies) {
    PEFTCORE_SHARED(float, tile, [kSide][kSide + 1]);
    const FactorCopy own = blockIdx.y == 0 ? copies.first : copies.second;
    const int64_t across = ceil_div(own.columns, kSide);
    if (blockIdx.x >= across * ceil_div(own.rows, kSide)) return;
    const int64_t row = blockIdx.x / across * kSide, column = blockIdx.x % across * kSide;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = warp; i < kSide; i += kWarps)
        if (row + i < own.rows && column + lane < own.columns)
            tile[i][lane] = value_at(own.from, own.dtype, (row + i) * own.columns + column + lane);
    __syncthreads();
    for (int i = warp; i < kSide; i += kWarps) {
        const int r = own.transposed ? lane : i, c = own.transposed ? i : lane;
        if (row + r >= own.rows || column + c >= own.columns) continue;
        const int64_t to =
            own.transposed ? (column + c) * own.rows + row + r : (row + r) * own.columns + column + c;
        own.to[to] = tile[r][c];
    }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" const char* peftcore_lora_copy_factors(const peftcore::lora::FactorCopy* copies, int count,
                                                  void* stream) {
    using namespace peftcore::lora;
    if (count > 2) return "more factors than a launch takes";
    Copies own = {};
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
        (i == 0 ? own.first : own.second) = copies[i];
        const int64_t tiles =
            peftcore::ceil_div(copies[i].rows, kSide) * peftcore::ceil_div(copies[i].columns, kSide);
        blocks = blocks < tiles ? tiles : blocks;
    }
    if (blocks == 0) return nullptr;
    return PEFTCORE_LAUNCH(copy_kernel, dim3(unsigned(blocks), unsigned(count)), kThreads, 0, stream, own);
}

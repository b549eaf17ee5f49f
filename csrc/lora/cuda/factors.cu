// LoRA's factors as the other kernels take them: fp32, some of them transposed. Both in one launch, which takes longer
// than the copies.
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
    const FactorCopy copy = blockIdx.y == 0 ? copies.first : copies.second;
    const int64_t across = ceil_div(copy.columns, kSide);
    if (blockIdx.x >= across * ceil_div(copy.rows, kSide)) return;
    const int64_t row = blockIdx.x / across * kSide, column = blockIdx.x % across * kSide;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = warp; i < kSide; i += kWarps)
        if (row + i < copy.rows && column + lane < copy.columns)
            tile[i][lane] = value_at(copy.from, copy.dtype, (row + i) * copy.columns + column + lane);
    __syncthreads();
    for (int i = warp; i < kSide; i += kWarps) {
        const int r = copy.transposed ? lane : i, c = copy.transposed ? i : lane;
        if (row + r >= copy.rows || column + c >= copy.columns) continue;
        const int64_t to =
            copy.transposed ? (column + c) * copy.rows + row + r : (row + r) * copy.columns + column + c;
        copy.to[to] = tile[r][c];
    }
}

}  // namespace
}  // namespace lora
}  // namespace peftcore

extern "C" const char* peftcore_lora_copy_factors(const peftcore::lora::FactorCopy* copies, int count,
                                                  void* stream) {
    using namespace peftcore::lora;
    if (count > 2) return "more factors than a launch takes";
    Copies both = {};
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
        (i == 0 ? both.first : both.second) = copies[i];
        const int64_t tiles =
            peftcore::ceil_div(copies[i].rows, kSide) * peftcore::ceil_div(copies[i].columns, kSide);
        blocks = blocks < tiles ? tiles : blocks;
    }
    if (blocks == 0) return nullptr;
    return PEFTCORE_LAUNCH(copy_kernel, dim3(unsigned(blocks), unsigned(count)), kThreads, 0, stream, both);
}

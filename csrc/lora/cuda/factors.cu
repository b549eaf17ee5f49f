// LoRA's factors as the other kernels take them: fp32, some of them transposed. A launch takes longer than a copy, so
// that one launch copies many.
#include "common/cuda_dispatch.cuh"
#include "common/integers.h"
#include "common/typed.cuh"
#include "lora/cuda/tiles.cuh"

namespace peftcore {
namespace lora {
namespace {

constexpr int kSide = 32;  // of a block's tile

constexpr int kFewCopies = 8;    // fewer would be put on the stack: their index is known only at run time
constexpr int kMostCopies = 64;  // of a launch: parameters of a kernel have 4 KiB

template <int kCopies>
struct Copies {
    FactorCopy copies_of_launch[kCopies];
};

template <int kCopies>
__global__ void __launch_bounds__(kThreads) copy_kernel(const Copies<kCopies> copies) {
    PEFTCORE_SHARED(float, tile, [kSide][kSide + 1]);
    const FactorCopy copy = copies.copies_of_launch[blockIdx.y];
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
    using namespace peftcore;
    using namespace peftcore::lora;
    for (int first = 0; first < count; first += kMostCopies) {
        const int batch = int(least(count - first, kMostCopies));
        int64_t blocks = 0;
        for (int i = first; i < first + batch; ++i) {
            const int64_t tiles = ceil_div(copies[i].rows, kSide) * ceil_div(copies[i].columns, kSide);
            blocks = blocks < tiles ? tiles : blocks;
        }
        if (blocks == 0) continue;
        const char* error = dispatch_size<kFewCopies, kMostCopies>(batch, [&](auto size) {
            constexpr int kCopies = decltype(size)::value;
            Copies<kCopies> params = {};
            for (int i = 0; i < batch; ++i) params.copies_of_launch[i] = copies[first + i];
            return PEFTCORE_LAUNCH(copy_kernel<kCopies>, Grid(blocks, batch), kThreads, 0, stream, params);
        });
        if (error != nullptr) return error;
    }
    return nullptr;
}

// Launch parameters that depend on the GPU rather than on a shape, in one table by compute capability (cuda_tuning.cu).
// All are estimates; none has been measured.
//
// PEFTCORE_CUDA_TUNING="clusters=0,panel_blocks=64" sets values in every row, to time one value against another.
#pragma once

#include <cstdint>

namespace peftcore {

struct CudaTuning {
    int architecture;  // compute capability, 10 major + minor, from which the row applies

    // Target number of blocks where a shape gives too few and a kernel therefore divides its sums among blocks: two per
    // multiprocessor, or one if a block fills it. They determine the order of additions, so all rows of the table agree:
    // results are the same on every GPU.
    int down_blocks, reduce_blocks, panel_blocks;

    // Maximum number of blocks of grid-stride kernels.
    int loop_blocks, quantize_blocks, step_blocks;

    // Maximum number of rows of x: for y and s in one launch (at most kRankDotRows), and for products directly from 4
    // bits (at most kPanelMaxBatch). Beyond, s has its own launch, and W is dequantized for cuBLAS.
    int one_launch_rows, panel_rows;

    // 1: blocks that share a result add their sums in a cluster where the GPU has them. 0: through memory.
    int clusters;
};

}  // namespace peftcore

// The row of the current device. Thread safe.
extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning();
// The row of a compute capability; the first one for those below it.
extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning_of(int architecture);

namespace peftcore {

inline const CudaTuning& cuda_tuning() { return *peftcore_cuda_tuning(); }

// Number of blocks of `threads` threads for a grid-stride loop over `count` values.
inline unsigned blocks_once(int64_t count, int threads) {
    const int64_t blocks = count / threads + (count % threads != 0), most = cuda_tuning().loop_blocks;
    return unsigned(blocks < most ? blocks : most);
}

}  // namespace peftcore

// Numbers that were chosen for a GPU and not for a shape, in one table by GPU (cuda_tuning.cu). All are estimates: none
// has been measured.
#pragma once

#include <cstdint>

namespace peftcore {

struct CudaTuning {
    int architecture;  // compute capability, 10 major + minor, from which the row applies

    // Blocks wanted of kernels whose sums are divided among blocks where a shape gives too few: two for each
    // multiprocessor, or one for blocks that fill one. These decide the order of additions: all rows agree, so that
    // results are the same on every GPU.
    int down_blocks, reduce_blocks, panel_blocks;

    // Most blocks of kernels whose blocks loop over what is left.
    int loop_blocks, quantize_blocks, step_blocks;
};

}  // namespace peftcore

// The row of the current device. Thread safe.
extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning();
// The row of a compute capability; the first one for those below it.
extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning_of(int architecture);

namespace peftcore {

inline const CudaTuning& cuda_tuning() { return *peftcore_cuda_tuning(); }

// Number of blocks of `threads` threads for a kernel whose threads go through `count` values in strides of the grid.
inline unsigned blocks_once(int64_t count, int threads) {
    const int64_t wanted = count / threads + (count % threads != 0), most = cuda_tuning().loop_blocks;
    return unsigned(wanted < most ? wanted : most);
}

}  // namespace peftcore

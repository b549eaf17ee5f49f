#include "common/cuda_launch.cuh"
#include "common/cuda_tuning.h"

#if !defined(PEFTCORE_EMULATOR)
#include <array>
#include <atomic>
#endif

namespace peftcore {
namespace {

constexpr CudaTuning kTuning[] = {
    // architecture, down, reduce, panel, loop, quantize, step
    {80, 264, 264, 128, 4096, 1056, 1056},
    {90, 264, 264, 128, 4096, 1056, 1056},
};

constexpr bool sums_agree() {
    for (const CudaTuning& row : kTuning)
        if (row.down_blocks != kTuning[0].down_blocks || row.reduce_blocks != kTuning[0].reduce_blocks ||
            row.panel_blocks != kTuning[0].panel_blocks)
            return false;
    return true;
}
static_assert(sums_agree(), "results would differ between GPUs in their last bits");

}  // namespace
}  // namespace peftcore

extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning_of(int architecture) {
    const peftcore::CudaTuning* best = peftcore::kTuning;
    for (const peftcore::CudaTuning& row : peftcore::kTuning)
        if (row.architecture <= architecture) best = &row;
    return best;
}

#if defined(PEFTCORE_EMULATOR)

extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning() { return peftcore_cuda_tuning_of(90); }

#else

extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning() {
    static std::array<std::atomic<const peftcore::CudaTuning*>, 64> rows{};  // by device
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) == cudaSuccess && device < int(rows.size())) {
        if (const peftcore::CudaTuning* row = rows[device]) return row;
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
            return rows[device] = peftcore_cuda_tuning_of(10 * major + minor);
    }
    (void)cudaGetLastError();  // else the next launch would report it
    return peftcore_cuda_tuning_of(0);
}

#endif

#include "build_facts.h"

namespace peftcore {

BuildFacts build_facts() {
    return {PEFTCORE_VERSION,   PEFTCORE_COMMIT, PEFTCORE_COMPILER,
            PEFTCORE_TORCH,     PEFTCORE_NVCC,   PEFTCORE_CUDA_ARCHITECTURES,
            PEFTCORE_CPU_LEVELS};
}

}  // namespace peftcore

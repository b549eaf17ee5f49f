// What this binary was built from and with. The values are compiler flags of build_facts.cpp only, so that a new
// commit rebuilds one small file.
#pragma once

namespace peftcore {

struct BuildFacts {
    const char* version;
    const char* commit;
    const char* compiler;
    const char* torch;
    const char* cuda_compiler;       // empty: built without CUDA
    const char* cuda_architectures;  // comma-separated, empty: none
    const char* cpu_levels;          // comma-separated
};

BuildFacts build_facts();

}  // namespace peftcore

// All kernels of the CPU in one table, and the one choice among its levels.
//
// A SIMD level fills entries over those of the level below it (levels.cpp). An operator reads the table once,
// at its entry, and asks for kernels, never for a level: what a level lacks is an empty entry.
#pragma once

#include <string>
#include <vector>

#include "gemm/cpu/kernels.h"
#include "gemm/cpu/skinny/kernels.h"
#include "lora/cpu/kernels.h"
#include "optim/cpu/kernels.h"
#include "quant4/cpu/kernels.h"
#include "quant4/cpu/linear/kernels.h"
#include "quant4/cpu/tiles/tiles.h"

namespace peftcore {

struct CpuKernels {
    const char* level;
    quant4::Kernels quant4;              // quantize, dequantize
    quant4::LinearKernels linear;        // few rows of x by a packed weight
    gemm::SkinnyKernel skinny[kDtypes];  // few rows of x by a dense weight, by their dtype
    gemm::ManyRows many_rows[kDtypes];   // of x, by its dtype
    lora::Kernels lora;                  // thin products
    optim::Kernels optim;                // optimizer steps
};

// Of the level in use: the best of what was compiled, what this CPU has, and what PEFTCORE_CPU_LEVEL allows.
// The first call reads that and throws std::invalid_argument if it names no available level.
const CpuKernels& cpu_kernels();

// Levels that this build contains and this CPU can run, lowest first.
std::vector<std::string> cpu_levels();

// Changes the level in use; throws std::invalid_argument for a name that is not available here. Calls that
// have begun end with the level they began with.
void set_cpu_level(const std::string& name);

}  // namespace peftcore

// Table of all CPU kernels, and the choice among its levels.
//
// A SIMD level overwrites entries of the level below it (levels.cpp). An operator reads the table once, at its entry,
// and looks for kernels, never for a level: a kernel that a level does not have is an empty entry.
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
    lora::Kernels lora;                  // low-rank products
    optim::Kernels optim;                // optimizer steps
};

// Kernels of the level in use: PEFTCORE_CPU_LEVEL's, or the best one that was compiled and that this CPU has. The first
// call reads the variable and throws std::invalid_argument if it does not name an available level.
const CpuKernels& cpu_kernels();

// Levels that this build contains and this CPU can run, lowest first.
std::vector<std::string> cpu_levels();

// Changes the level in use; throws std::invalid_argument for a name that is not available here. Running
// calls finish at the level they started with.
void set_cpu_level(const std::string& name);

}  // namespace peftcore

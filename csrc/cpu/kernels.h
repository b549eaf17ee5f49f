// Table of all CPU kernels, and the choice among its levels.
//
// A SIMD level overwrites entries of the level below it (levels.cpp). An operator reads the table once, at its entry,
// and looks for kernels, never for a level: a kernel that a level does not have is an empty entry.
#pragma once

#include <string>
#include <vector>

#include "attention/cpu/kernels.h"
#include "cross_entropy/cpu/kernels.h"
#include "elementwise/cpu/kernels.h"
#include "gemm/cpu/kernels.h"
#include "gemm/cpu/skinny/kernels.h"
#include "grouped/cpu/kernels.h"
#include "lora/cpu/kernels.h"
#include "norms/cpu/kernels.h"
#include "optim/cpu/kernels.h"
#include "quant4/cpu/kernels.h"
#include "quant4/cpu/linear/kernels.h"
#include "quant4/cpu/tiles/tiles.h"

namespace peftcore {

// Arrays are indexed by the Dtype of x.
struct CpuKernels {
    const char* level;
    quant4::Kernels quant4;              // quantize, dequantize
    quant4::LinearKernels linear;        // few rows of x by a packed weight
    gemm::SkinnyKernel skinny[kDtypes];  // few rows of x by a dense weight
    gemm::ManyRows many_rows[kDtypes];   // many rows of x by any weight
    lora::Kernels lora;                  // low-rank products
    attention::Kernels attention[kDtypes];
    cross_entropy::Kernels cross_entropy[kDtypes];
    elementwise::Kernels elementwise;  // activations, gates, dropout, scaling by column
    norms::Kernels norms;
    grouped::RowSumKernels row_sum[kDtypes];
    optim::Kernels optim;  // optimizer steps
};

// Returns the kernels of the level in use: PEFTCORE_CPU_LEVEL, or the best level in this build that the CPU supports. The
// first call reads the variable, and throws std::invalid_argument if that level is not available.
const CpuKernels& cpu_kernels();

// Returns the levels of this build that the CPU supports, lowest first.
std::vector<std::string> cpu_levels();

// Changes the level in use; throws std::invalid_argument for a name that is not available here. Running
// calls finish at the level they started with.
void set_cpu_level(const std::string& name);

}  // namespace peftcore

// Fills the table with all kernels that are loops over the vectors of one level.
#pragma once

#include "attention/cpu/attention.h"
#include "cpu/kernels.h"
#include "cross_entropy/cpu/class_blocks.h"
#include "cross_entropy/cpu/cross_entropy.h"
#include "elementwise/cpu/activated.h"
#include "elementwise/cpu/dropout.h"
#include "elementwise/cpu/gated.h"
#include "elementwise/cpu/scaled.h"
#include "grouped/cpu/sums_of_rows.h"
#include "lora/cpu/blocks.h"
#include "lora/cpu/rows.h"
#include "norms/cpu/rms_norm.h"
#include "norms/cpu/row_norms.h"
#include "simd/levels.h"

namespace peftcore {
namespace simd {

// Entries for x of one dtype.
template <typename Level>
static void fill_dtype(CpuKernels& table, Dtype dtype) {
    const int i = int(dtype);
    table.lora.thin[i] = lora::Blocks<Level>::kernels();
    table.lora.row[i] = lora::Rows<Level>::kernels();
    table.cross_entropy[i] = {.rows = cross_entropy::CrossEntropy<Level>::rows,
                              .class_block = cross_entropy::ClassBlocks<Level>::rows};
    table.elementwise.scale[i] = elementwise::Scaled<Level>::kernels();
    table.elementwise.gate[i] = elementwise::Gates<Level>::kernels();
    table.elementwise.activation[i] = elementwise::Activated<Level>::kernels();
    table.elementwise.dropout[i] = elementwise::DropRows<Level>::rows;
    table.norms.rms_norm[i] = norms::RmsNorm<Level>::kernels();
    table.norms.row_norms[i] = norms::RowNorms<Level>::norms;
    table.row_sum[i] = grouped::SumsOfRows<Level>::kernels();
    // With four lanes attention is no faster than PyTorch's.
    if constexpr (Level::kLanes >= 8)
        table.attention[i] = attention::Attention<Level>::kernels();
    else
        table.attention[i] = {};
}

template <Lanes Simd>
static void fill_loops(CpuKernels& table) {
    fill_dtype<Of<Simd, float>>(table, Dtype::kFloat);
    fill_dtype<Of<Simd, Half>>(table, Dtype::kHalf);
    fill_dtype<Of<Simd, BFloat16>>(table, Dtype::kBFloat16);
}

}  // namespace simd
}  // namespace peftcore

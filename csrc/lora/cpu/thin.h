// The thin products of kernels.h on tensors, divided among threads.
#pragma once

#include "common/tensors.h"
#include "lora/arguments.h"
#include "lora/cpu/kernels.h"

namespace peftcore {
namespace lora {

// A factor [inner, outer] as a kernel reads it (see kernels.h).
struct Factor {
    Tensor memory;
    int64_t width = 0;
    const void* units() const { return memory.const_data_ptr(); }
};

// From fp32, contiguous.
Factor arranged_factor(const Arrangement& arrangement, const Tensor& from, bool transposed);

// keep of x [rows, columns].
struct KeepMask {
    Tensor memory;
    Mask mask;
};

KeepMask keep_mask(const ThinKernels& kernels, const Dropout& dropout, const Tensor& x);

DownArgs down_args(const Tensor& x, const Factor& right, float factor, const Mask& keep, const Tensor& s);
void down(const ThinKernels& kernels, const DownArgs& args, int64_t rows);

// y += keep ∘ (s right), right in the plain arrangement.
void up(const ThinKernels& kernels, const Tensor& y, const Tensor& s, const Factor& right, const Mask& keep);

// out [r, columns] = leftᵀ (keep ∘ x); transposed: [columns, r]. `down_too`, if given, is of the same x and
// goes along, so that x comes from memory once.
void outer(const ThinKernels& kernels, const Tensor& x, const Tensor& left, const Tensor& out,
           bool transposed, const Mask& keep, const DownArgs* down_too);

}  // namespace lora
}  // namespace peftcore

// The low-rank products of kernels.h for tensors, divided among threads.
#pragma once

#include <array>

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

// Arranges a factor, fp32 and contiguous.
Factor arranged_factor(const Arrangement& arrangement, const Tensor& from, bool transposed);

// The mask keep of x [rows, columns].
struct KeepMask {
    Tensor memory;
    Mask mask;
};

// keep for rows of x, with the first row's number as dropout counts them.
KeepMask keep_mask(const ThinKernels& kernels, const Dropout& dropout, const Tensor& x,
                   int64_t first_row = 0);

DownArgs down_args(const Tensor& x, const Factor& right, float factor, const Mask& keep, const Tensor& s);
void down(const ThinKernels& kernels, const DownArgs& args, int64_t rows);

// y += keep ∘ (s right), right in the plain arrangement.
void up(const ThinKernels& kernels, const Tensor& y, const Tensor& s, const Factor& right, const Mask& keep);

// out [r, columns] = leftᵀ (keep ∘ x), or [columns, r] if `transposed`. If `down_too` is not nullptr, that product is
// computed in the same pass, so that x is read from memory once.
void outer(const ThinKernels& kernels, const Tensor& x, const Tensor& left, const Tensor& out,
           bool transposed, const Mask& keep, const DownArgs* down_too);

// Operands and results of the low-rank part of the backward pass: the gradients of A and B, and the left factor of dx.
struct ThinBackward {
    const Tensor &dy, &x, &s, &b;
    std::array<bool, 3> needs;  // of x, A and B
    double scale;
    const Dropout& dropout;
    int64_t first_row;      // as of `keep_mask`
    const Tensor& t;        // [rows, r]: the left factor of A in dx, if x or A needs a gradient
    const Tensor &da, &db;  // fp32, contiguous, if they are needed
};

// Fills t, da and db. All sizes are at least 1.
KeepMask thin_backward(const ThinKernels& kernels, const ThinBackward& call);

}  // namespace lora
}  // namespace peftcore

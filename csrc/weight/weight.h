// A frozen weight, checked once for all backends. Operators receive it as two arguments:
//
//   dense       tensors [W], W of shape [.., out, in]          packing []
//   in 4 bits   tensors [codes, absmax, quant_map]             packing [blocksize, 0, .., out, in]
//   and nested  .. [nested_absmax, nested_quant_map, nested_offset]    [blocksize, nested_blocksize, .., out, in]
//   MXFP4       tensors [codes, E8M0 scales, quant_map]    packing [32, kPowersOfTwo, .., out, in]
//   affine4     tensors [codes, scales, quant_map], or [.., zeros]    packing [blocksize, kAffine, .., out, in]
//
// Kernels and launchers take its `view`. The format: quant4/format.h. Its Python side: peftcore/ops/weight.py.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <array>

#include "weight/view.h"

namespace peftcore {

// In the place of nested_blocksize: scales are E8M0 bytes; fp32, fp16 or bf16, and blocks may have zero points.
constexpr int64_t kPowersOfTwo = -1, kAffine = -2;

void check_blocksize(int64_t blocksize, const char* op, const char* name = "blocksize",
                     int64_t least = kMinBlocksize);

// A codebook of `entries` fp32 values, contiguous.
at::Tensor checked_quant_map(const at::Tensor& quant_map, int64_t entries, const at::Device& device,
                             const char* op, const char* name = "quant_map");

class Weight {
 public:
    // Throws a TypeError or ValueError that names `op`, the tensor and the value found.
    Weight(at::TensorList tensors, at::IntArrayRef packing, const char* op);

    bool packed() const { return packed_; }
    int64_t blocksize() const { return int64_t(1) << shift_; }  // in 4 bits
    at::IntArrayRef sizes() const { return sizes_; }
    const at::Tensor& first() const { return parts_[0]; }  // W, or its codes

    // Sizes as a matrix, with the leading dimensions as rows.
    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }

    // Only for a contiguous dense weight or one in 4 bits; valid as long as this object.
    WeightView view() const;

    // View of one expert of [experts, out, in], without a copy. In 4 bits it must consist of whole blocks.
    WeightView expert(int64_t index, const char* op) const;

 private:
    enum Part {
        kCodes,
        kAbsmax,
        kQuantMap,
        kNestedAbsmax,
        kNestedQuantMap,
        kNestedOffset,
        kParts,
        kZeros = kParts
    };

    void set_sizes(at::IntArrayRef sizes, const char* op);

    bool packed_ = false;
    ScaleKind scales_ = ScaleKind::kFloat;
    int shift_ = 0, nested_shift_ = 0;
    int64_t rows_ = 1, columns_ = 1;
    at::DimVector sizes_;
    std::array<at::Tensor, kParts + 1> parts_;
};

}  // namespace peftcore

#include "weight/weight.h"

#include "common/check.h"
#include "common/integers.h"

namespace peftcore {

using at::Tensor;

void check_blocksize(int64_t blocksize, const char* op, const char* name, int64_t least) {
    TORCH_CHECK_VALUE(blocksize >= least && blocksize <= kMaxBlocksize && (blocksize & (blocksize - 1)) == 0,
                      op, ": ", name, " must be a power of two from ", least, " to ", kMaxBlocksize,
                      ", found ", blocksize);
}

Tensor checked_quant_map(const Tensor& quant_map, int64_t entries, const at::Device& device, const char* op,
                         const char* name) {
    check_tensor(quant_map, at::kFloat, device, op, name);
    check_numel(quant_map, entries, op, name, "one value a code");
    return quant_map.contiguous();
}

Weight::Weight(at::TensorList tensors, at::IntArrayRef packing, const char* op) {
    if (packing.empty()) {
        TORCH_CHECK_VALUE(tensors.size() == 1, op, ": a dense weight is 1 tensor (without packing), found ",
                          tensors.size());
        parts_[0] = tensors[0];
        set_sizes(tensors[0].sizes(), op);
        return;
    }
    const bool has_zeros = tensors.size() == kNestedAbsmax + 1;
    TORCH_CHECK_VALUE(
        tensors.size() == kNestedAbsmax || has_zeros || tensors.size() == kParts, op,
        ": a weight in 4 bits is 3 tensors, 4 with zero points, or 6 with nested scales, found ",
        tensors.size());
    TORCH_CHECK_VALUE(packing.size() >= 2, op,
                      ": packing must be [blocksize, nested_blocksize, shape..], found ", packing);
    packed_ = true;
    const bool nested = tensors.size() == kParts, powers = packing[1] == kPowersOfTwo;
    const bool affine = packing[1] == kAffine && !nested;
    TORCH_CHECK_VALUE(affine || !has_zeros, op, ": zero points need affine codes, found packing ", packing);
    scales_ = nested   ? ScaleKind::kNested
              : powers ? ScaleKind::kPowerOfTwo
              : affine ? ScaleKind::kAffine
                       : ScaleKind::kFloat;
    check_blocksize(packing[0], op, "blocksize", nested ? kMinNestedBlocksize : kMinBlocksize);
    shift_ = log2_of(packing[0]);
    set_sizes(packing.slice(2), op);
    const at::Device device = tensors[0].device();
    const int64_t count = rows_ * columns_, blocks = ceil_div(count, packing[0]);
    check_tensor(tensors[kCodes], at::kByte, device, op, "codes");
    check_numel(tensors[kCodes], ceil_div(count, 2), op, "codes", "two values a byte");
    const at::ScalarType absmax_dtype = tensors[kAbsmax].scalar_type();
    const bool is_16_bits = affine && (absmax_dtype == at::kHalf || absmax_dtype == at::kBFloat16);
    check_tensor(tensors[kAbsmax],
                 nested || powers ? at::kByte
                 : is_16_bits     ? absmax_dtype
                                  : at::kFloat,
                 device, op, "absmax");
    check_numel(tensors[kAbsmax], blocks, op, "absmax", "one a block");
    parts_[kQuantMap] = checked_quant_map(tensors[kQuantMap], 16, device, op);
    parts_[kCodes] = tensors[kCodes].contiguous();
    parts_[kAbsmax] = tensors[kAbsmax].contiguous();
    if (packing[0] < kMinBlocksize || (!nested && (powers || affine)))
        TORCH_CHECK_VALUE(columns_ % packing[0] == 0, op, ": rows must be whole blocks of ", packing[0],
                          " values in this format, found ", columns_, " columns");
    if ((powers || affine) && !nested) {
        if (!has_zeros) return;
        const Tensor& zeros = tensors[kNestedAbsmax];
        check_tensor(zeros, zeros.scalar_type() == at::kByte ? at::kByte : at::kFloat, device, op, "zeros");
        check_numel(zeros, blocks, op, "zeros", "one a block");
        parts_[kZeros] = zeros.contiguous();
        return;
    }
    if (!nested) {
        TORCH_CHECK_VALUE(packing[1] == 0, op, ": nested_blocksize must be 0 without nested scales, found ",
                          packing[1]);
        return;
    }
    check_blocksize(packing[1], op, "nested_blocksize");
    nested_shift_ = log2_of(packing[1]);
    check_tensor(tensors[kNestedAbsmax], at::kFloat, device, op, "nested_absmax");
    check_numel(tensors[kNestedAbsmax], ceil_div(blocks, packing[1]), op, "nested_absmax",
                "one a block of scales");
    check_tensor(tensors[kNestedOffset], at::kFloat, device, op, "nested_offset");
    check_numel(tensors[kNestedOffset], 1, op, "nested_offset", "one for all scales");
    parts_[kNestedAbsmax] = tensors[kNestedAbsmax].contiguous();
    parts_[kNestedQuantMap] =
        checked_quant_map(tensors[kNestedQuantMap], 256, device, op, "nested_quant_map");
    parts_[kNestedOffset] = tensors[kNestedOffset];
}

void Weight::set_sizes(at::IntArrayRef sizes, const char* op) {
    sizes_.assign(sizes.begin(), sizes.end());
    rows_ = columns_ = 1;
    int64_t count = 1;
    for (size_t i = 0; i < sizes.size(); ++i) {
        TORCH_CHECK_VALUE(sizes[i] >= 0, op, ": shape must not be negative, found ", sizes);
        TORCH_CHECK_VALUE(!__builtin_mul_overflow(count, sizes[i], &count), op, ": shape ", sizes,
                          " has too many elements");
        if (i + 1 == sizes.size())
            columns_ = sizes[i];
        else
            rows_ *= sizes[i];
    }
}

WeightView Weight::view() const {
    WeightView view;
    view.rows = rows_;
    view.columns = columns_;
    if (!packed_) {
        view.dense = parts_[0].const_data_ptr();
        view.itemsize = int(parts_[0].element_size());
        return view;
    }
    view.codes = parts_[kCodes].const_data_ptr<uint8_t>();
    view.absmax = parts_[kAbsmax].const_data_ptr();
    view.quant_map = parts_[kQuantMap].const_data_ptr<float>();
    view.shift = shift_;
    view.scales = scales_;
    if (scales_ == ScaleKind::kAffine) {
        view.scale_dtype = kernel_dtype(parts_[kAbsmax].scalar_type(), "weight");
        if (parts_[kZeros].defined()) {
            view.zeros = parts_[kZeros].const_data_ptr();
            view.whole_zeros = parts_[kZeros].scalar_type() == at::kByte;
        }
    }
    if (scales_ == ScaleKind::kNested) {
        view.nested_absmax = parts_[kNestedAbsmax].const_data_ptr<float>();
        view.nested_quant_map = parts_[kNestedQuantMap].const_data_ptr<float>();
        view.nested_offset = parts_[kNestedOffset].const_data_ptr<float>();
        view.nested_shift = nested_shift_;
    }
    return view;
}

WeightView Weight::expert(int64_t index, const char* op) const {
    TORCH_CHECK_VALUE(sizes_.size() == 3, op, ": weight must be [experts, out, in], found ", sizes());
    TORCH_CHECK_INDEX(index >= 0 && index < sizes_[0], op, ": there is no expert ", index,
                      " in a weight of shape ", sizes());
    const int64_t count = sizes_[1] * columns_, blocksize = int64_t(1) << shift_;
    TORCH_CHECK_VALUE(!packed_ || count % blocksize == 0, op, ": an expert of [", sizes_[1], ", ", columns_,
                      "] is not a whole number of blocks of ", blocksize, ". Pack each expert separately");
    return expert_of(view(), index, sizes_[0]);
}

}  // namespace peftcore

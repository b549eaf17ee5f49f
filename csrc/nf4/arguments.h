// Argument checks of the 4-bit operators, the same for every backend.
#pragma once

#include <tuple>

#include "common/check.h"
#include "common/integers.h"
#include "nf4/nf4.h"

namespace peftcore {
namespace nf4 {

using at::Tensor;

inline void check_blocksize(int64_t blocksize, const char* op, const char* name = "blocksize") {
    TORCH_CHECK_VALUE(
        blocksize >= kMinBlocksize && blocksize <= kMaxBlocksize && (blocksize & (blocksize - 1)) == 0, op,
        ": ", name, " must be a power of two from ", kMinBlocksize, " to ", kMaxBlocksize, ", found ",
        blocksize);
}

inline Tensor code_argument(const Tensor& code, int64_t entries, const at::Device& device, const char* op,
                            const char* name) {
    check_tensor(code, at::kFloat, device, op, name);
    check_numel(code, entries, op, name, "one value a code");
    return code.contiguous();
}

// Nested scales: all of absmax, code and offset, or none.
struct Nested {
    Tensor absmax, code, offset;
    int shift = 0;
    bool present = false;
};

inline Nested nested_arguments(const std::optional<Tensor>& absmax, const std::optional<Tensor>& code,
                               const std::optional<Tensor>& offset, int64_t nested_blocksize, int64_t blocks,
                               const at::Device& device, const char* op) {
    Nested nested;
    nested.present = absmax.has_value();
    TORCH_CHECK_VALUE(code.has_value() == nested.present && offset.has_value() == nested.present, op,
                      ": nested scales need nested_absmax, nested_code and nested_offset together, found ",
                      absmax.has_value() ? "" : "no ", "nested_absmax, ", code.has_value() ? "" : "no ",
                      "nested_code, ", offset.has_value() ? "" : "no ", "nested_offset");
    if (!nested.present) return nested;
    check_blocksize(nested_blocksize, op, "nested_blocksize");
    check_tensor(*absmax, at::kFloat, device, op, "nested_absmax");
    check_numel(*absmax, ceil_div(blocks, nested_blocksize), op, "nested_absmax", "one a block of scales");
    check_tensor(*offset, at::kFloat, device, op, "nested_offset");
    check_numel(*offset, 1, op, "nested_offset", "one for all scales");
    nested.absmax = absmax->contiguous();
    nested.code = code_argument(*code, 256, device, op, "nested_code");
    nested.offset = *offset;
    nested.shift = log2_of(nested_blocksize);
    return nested;
}

// What dequantize_4bit reads, checked against `count` elements and contiguous.
struct Packed {
    Tensor bytes, scales, code;
    Nested nested;
    int64_t blocksize, count;
};

inline Packed packed_arguments(const Tensor& packed, const Tensor& absmax, const Tensor& code,
                               int64_t blocksize, const std::optional<Tensor>& nested_absmax,
                               const std::optional<Tensor>& nested_code,
                               const std::optional<Tensor>& nested_offset, int64_t nested_blocksize,
                               int64_t count, const char* op) {
    check_blocksize(blocksize, op);
    const at::Device device = packed.device();
    const int64_t blocks = ceil_div(count, blocksize);
    Packed result;
    check_tensor(packed, at::kByte, device, op, "packed");
    check_numel(packed, ceil_div(count, 2), op, "packed", "two values a byte");
    result.nested =
        nested_arguments(nested_absmax, nested_code, nested_offset, nested_blocksize, blocks, device, op);
    check_tensor(absmax, result.nested.present ? at::kByte : at::kFloat, device, op, "absmax");
    check_numel(absmax, blocks, op, "absmax", "one a block");
    result.code = code_argument(code, 16, device, op, "code");
    result.bytes = packed.contiguous();
    result.scales = absmax.contiguous();
    result.blocksize = blocksize;
    result.count = count;
    return result;
}

inline int64_t count_of(at::IntArrayRef shape, const char* op) {
    int64_t count = 1;
    for (int64_t size : shape) {
        TORCH_CHECK_VALUE(size >= 0, op, ": shape must not be negative, found ", shape);
        TORCH_CHECK_VALUE(!__builtin_mul_overflow(count, size, &count), op, ": shape ", shape,
                          " has too many elements");
    }
    return count;
}

}  // namespace nf4
}  // namespace peftcore

// The 4-bit operators on CUDA: checks, allocation, the current stream, and the launchers. Schemas:
// peftcore/ops/nf4.py, peftcore/ops/linear_4bit.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "common/cuda_stream.h"
#include "common/cuda_support.h"
#include "nf4/arguments.h"
#include "nf4/cuda/nf4_cuda.h"
#include "nf4/linear_arguments.h"

namespace peftcore {
namespace nf4 {
namespace {

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& x, const Tensor& code, int64_t blocksize) {
    const char* op = "quantize_4bit";
    const Dtype dtype = kernel_dtype(x.scalar_type(), op);
    check_blocksize(blocksize, op);
    const c10::DeviceGuard guard(x.device());
    const Tensor book = code_argument(code, 16, x.device(), op, "code");
    const Tensor source = x.contiguous();
    const int64_t count = source.numel();
    Tensor packed = at::empty({ceil_div(count, 2), 1}, x.options().dtype(at::kByte));
    Tensor absmax = at::empty({ceil_div(count, blocksize)}, x.options().dtype(at::kFloat));
    check_launch(peftcore_nf4_quantize(source.const_data_ptr(), int(dtype), book.const_data_ptr<float>(),
                                       count, int(blocksize), packed.mutable_data_ptr<uint8_t>(),
                                       absmax.mutable_data_ptr<float>(), current_cuda_stream(x.device())),
                 op);
    return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& code,
                                                   int64_t blocksize) {
    const char* op = "quantize_absmax";
    check_tensor(absmax, at::kFloat, absmax.device(), op, "absmax");
    check_blocksize(blocksize, op);
    const c10::DeviceGuard guard(absmax.device());
    const Tensor map = code_argument(code, 256, absmax.device(), op, "code");
    const Tensor source = absmax.contiguous();
    const int64_t count = source.numel();
    Tensor offset = count > 0 ? at::mean(source) : at::zeros({}, source.options());
    Tensor quantized = at::empty({count}, source.options().dtype(at::kByte));
    Tensor scales = at::empty({ceil_div(count, blocksize)}, source.options());
    check_launch(
        peftcore_nf4_quantize_absmax(source.const_data_ptr<float>(), map.const_data_ptr<float>(),
                                     offset.const_data_ptr<float>(), count, int(blocksize),
                                     quantized.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<float>(),
                                     current_cuda_stream(absmax.device())),
        op);
    return {quantized, scales, offset};
}

void dequantize_into(const Packed& packed, int64_t nested_blocksize, const Tensor& out) {
    const char* op = "dequantize_4bit";
    const c10::DeviceGuard guard(out.device());
    const Nested& nested = packed.nested;
    const float* none = nullptr;
    check_launch(
        peftcore_nf4_dequantize(packed.bytes.const_data_ptr<uint8_t>(), packed.scales.const_data_ptr(),
                                packed.code.const_data_ptr<float>(), int(packed.blocksize),
                                nested.present ? nested.absmax.const_data_ptr<float>() : none,
                                nested.present ? nested.code.const_data_ptr<float>() : none,
                                nested.present ? nested.offset.const_data_ptr<float>() : none,
                                int(nested_blocksize), packed.count, out.mutable_data_ptr(),
                                int(kernel_dtype(out.scalar_type(), op)), current_cuda_stream(out.device())),
        op);
}

Tensor dequantize_4bit(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                       at::IntArrayRef shape, at::ScalarType dtype,
                       const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                       const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "dequantize_4bit";
    kernel_dtype(dtype, op);
    const c10::DeviceGuard guard(packed.device());
    const Packed checked = packed_arguments(packed, absmax, code, blocksize, nested_absmax, nested_code,
                                            nested_offset, nested_blocksize, count_of(shape, op), op);
    Tensor out = at::empty(shape, packed.options().dtype(dtype));
    dequantize_into(checked, nested_blocksize, out);
    return out;
}

void dequantize_4bit_out(const Tensor& packed, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                         const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                         const std::optional<Tensor>& nested_offset, int64_t nested_blocksize,
                         at::Tensor out) {
    const char* op = "dequantize_4bit";
    kernel_dtype(out.scalar_type(), op);
    check_tensor(out, out.scalar_type(), packed.device(), op, "out");
    const c10::DeviceGuard guard(packed.device());
    const Packed checked = packed_arguments(packed, absmax, code, blocksize, nested_absmax, nested_code,
                                            nested_offset, nested_blocksize, out.numel(), op);
    if (out.is_contiguous()) return dequantize_into(checked, nested_blocksize, out);
    Tensor dense = at::empty(out.sizes(), out.options());
    dequantize_into(checked, nested_blocksize, dense);
    out.copy_(dense);
}

// The whole weight: on CUDA the caching allocator hands out the same memory for every layer.
Tensor dense_weight(const Packed& packed, int64_t rows, int64_t columns, int64_t nested_blocksize,
                    const Tensor& like) {
    Tensor dense = at::empty({rows, columns}, like.options());
    dequantize_into(packed, nested_blocksize, dense);
    return dense;
}

Tensor linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Tensor& code,
                   int64_t blocksize, int64_t out_features, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                   const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "linear_4bit";
    const Dtype dtype = kernel_dtype(x.scalar_type(), op);
    const c10::DeviceGuard guard(x.device());
    const Tensor added = linear_bias(x, out_features, bias, op);
    const int64_t columns = x.size(-1);
    check_tensor(packed, at::kByte, x.device(), op, "packed");
    const Packed weight =
        packed_arguments(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset,
                         nested_blocksize, count_of({out_features, columns}, op), op);
    // Below autograd, whose rule stands in Python, and autocast, which has cast x already.
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Tensor y = at::empty(with_last(x, out_features), x.options());
    const int64_t batch = out_features == 0 ? 0 : y.numel() / out_features;
    if (batch > kLinearMaxBatch) {
        const Tensor dense = dense_weight(weight, out_features, columns, nested_blocksize, x);
        return added.defined() ? at::linear(x, dense, added) : at::linear(x, dense);
    }
    const Tensor source = x.contiguous();
    const Nested& nested = weight.nested;
    const float* none = nullptr;
    check_launch(peftcore_nf4_linear(
                     source.const_data_ptr(), int(dtype), int(batch), weight.bytes.const_data_ptr<uint8_t>(),
                     weight.scales.const_data_ptr(), weight.code.const_data_ptr<float>(), int(blocksize),
                     nested.present ? nested.absmax.const_data_ptr<float>() : none,
                     nested.present ? nested.code.const_data_ptr<float>() : none,
                     nested.present ? nested.offset.const_data_ptr<float>() : none, int(nested_blocksize),
                     out_features, columns, added.defined() ? added.const_data_ptr() : nullptr, nullptr,
                     nullptr, 0, y.mutable_data_ptr(), current_cuda_stream(x.device())),
                 op);
    return y;
}

Tensor linear_4bit_backward(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                            const Tensor& code, int64_t blocksize, int64_t in_features,
                            const std::optional<Tensor>& nested_absmax,
                            const std::optional<Tensor>& nested_code,
                            const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "linear_4bit_backward";
    kernel_dtype(grad.scalar_type(), op);
    const c10::DeviceGuard guard(grad.device());
    linear_bias(grad, 0, {}, op);
    const int64_t rows = grad.size(-1);
    check_tensor(packed, at::kByte, grad.device(), op, "packed");
    const Packed weight =
        packed_arguments(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset,
                         nested_blocksize, count_of({rows, in_features}, op), op);
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return at::matmul(grad, dense_weight(weight, rows, in_features, nested_blocksize, grad));
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CUDA, m) {
    m.impl("quantize_4bit", &OrReference<"peftcore::quantize_4bit", "", &quantize_4bit>::call);
    m.impl("quantize_absmax", &OrReference<"peftcore::quantize_absmax", "", &quantize_absmax>::call);
    m.impl("dequantize_4bit", &OrReference<"peftcore::dequantize_4bit", "", &dequantize_4bit>::call);
    m.impl("dequantize_4bit.out",
           &OrReference<"peftcore::dequantize_4bit", "out", &dequantize_4bit_out>::call);
    m.impl("linear_4bit", &OrReference<"peftcore::linear_4bit", "", &linear_4bit>::call);
    m.impl("linear_4bit_backward",
           &OrReference<"peftcore::linear_4bit_backward", "", &linear_4bit_backward>::call);
}

}  // namespace nf4
}  // namespace peftcore

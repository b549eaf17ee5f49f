// The 4-bit operators on CUDA: checks, allocation, the current stream, and the launchers. Schemas:
// peftcore/ops/quant4.py, peftcore/ops/linear_4bit.py.
#include <ATen/DeviceGuard.h>
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
#include "common/tensors.h"
#include "quant4/cuda/linear.h"
#include "quant4/cuda/quant4_cuda.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace quant4 {

using at::Tensor;

namespace {

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& x, const Tensor& quant_map, int64_t blocksize) {
    const char* op = "quantize_4bit";
    const Dtype dtype = kernel_dtype(x.scalar_type(), op);
    check_blocksize(blocksize, op);
    const c10::DeviceGuard guard(x.device());
    const Tensor book = checked_quant_map(quant_map, 16, x.device(), op);
    const Tensor source = x.contiguous();
    const int64_t count = source.numel();
    Tensor codes = at::empty({ceil_div(count, 2), 1}, x.options().dtype(at::kByte));
    Tensor absmax = at::empty({ceil_div(count, blocksize)}, x.options().dtype(at::kFloat));
    check_launch(peftcore_quant4_quantize(source.const_data_ptr(), int(dtype), book.const_data_ptr<float>(),
                                          count, int(blocksize), codes.mutable_data_ptr<uint8_t>(),
                                          absmax.mutable_data_ptr<float>(), current_cuda_stream(x.device())),
                 op);
    return {codes, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& quant_map,
                                                   int64_t blocksize) {
    const char* op = "quantize_absmax";
    check_tensor(absmax, at::kFloat, absmax.device(), op, "absmax");
    check_blocksize(blocksize, op);
    const c10::DeviceGuard guard(absmax.device());
    const Tensor map = checked_quant_map(quant_map, 256, absmax.device(), op);
    const Tensor source = absmax.contiguous();
    const int64_t count = source.numel();
    Tensor offset = count > 0 ? at::mean(source) : at::zeros({}, source.options());
    Tensor codes = at::empty({count}, source.options().dtype(at::kByte));
    Tensor scales = at::empty({ceil_div(count, blocksize)}, source.options());
    check_launch(peftcore_quant4_quantize_absmax(
                     source.const_data_ptr<float>(), map.const_data_ptr<float>(),
                     offset.const_data_ptr<float>(), count, int(blocksize), codes.mutable_data_ptr<uint8_t>(),
                     scales.mutable_data_ptr<float>(), current_cuda_stream(absmax.device())),
                 op);
    return {codes, scales, offset};
}

void dequantize_into(const WeightView& weight, const Tensor& out) {
    const char* op = "dequantize_4bit";
    const Dtype dtype = kernel_dtype(out.scalar_type(), op);
    check_launch(peftcore_quant4_dequantize(&weight, out.mutable_data_ptr(), int(dtype),
                                            current_cuda_stream(out.device())),
                 op);
}

Tensor dequantize_4bit(at::TensorList tensors, at::IntArrayRef packing, at::ScalarType dtype) {
    const char* op = "dequantize_4bit";
    kernel_dtype(dtype, op);
    const c10::OptionalDeviceGuard guard(at::device_of(tensors));
    const Weight weight(tensors, packing, op);
    check_packed(weight, op);
    Tensor out = at::empty(weight.sizes(), weight.first().options().dtype(dtype));
    dequantize_into(weight.view(), out);
    return out;
}

void dequantize_4bit_out(at::TensorList tensors, at::IntArrayRef packing, at::Tensor out) {
    const char* op = "dequantize_4bit";
    kernel_dtype(out.scalar_type(), op);
    const c10::DeviceGuard guard(out.device());
    const Weight weight(tensors, packing, op);
    check_out(weight, tensors, out, op);
    if (out.is_contiguous()) return dequantize_into(weight.view(), out);
    Tensor dense = at::empty(out.sizes(), out.options());
    dequantize_into(weight.view(), dense);
    out.copy_(dense);
}

Tensor linear_4bit(const Tensor& x, at::TensorList tensors, at::IntArrayRef packing,
                   const std::optional<Tensor>& bias) {
    const char* op = "linear_4bit";
    const c10::DeviceGuard guard(x.device());
    const Weight weight(tensors, packing, op);
    check_packed(weight, op);
    check_linear(x, weight, bias, op);
    // Skips autograd, whose rule is in Python, and autocast, which has already cast x.
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor flat = matrix(x), added = contiguous(bias);
    Tensor y = linear_direct(flat, weight, added, {}, {});
    if (!y.defined()) y = at::linear(flat, dense_weight(weight, x), bias);
    return y.view(with_last(x, weight.rows()));
}

Tensor linear_4bit_backward(const Tensor& grad, at::TensorList tensors, at::IntArrayRef packing) {
    const char* op = "linear_4bit_backward";
    const c10::DeviceGuard guard(grad.device());
    const Weight weight(tensors, packing, op);
    check_packed(weight, op);
    check_operand(weight, grad, "grad", true, op);
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return at::matmul(grad, dense_weight(weight, grad));
}

}  // namespace

Tensor dense_weight(const Weight& weight, const Tensor& like) {
    if (!weight.packed()) return weight.first();
    Tensor dense = at::empty(weight.sizes(), like.options());
    dequantize_into(weight.view(), dense);
    return dense;
}

Tensor linear_direct(const Tensor& x, const Weight& weight, const Tensor& bias, const Tensor& thin,
                     const Tensor& factor) {
    const char* op = "linear_4bit";
    if (!weight.packed()) return {};
    const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
    const WeightView view = weight.view();
    const int dtype = int(kernel_dtype(x.scalar_type(), op));
    if (!peftcore_quant4_linear_takes(x.const_data_ptr(), dtype, x.size(0), &view)) return {};
    const int batch = int(x.size(0));
    const Tensor y = at::empty({batch, view.rows}, x.options());
    const int64_t floats = peftcore_quant4_linear_workspace(batch, &view);
    const Tensor partial = at::empty({floats}, x.options().dtype(at::kFloat));
    check_launch(
        peftcore_quant4_linear(
            x.const_data_ptr(), dtype, batch, &view, pointer(bias), static_cast<const float*>(pointer(thin)),
            static_cast<const float*>(pointer(factor)), thin.defined() ? int(thin.size(1)) : 0,
            partial.mutable_data_ptr<float>(), y.mutable_data_ptr(), current_cuda_stream(x.device())),
        op);
    return y;
}

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

}  // namespace quant4
}  // namespace peftcore

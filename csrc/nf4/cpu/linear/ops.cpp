// linear_4bit and its gradient on CPU. Schemas: peftcore/ops/linear_4bit.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/workspace.h"
#include "cpu/kernels.h"
#include "nf4/cpu/dequantize.h"
#include "nf4/cpu/linear/panel.h"
#include "nf4/linear_arguments.h"

namespace peftcore {
namespace nf4 {
namespace {

constexpr int64_t kProductsPerTask = 1 << 17;
// The kernel for `batch` rows of x, or none: then tiles or the library's GEMM on panels are faster, or the
// shape is not one that the kernels read.
const LinearKernel* choose(const CpuKernels& kernels, const WeightView& weight, Dtype dtype, int64_t batch) {
    if (!std::all_of(weight.quant_map, weight.quant_map + 16,
                     [](float value) { return std::isfinite(value); }))
        return nullptr;
    // Without dot products of bf16 the library is as slow in it as in fp16.
    const Dtype as = dtype == Dtype::kBFloat16 && !kernels.library_has_bf16 ? Dtype::kHalf : dtype;
    for (const LinearKernel* kernel : {&kernels.linear.tile, &kernels.linear.rows})
        if (batch >= kernel->min_batch && batch <= kernel->max_batch[int(as)] &&
            weight.columns % kernel->column_multiple == 0)
            return kernel;
    return nullptr;
}

void multiply_few_rows(const LinearKernel& kernel, const WeightView& weight, const Tensor& x,
                       const Tensor& bias, const Tensor& y) {
    LinearCall args;
    args.weight = weight;
    args.batch = x.size(0);
    args.dtype = kernel_dtype(x.scalar_type(), "linear_4bit");
    void* arranged = workspace(kernel.arranged_bytes(args.batch, weight.columns));
    kernel.arrange(x.const_data_ptr(), args.dtype, args.batch, weight.columns, arranged);
    args.x = arranged;
    args.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    args.y = y.mutable_data_ptr();
    const int64_t units = ceil_div(weight.rows, kernel.granule);
    const int64_t grain = ceil_div(kProductsPerTask, weight.columns * args.batch * kernel.granule);
    at::parallel_for(0, units, grain, [&](int64_t first, int64_t last) {
        kernel.run(args, first * kernel.granule, std::min(last * kernel.granule, weight.rows));
    });
}

// y = x B + bias with B unpacked tile by tile, where this processor and these shapes allow it.
bool by_tiles(const CpuKernels& kernels, const WeightView& weight, bool transposed, const Tensor& x,
              const Tensor& bias, const Tensor& y) {
    if (x.scalar_type() != at::kBFloat16 || !has_tiles(kernels, weight)) return false;
    const auto bits = [](const Tensor& t) { return static_cast<const BFloat16*>(t.const_data_ptr()); };
    const gemm::Tiles& tiles = transposed ? kernels.packed.transposed : kernels.packed.plain;
    gemm::multiply(kernels.gemm, {.x = bits(x),
                                  .right = tiles.of(&weight),
                                  .rows = x.size(0),
                                  .inner = x.size(1),
                                  .columns = y.size(1),
                                  .bias = bias.defined() ? bits(bias) : nullptr,
                                  .y = static_cast<BFloat16*>(y.mutable_data_ptr())});
    return true;
}

Tensor linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax, const Tensor& code,
                   int64_t blocksize, int64_t out_features, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                   const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "linear_4bit";
    const Dtype dtype = kernel_dtype(x.scalar_type(), op);
    const Tensor added = linear_bias(x, out_features, bias, op);
    const int64_t columns = x.size(-1);
    check_tensor(packed, at::kByte, x.device(), op, "packed");
    const Packed packed_weight =
        packed_arguments(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset,
                         nested_blocksize, count_of({out_features, columns}, op), op);
    Tensor y = at::empty(with_last(x, out_features), x.options());
    if (y.numel() == 0) return y;
    const int64_t batch = y.numel() / out_features;
    const Tensor flat = x.contiguous().view({batch, columns}), result = y.view({batch, out_features});
    if (columns == 0) {
        added.defined() ? result.copy_(added) : result.zero_();
        return y;
    }
    const WeightView view = view_of(packed_weight, columns);
    const CpuKernels& kernels = cpu_kernels();
    if (const LinearKernel* kernel = choose(kernels, view, dtype, batch)) {
        multiply_few_rows(*kernel, view, flat, added, result);
        return y;
    }
    if (by_tiles(kernels, view, true, flat, added, result)) return y;
    const int64_t limit = batch <= kPanelsOfFewRows ? kPanelBytes : kLargePanelBytes;
    const int64_t step = std::max<int64_t>(1, limit / (columns * x.element_size()));
    for (int64_t first = 0; first < out_features; first += step) {
        const int64_t last = std::min(first + step, out_features);
        const Tensor panel = dequantized_panel(view, {first, last}, {0, columns}, x.options());
        Tensor out = result.narrow(1, first, last - first);
        if (added.defined())
            at::cpu::addmm_out(out, added.narrow(0, first, last - first), flat, panel.t());
        else
            at::cpu::mm_out(out, flat, panel.t());
    }
    return y;
}

// Panels are columns of W: each gives columns of the result, and no sum crosses panels.
Tensor linear_4bit_backward(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                            const Tensor& code, int64_t blocksize, int64_t in_features,
                            const std::optional<Tensor>& nested_absmax,
                            const std::optional<Tensor>& nested_code,
                            const std::optional<Tensor>& nested_offset, int64_t nested_blocksize) {
    const char* op = "linear_4bit_backward";
    kernel_dtype(grad.scalar_type(), op);
    linear_bias(grad, 0, {}, op);
    const int64_t rows = grad.size(-1);
    check_tensor(packed, at::kByte, grad.device(), op, "packed");
    const Packed packed_weight =
        packed_arguments(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset,
                         nested_blocksize, count_of({rows, in_features}, op), op);
    Tensor dx = at::empty(with_last(grad, in_features), grad.options());
    if (dx.numel() == 0) return dx;
    if (rows == 0) return dx.zero_();
    const int64_t batch = dx.numel() / in_features;
    const Tensor flat = grad.contiguous().view({batch, rows}), result = dx.view({batch, in_features});
    const WeightView view = view_of(packed_weight, in_features);
    if (by_tiles(cpu_kernels(), view, false, flat, {}, result)) return dx;
    const int64_t fit = kLargePanelBytes / (rows * grad.element_size());
    const int64_t step = std::max<int64_t>(kPanelColumns, fit / kPanelColumns * kPanelColumns);
    for (int64_t first = 0; first < in_features; first += step) {
        const int64_t last = std::min(first + step, in_features);
        const Tensor panel = dequantized_panel(view, {0, rows}, {first, last}, grad.options());
        Tensor out = result.narrow(1, first, last - first);
        at::cpu::mm_out(out, flat, panel);
    }
    return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("linear_4bit", &linear_4bit);
    m.impl("linear_4bit_backward", &linear_4bit_backward);
}

}  // namespace nf4
}  // namespace peftcore

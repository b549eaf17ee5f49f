// linear_4bit and its gradient on CPU. Schemas: peftcore/ops/linear_4bit.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "common/tensors.h"
#include "common/threads.h"
#include "common/workspace.h"
#include "cpu/kernels.h"
#include "gemm/cpu/matrices.h"
#include "quant4/cpu/linear/linear.h"
#include "quant4/cpu/linear/slab.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace quant4 {

using at::Tensor;

namespace {

bool takes(const LinearKernel& kernel, const WeightView& weight, Dtype dtype, int64_t batch) {
    return batch >= kernel.min_batch && batch <= kernel.max_batch[int(dtype)] &&
           weight.columns % kernel.column_multiple == 0 && weight.shift >= kernel.min_shift;
}

// From the fastest on.
std::array<const LinearKernel*, 4> ways(const LinearKernels& all, const WeightView& weight) {
    const bool small = weight.shift < log2_of(kMinBlocksize) && all.small_integers.run != nullptr;
    return {&all.dots, &all.tile, small ? &all.small_integers : &all.integers, &all.rows};
}

constexpr int64_t kZeroStrip = 256;  // rows of W, a multiple of each kernel's granule

// False if the kernel does not take these values of x.
bool multiply_from_codes(const LinearKernels& all, const LinearKernel& kernel, const DirectLinear& few,
                         const WeightView& weight) {
    const bool sums_x = weight.zeros != nullptr && kernel.zero_input != ZeroInput::kNothing;
    const bool adds_zeros = sums_x && kernel.zero_input == ZeroInput::kAddend;
    const int64_t arranged_bytes = filled_up(kernel.arranged_bytes(few.rows, weight.columns), 64);
    const int64_t sums = sums_x ? few.rows * sums_stride(weight.columns >> weight.shift) : 0,
                  addends = adds_zeros ? few.rows * weight.rows : 0;
    char* arranged =
        static_cast<char*>(workspace(arranged_bytes + (sums + addends) * int64_t(sizeof(float))));
    if (!kernel.arrange(few.x, few.dtype, few.rows, weight.columns, arranged)) return false;
    float* sum = reinterpret_cast<float*>(arranged + arranged_bytes);
    float* addend = adds_zeros ? sum + sums : nullptr;
    if (sums_x) {
        all.zeros.sum_blocks(few.x, few.dtype, few.rows, weight.columns, weight.shift, sum);
        // An infinite x times the difference of code and zero point is infinite; the difference of products is NaN.
        if (!std::all_of(sum, sum + sums, [](float value) { return std::isfinite(value); })) return false;
    }
    const LinearCall args{.weight = weight,
                          .batch = few.rows,
                          .x = arranged,
                          .bias = few.bias,
                          .y = few.y,
                          .dtype = few.dtype,
                          .addend = addend,
                          .sums = sums_x ? sum : nullptr};
    const int64_t units = ceil_div(weight.rows, kernel.granule);
    const int64_t grain = ceil_div(kProductsPerTask, weight.columns * args.batch * kernel.granule);
    at::parallel_for(0, units, grain, [&](int64_t first, int64_t last) {
        const Range rows{first * kernel.granule, std::min(last * kernel.granule, weight.rows)};
        if (few.companion != nullptr) few.companion->before();
        // Scales that the addend reads are in the cache when the kernel reads them.
        const int64_t step = adds_zeros ? kZeroStrip : rows.last - rows.first;
        for (int64_t n = rows.first, end; n < rows.last; n = end) {
            end = std::min(n + step, rows.last);
            if (adds_zeros) all.zeros.addend(weight, sum, few.rows, n, end, addend);
            kernel.run(args, n, end);
        }
        if (few.companion != nullptr) few.companion->after(rows);
    });
    return true;
}

// y = x B + bias with B unpacked tile by tile, where this processor and these shapes allow it.
bool by_tiles(const CpuKernels& kernels, const WeightView& weight, bool transposed, const Tensor& x,
              const Tensor& bias, const Tensor& y) {
    const gemm::ManyRows& products = kernels.many_rows[int(kernel_dtype(x.scalar_type(), "linear_4bit"))];
    const std::optional<gemm::Tiles> tiles = gemm::tiles_of(products, weight, transposed);
    if (tiles) gemm::multiply(products.kernel, gemm::product_of(x, *tiles, bias, y));
    return tiles.has_value();
}

}  // namespace

bool linear_direct(const CpuKernels& kernels, const DirectLinear& args, const WeightView& weight) {
    if (!std::all_of(weight.quant_map, weight.quant_map + 16,
                     [](float value) { return std::isfinite(value); }))
        return false;
    const LinearKernels& all = kernels.linear;
    for (const LinearKernel* kernel : ways(all, weight))
        if (takes(*kernel, weight, args.dtype, args.rows) && multiply_from_codes(all, *kernel, args, weight))
            return true;
    return false;
}

bool has_direct_kernel(const CpuKernels& kernels, const WeightView& weight, Dtype dtype, int64_t rows) {
    const auto all = ways(kernels.linear, weight);
    return std::any_of(all.begin(), all.end(),
                       [&](const LinearKernel* kernel) { return takes(*kernel, weight, dtype, rows); });
}

Tensor linear(const Tensor& x, const WeightView& weight, const Tensor& bias) {
    const int64_t batch = x.size(0), rows = weight.rows;
    Tensor y = at::empty({batch, rows}, x.options());
    if (y.numel() == 0) return y;
    if (weight.columns == 0) return bias.defined() ? y.copy_(bias) : y.zero_();
    const Tensor source = x.contiguous();
    const CpuKernels& kernels = cpu_kernels();
    const DirectLinear few{.x = source.const_data_ptr(),
                           .rows = batch,
                           .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
                           .y = y.mutable_data_ptr(),
                           .dtype = kernel_dtype(x.scalar_type(), "linear_4bit")};
    if (linear_direct(kernels, few, weight)) return y;
    if (by_tiles(kernels, weight, true, source, bias, y)) return y;
    const int64_t limit = batch <= kSmallSlabRows ? kSlabBytes : kLargeSlabBytes;
    const int64_t step = std::max<int64_t>(1, limit / (weight.columns * x.element_size()));
    for (int64_t first = 0; first < rows; first += step) {
        const int64_t last = std::min(first + step, rows);
        const Tensor slab = dequantized_slab(weight, {first, last}, {0, weight.columns}, x.options());
        Tensor out = y.narrow(1, first, last - first);
        if (bias.defined())
            at::cpu::addmm_out(out, bias.narrow(0, first, last - first), source, slab.t());
        else
            at::cpu::mm_out(out, source, slab.t());
    }
    return y;
}

// Slabs are columns of W: each gives columns of the result, and no sum crosses slabs.
Tensor linear_backward(const Tensor& dy, const WeightView& weight) {
    const int64_t rows = weight.rows, columns = weight.columns;
    Tensor dx = at::empty({dy.size(0), columns}, dy.options());
    if (dx.numel() == 0) return dx;
    if (rows == 0) return dx.zero_();
    const Tensor source = dy.contiguous();
    if (by_tiles(cpu_kernels(), weight, false, source, {}, dx)) return dx;
    const int64_t fit = kLargeSlabBytes / (rows * dy.element_size());
    const int64_t step = std::max<int64_t>(kSlabColumns, fit / kSlabColumns * kSlabColumns);
    for (int64_t first = 0; first < columns; first += step) {
        const int64_t last = std::min(first + step, columns);
        const Tensor slab = dequantized_slab(weight, {0, rows}, {first, last}, dy.options());
        Tensor out = dx.narrow(1, first, last - first);
        at::cpu::mm_out(out, source, slab);
    }
    return dx;
}

namespace {

Tensor linear_4bit(const Tensor& x, at::TensorList tensors, at::IntArrayRef packing,
                   const std::optional<Tensor>& bias) {
    const char* op = "linear_4bit";
    const Weight weight(tensors, packing, op);
    check_packed(weight, op);
    check_linear(x, weight, bias, op);
    return linear(matrix(x), weight.view(), contiguous(bias)).view(with_last(x, weight.rows()));
}

Tensor linear_4bit_backward(const Tensor& grad, at::TensorList tensors, at::IntArrayRef packing) {
    const char* op = "linear_4bit_backward";
    const Weight weight(tensors, packing, op);
    check_packed(weight, op);
    check_operand(weight, grad, "grad", true, op);
    return linear_backward(matrix(grad), weight.view()).view(with_last(grad, weight.columns()));
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("linear_4bit", &linear_4bit);
    m.impl("linear_4bit_backward", &linear_4bit_backward);
}

}  // namespace quant4
}  // namespace peftcore

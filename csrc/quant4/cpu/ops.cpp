// The 4-bit operators on CPU. Schemas: peftcore/ops/quant4.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/caches.h"
#include "common/huge_pages.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "weight/linear_arguments.h"

namespace peftcore {
namespace quant4 {

using at::Tensor;

namespace {

// Output size from which bypassing the caches is faster. Measured against ordinary stores with 32 MB of L3 cache, which
// still holds part of an output several times its size; an L3 that many cores share holds less.
int64_t stream_bytes() { return std::min(4 * caches().third, int64_t(128) << 20); }

int64_t grain(int64_t blocksize) { return std::max<int64_t>(1, kValuesPerTask / blocksize); }

void check_finite(const Tensor& quant_map, const char* op) {
    const float* values = quant_map.const_data_ptr<float>();
    for (int64_t i = 0; i < quant_map.numel(); ++i)
        TORCH_CHECK_VALUE(std::isfinite(values[i]), op, ": quant_map[", i, "] must be finite, found ",
                          values[i]);
}

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& x, const Tensor& quant_map, int64_t blocksize) {
    const char* op = "quantize_4bit";
    QuantizeCall args;
    args.dtype = kernel_dtype(x.scalar_type(), op);
    check_blocksize(blocksize, op);
    const Tensor book = checked_quant_map(quant_map, 16, x.device(), op);
    check_finite(book, op);
    const Tensor source = x.contiguous();
    const int64_t count = source.numel(), blocks = ceil_div(count, blocksize);
    Tensor codes = at::empty({ceil_div(count, 2), 1}, x.options().dtype(at::kByte));
    ask_for_huge_pages(codes.mutable_data_ptr(), codes.numel());
    Tensor absmax = at::empty({blocks}, x.options().dtype(at::kFloat));
    args.x = source.const_data_ptr();
    args.count = count;
    args.blocksize = blocksize;
    args.book = make_codebook(book.const_data_ptr<float>());
    args.codes = codes.mutable_data_ptr<uint8_t>();
    args.absmax = absmax.mutable_data_ptr<float>();
    const Kernels& level = cpu_kernels().quant4;
    at::parallel_for(0, blocks, grain(blocksize),
                     [&](int64_t first, int64_t last) { level.quantize(args, first, last); });
    return {codes, absmax};
}

std::tuple<Tensor, Tensor> quantize_mxfp4(const Tensor& x) {
    const char* op = "quantize_mxfp4";
    constexpr int64_t kBlocksize = 32;
    QuantizeCall args;
    args.dtype = kernel_dtype(x.scalar_type(), op);
    TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) % kBlocksize == 0, op, ": the last dimension of x must be a ",
                      "multiple of ", kBlocksize, ", found ", x.sizes());
    const Tensor source = x.contiguous();
    Tensor codes = at::empty({source.numel() / 2, 1}, x.options().dtype(at::kByte));
    ask_for_huge_pages(codes.mutable_data_ptr(), codes.numel());
    Tensor scales = at::empty({source.numel() / kBlocksize}, x.options().dtype(at::kByte));
    args.x = source.const_data_ptr();
    args.count = source.numel();
    args.blocksize = kBlocksize;
    args.book = PowerOfTwoFormat::codebook();
    args.codes = codes.mutable_data_ptr<uint8_t>();
    args.absmax = scales.mutable_data_ptr();
    const Kernels& level = cpu_kernels().quant4;
    at::parallel_for(0, scales.numel(), grain(kBlocksize),
                     [&](int64_t first, int64_t last) { level.quantize_powers(args, first, last); });
    return {codes, scales};
}

void dequantize_into(const WeightView& weight, const Tensor& out) {
    DequantizeCall args;
    args.weight = weight;
    args.dtype = kernel_dtype(out.scalar_type(), "dequantize_4bit");
    args.out = out.mutable_data_ptr();
    args.stream = out.nbytes() >= size_t(stream_bytes()) && reinterpret_cast<uintptr_t>(args.out) % 64 == 0;
    const Kernels& level = cpu_kernels().quant4;
    at::parallel_for(0, weight.blocks(), grain(int64_t(1) << weight.shift),
                     [&](int64_t first, int64_t last) { level.dequantize(args, first, last); });
}

Tensor dequantize_4bit(at::TensorList tensors, at::IntArrayRef packing, at::ScalarType dtype) {
    const char* op = "dequantize_4bit";
    kernel_dtype(dtype, op);
    const Weight weight(tensors, packing, op);
    check_packed(weight, op);
    Tensor out = at::empty(weight.sizes(), weight.first().options().dtype(dtype));
    dequantize_into(weight.view(), out);
    return out;
}

void dequantize_4bit_out(at::TensorList tensors, at::IntArrayRef packing, at::Tensor out) {
    const char* op = "dequantize_4bit";
    kernel_dtype(out.scalar_type(), op);
    const Weight weight(tensors, packing, op);
    check_out(weight, tensors, out, op);
    if (out.is_contiguous()) return dequantize_into(weight.view(), out);
    Tensor dense = at::empty(out.sizes(), out.options());
    dequantize_into(weight.view(), dense);
    out.copy_(dense);
}

// Code of the nearest of 256 sorted entries; the smaller of two equally near ones. NaN takes the last.
uint8_t nearest(float scaled, const float* midpoint) {
    int index = 0;
    for (int step = 128; step > 0; step /= 2)
        if (!(scaled <= midpoint[index + step - 1])) index += step;
    return uint8_t(index);
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& quant_map,
                                                   int64_t blocksize) {
    const char* op = "quantize_absmax";
    check_tensor(absmax, at::kFloat, absmax.device(), op, "absmax");
    check_blocksize(blocksize, op);
    const Tensor map = checked_quant_map(quant_map, 256, absmax.device(), op);
    check_finite(map, op);
    const Tensor source = absmax.contiguous();
    const int64_t count = source.numel(), blocks = ceil_div(count, blocksize);
    Tensor offset = count > 0 ? source.mean() : at::zeros({}, source.options());
    Tensor quantized = at::empty({count}, source.options().dtype(at::kByte));
    Tensor scales = at::empty({blocks}, source.options());

    const float* values = map.const_data_ptr<float>();
    float midpoint[255];
    for (int i = 0; i < 255; ++i) {
        TORCH_CHECK_VALUE(values[i] <= values[i + 1], op, ": quant_map must be sorted, found quant_map[", i,
                          "] = ", values[i], " > quant_map[", i + 1, "] = ", values[i + 1]);
        midpoint[i] = (values[i] + values[i + 1]) / 2;
    }
    const float mean = *offset.const_data_ptr<float>();
    const float* in = source.const_data_ptr<float>();
    uint8_t* out = quantized.mutable_data_ptr<uint8_t>();
    float* block_scale = scales.mutable_data_ptr<float>();
    at::parallel_for(0, blocks, grain(blocksize), [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * blocksize, end = std::min(begin + blocksize, count);
            uint32_t bits = 0;
            for (int64_t i = begin; i < end; ++i)
                bits = std::max(bits, float_bits(in[i] - mean) & 0x7fffffffu);
            const float scale = bits_float(bits);
            const float inverse = 1.0f / (scale < kSmallestScale ? kSmallestScale : scale);
            block_scale[block] = scale;
            for (int64_t i = begin; i < end; ++i) out[i] = nearest((in[i] - mean) * inverse, midpoint);
        }
    });
    return {quantized, scales, offset};
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("quantize_4bit", &quantize_4bit);
    m.impl("quantize_absmax", &quantize_absmax);
    m.impl("quantize_mxfp4", &quantize_mxfp4);
    m.impl("dequantize_4bit", &dequantize_4bit);
    m.impl("dequantize_4bit.out", &dequantize_4bit_out);
}

}  // namespace quant4
}  // namespace peftcore

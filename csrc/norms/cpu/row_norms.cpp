// row_norms on CPU. Schema and formula: peftcore/ops/row_norms.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/library.h>

#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"
#include "lora/cpu/thin.h"
#include "quant4/cpu/linear/slab.h"

namespace peftcore {
namespace norms {
namespace {

using at::Tensor;

Tensor row_norms(at::TensorList tensors, at::IntArrayRef packing, const Tensor& a, const Tensor& b,
                 double scale) {
    const char* op = "row_norms";
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Weight weight(tensors, packing, op);
    TORCH_CHECK_VALUE(weight.sizes().size() == 2, op, ": weight must be [out, in], found ", weight.sizes());
    const Tensor& first = weight.first();
    const bool is_double = !weight.packed() && first.scalar_type() == at::kDouble;
    const Dtype dtype = weight.packed() || is_double ? Dtype::kFloat : kernel_dtype(first.scalar_type(), op);
    lora::check_factors({"weight", first.device(), weight.columns()}, a, b, weight.rows(), op);
    if (is_double)
        return at::linalg_vector_norm(at::addmm(first, b.to(at::kDouble).mul(scale), a.to(at::kDouble)), 2,
                                      1);
    const int64_t columns = weight.columns(), rows = weight.rows();
    const at::TensorOptions wide = first.options().dtype(at::kFloat);
    const Tensor result = at::empty({rows}, wide), left = floats(b).mul(scale);
    const CpuKernels& kernels = cpu_kernels();
    const auto kernel = kernels.norms.row_norms[int(dtype)];
    const lora::Factor right = lora::arranged_factor(kernels.lora.thin[int(dtype)].plain, floats(a), false);
    const auto norms = [&](const Tensor& piece, int64_t begin) {
        const RowNormsArgs args{.x = piece.const_data_ptr(),
                                .columns = columns,
                                .left = left.const_data_ptr<float>() + begin * a.size(0),
                                .inner = a.size(0),
                                .right = static_cast<const float*>(right.units()),
                                .width = right.width,
                                .norms = result.mutable_data_ptr<float>() + begin};
        at::parallel_for(0, piece.size(0),
                         ceil_div(kProductsPerTask, std::max<int64_t>(1, columns * (1 + a.size(0)))),
                         [&](int64_t from, int64_t to) { kernel(args, from, to); });
    };
    if (!weight.packed() && first.is_contiguous()) {
        norms(first, 0);
        return result;
    }
    const int64_t step =
        std::max<int64_t>(1, quant4::kSlabBytes / int64_t(sizeof(float)) / std::max<int64_t>(1, columns));
    for (int64_t begin = 0; begin < rows; begin += step) {
        const int64_t end = std::min(begin + step, rows);
        norms(weight.packed() ? quant4::dequantized_slab(weight.view(), {begin, end}, {0, columns}, wide)
                              : first.narrow(0, begin, end - begin).contiguous(),
              begin);
    }
    return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) { m.impl("row_norms", &row_norms); }

}  // namespace norms
}  // namespace peftcore

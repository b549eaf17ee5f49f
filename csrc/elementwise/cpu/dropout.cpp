// dropout on CPU. Schema and formula: peftcore/ops/dropout.py.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dropout_arguments.h"
#include "common/tensors.h"
#include "common/threads.h"
#include "cpu/kernels.h"

namespace peftcore {
namespace elementwise {
namespace {

using at::Tensor;

Tensor dropout(const Tensor& x, double p, const std::optional<Tensor>& seed) {
    const char* op = "dropout";
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto rows_of = cpu_kernels().elementwise.dropout[int(kernel_dtype(x.scalar_type(), op))];
    TORCH_CHECK_VALUE(x.dim() > 0, op, ": x must have at least one dimension, found a scalar");
    const Dropout drop = checked_dropout(p, seed, op);
    const Tensor rows = matrix(x), y = at::empty(x.sizes(), x.options());
    const DropArgs args{.x = rows.const_data_ptr(),
                        .columns = rows.size(1),
                        .dropout = drop,
                        .factor = dropout_factor(1, drop),
                        .y = y.mutable_data_ptr()};
    at::parallel_for(0, rows.size(0), ceil_div(kValuesPerTask, std::max<int64_t>(1, args.columns)),
                     [&](int64_t first, int64_t last) { rows_of(args, first, last); });
    return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) { m.impl("dropout", &dropout); }

}  // namespace elementwise
}  // namespace peftcore

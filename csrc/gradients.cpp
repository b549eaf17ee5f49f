#include "gradients.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>

namespace peftcore {
namespace {

// Whether a gradient of the argument, a tensor or a list of them, is asked for: backward or forward.
bool is_differentiated(const c10::IValue& argument) {
    if (argument.isTensor()) {
        const at::Tensor& t = argument.toTensor();
        return t.defined() && ((t.requires_grad() && at::GradMode::is_enabled()) || t._fw_grad(0).defined());
    }
    if (!argument.isList()) return false;
    const at::ArrayRef<c10::IValue> parts = argument.toListRef();
    return std::any_of(parts.begin(), parts.end(), is_differentiated);
}

void refuse_or_compute(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const size_t count = op.schema().arguments().size();
    if (std::any_of(stack->end() - count, stack->end(), is_differentiated)) {
        const std::string& overload = op.schema().overload_name();
        const std::string name =
            op.schema().name().substr(sizeof("peftcore::") - 1) + (overload.empty() ? "" : "." + overload);
        TORCH_CHECK(false, "torch.ops.peftcore.", name,
                    " computes no gradient, but an argument requires grad. Call the function of peftcore.ops "
                    "instead, or call the operator under torch.no_grad()");
    }
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

void refuse_gradients(const std::string& name) {
    static torch::Library library(torch::Library::IMPL, "peftcore", c10::DispatchKey::Autograd, __FILE__,
                                  __LINE__);
    library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_or_compute>());
}

}  // namespace peftcore

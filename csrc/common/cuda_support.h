// On CUDA devices below the lowest architecture of this build, operators run on their references, as on any device without
// kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>

// Whether a kernel of this build can be launched on the current device: 1, or 0 where no code fits it.
extern "C" int peftcore_cuda_has_code();

namespace peftcore {

// `error`: what a launcher returned.
inline void check_launch(const char* error, const char* op) {
    TORCH_CHECK(error == nullptr, op, ": ", error);
}

inline bool has_code_for(const c10::Device& device) {
    static std::array<std::atomic<int8_t>, 256> answers{};  // 0: unknown; 1: no; 2: yes
    std::atomic<int8_t>& answer = answers[uint8_t(device.index())];
    if (answer == 0) {
        const c10::DeviceGuard guard(device);
        answer = peftcore_cuda_has_code() ? 2 : 1;
    }
    return answer == 2;
}

inline c10::Device place_of(const at::Tensor& t) { return t.device(); }
inline c10::Device place_of(at::TensorList list) {
    return list.empty() ? c10::Device(c10::kCPU) : list[0].device();
}

template <size_t size>
struct Name {
    char text[size];
    constexpr Name(const char (&from)[size]) { std::copy_n(from, size, text); }
};

// `call` runs `kernel`, or on a device without code `reference`, that of the operator `name` or `name.overload`. It is
// registered for every backend without a kernel (CompositeExplicitAutograd), such as HPU, whose dispatch key is used to
// reach it; the tensors are not moved.
template <Name name, Name overload, auto kernel>
struct OrReference;

template <Name name, Name overload, typename Result, typename First, typename... Rest,
          Result (*kernel)(First, Rest...)>
struct OrReference<name, overload, kernel> {
    static Result reference(First first, Rest... rest) {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(name.text, overload.text)
                                   .template typed<Result(First, Rest...)>();
        return op.redispatch(c10::DispatchKeySet(c10::DispatchKey::HPU), first, rest...);
    }
    static Result call(First first, Rest... rest) {
        const c10::Device device = place_of(first);
        return !device.is_cuda() || has_code_for(device) ? kernel(first, rest...) : reference(first, rest...);
    }
};

}  // namespace peftcore

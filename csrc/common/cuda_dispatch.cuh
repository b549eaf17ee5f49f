// Dispatch: from values known at run time to template arguments of a kernel. Host code; nested calls give several
// arguments. `body` takes a tag, and returns what the launch returns:
//
//     return dispatch_dtype(dtype, [&](auto type) {
//         return dispatch_flag(plain, [&](auto flag) {
//             using T = typename decltype(type)::type;
//             constexpr bool kPlain = decltype(flag)::value;
//             return PEFTCORE_LAUNCH((kernel<T, kPlain>), blocks, threads, 0, stream, arguments);
//         });
//     });
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/cuda_tuning.h"
#include "common/dtype.h"
#include "common/half.h"
#include "weight/view.h"

namespace peftcore {

template <typename T>
struct TypeTag {
    using type = T;
};

// body(TypeTag of fp16 or bf16).
template <typename Body>
const char* dispatch_16_bits(Dtype dtype, const Body& body) {
    if (dtype == Dtype::kHalf) return body(TypeTag<Half>());
    if (dtype == Dtype::kBFloat16) return body(TypeTag<BFloat16>());
    return dtype == Dtype::kFloat ? "the kernel takes 16 bits, not fp32" : "unknown dtype";
}

// body(TypeTag of fp32, fp16 or bf16).
template <typename Body>
const char* dispatch_dtype(Dtype dtype, const Body& body) {
    return dtype == Dtype::kFloat ? body(TypeTag<float>()) : dispatch_16_bits(dtype, body);
}

// body(std::true_type) or body(std::false_type).
template <typename Body>
const char* dispatch_flag(bool flag, const Body& body) {
    return flag ? body(std::true_type()) : body(std::false_type());
}

// body(std::integral_constant<ScaleKind, ..>) of a weight's kind of scales.
template <typename Body>
const char* dispatch_scales(ScaleKind scales, const Body& body) {
    switch (scales) {
        case ScaleKind::kFloat:
            return body(std::integral_constant<ScaleKind, ScaleKind::kFloat>());
        case ScaleKind::kNested:
            return body(std::integral_constant<ScaleKind, ScaleKind::kNested>());
        case ScaleKind::kPowerOfTwo:
            return body(std::integral_constant<ScaleKind, ScaleKind::kPowerOfTwo>());
        case ScaleKind::kAffine:
            return body(std::integral_constant<ScaleKind, ScaleKind::kAffine>());
    }
    return "unknown kind of scales";
}

// body(std::integral_constant) of the first of `sizes`, in ascending order, that is at least `size`, or else of the last.
template <int first, int... rest, typename Body>
const char* dispatch_size(int64_t size, const Body& body) {
    if constexpr (sizeof...(rest) > 0)
        if (size > first) return dispatch_size<rest...>(size, body);
    return body(std::integral_constant<int, first>());
}

}  // namespace peftcore

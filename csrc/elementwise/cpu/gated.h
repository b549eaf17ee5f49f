// y = act(g) ∘ u and its gradients, each in one pass over memory, in fp32. act is x s, s = 1 / (1 + e^-p): silu with p = x,
// GELU by tanh with p = 2 √(2/π) (x + 0.044715 x³). Loops over a chunk take a vector at a time (sixteen.h).
#pragma once

#include "elementwise/cpu/kernels.h"
#include "simd/chunk.h"
#include "simd/exponential.h"

namespace peftcore {
namespace elementwise {

using namespace simd;

template <typename Level>
struct Gates {
    using T = typename Level::T;
    using Chunk = simd::Chunk<Level>;

    // Coefficients of p.
    struct Power {
        float linear, cubic;
    };

    // s, which is 0 far below 0, and the slope of act, NaN at infinity. Powers of x do not overflow: far out, where they
    // would, s is 0 or 1 anyway. kCubic: whether p has x³; without its operations y takes 0.77 of the time, and
    // its gradients 0.85 (AVX-512, Zen 5).
    template <bool kCubic>
    struct Logistic {
        Native share, slope;

        __attribute__((always_inline)) inline Logistic(const Power& p, const Native& x) {
            constexpr uint32_t k10000 = 0x461c4000u;
            const Native near = limited(x, k10000);
            Native z = x * -p.linear, rate = Native{} + p.linear;  // -p, and its slope
            if constexpr (kCubic) {
                const Native square = near * near;
                z = -near * (p.linear + p.cubic * square);
                rate += 3.0f * p.cubic * square;
            }
            const Native e = exponential<Fused>(z);
            share = z < 88.0f ? 1.0f / (1.0f + e) : Native{};
            slope = share * (1.0f + near * (e * share) * rate) + (x - x);
        }
    };

    template <bool kCubic>
    static void forward_of(const GateArgs& args, int64_t first, int64_t last) {
        Chunk gate, up;
        const Power p{args.linear, args.cubic};
        for (; first < last; ++first)
            for (int64_t n = 0; n < args.columns; n += kChunk) {
                const int64_t count = std::min(kChunk, args.columns - n), at = first * args.stride + n;
                gate.load(static_cast<const T*>(args.gate) + at, count);
                up.load(static_cast<const T*>(args.up) + at, count);
                for (int64_t i = 0; i < kChunk; i += kNative) {
                    Native& g = native_at(gate.value + i);
                    g *= Logistic<kCubic>(p, g).share;
                }
                if (args.rounded) gate.round();
                for (int64_t i = 0; i < kChunk; ++i) gate.value[i] *= up.value[i];
                gate.store(static_cast<T*>(args.y) + first * args.columns + n, count);
            }
    }

    template <bool kCubic>
    static void backward_of(const GateArgs& args, int64_t first, int64_t last) {
        Chunk gate, up, grad;
        const Power p{args.linear, args.cubic};
        for (; first < last; ++first)
            for (int64_t n = 0; n < args.columns; n += kChunk) {
                const int64_t count = std::min(kChunk, args.columns - n), at = first * args.stride + n;
                gate.load(static_cast<const T*>(args.gate) + at, count);
                up.load(static_cast<const T*>(args.up) + at, count);
                grad.load(static_cast<const T*>(args.dy) + first * args.columns + n, count);
                for (int64_t i = 0; i < kChunk; i += kNative) {
                    const Native g = native_at(gate.value + i), u = native_at(up.value + i),
                                 dy = native_at(grad.value + i);
                    const Logistic<kCubic> s(p, g);
                    native_at(gate.value + i) = dy * u * s.slope;
                    native_at(up.value + i) = dy * g * s.share;
                }
                gate.store(static_cast<T*>(args.dgate) + at, count);
                up.store(static_cast<T*>(args.dup) + at, count);
            }
    }

    static void forward(const GateArgs& args, int64_t first, int64_t last) {
        (args.cubic == 0 ? forward_of<false> : forward_of<true>)(args, first, last);
    }
    static void backward(const GateArgs& args, int64_t first, int64_t last) {
        (args.cubic == 0 ? backward_of<false> : backward_of<true>)(args, first, last);
    }

    static GateKernels kernels() { return {.forward = forward, .backward = backward}; }
};

}  // namespace elementwise
}  // namespace peftcore

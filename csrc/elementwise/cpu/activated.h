// y = act(x) and its gradient, one pass over memory each, in fp32. act is x Φ(x) (GELU), with the normal distribution Φ,
// or x / (1 + e^-p) as in gates.h.
#pragma once

#include "elementwise/cpu/gated.h"

namespace peftcore {
namespace elementwise {

// Φ(x), and the slope of x Φ(x), which is NaN at infinity. Φ(-z) = e^(-z²/2) t R(t) with t = 1 / (1 + 0.3 z / √2), z >= 0,
// and a polynomial R, whose largest relative error is 2e-8 (fitted to z <= 13.5, where Φ(-z) is 1e-41).
struct Normal {
    Native share, slope;

    __attribute__((always_inline)) explicit inline Normal(const Native& x) {
        constexpr uint32_t kMinus88 = 0xc2b00000u;
        const auto add = [](const Native& a, const Native& b, float c)
                             __attribute__((always_inline)) { return fused(a, b, Native{} + c); };
        const Native power = (-0.5f * x) * x;  // bits of negative values are larger for larger magnitudes
        const Native e = exponential_within<Fused>(bits_float(at_most(float_bits(power), kMinus88)));
        const Native t = 1.0f / add(Native{} + 0.21213203f, bits_float(float_bits(x) & ~kSignBit), 1.0f);
        Native sum = add(t, Native{} - 0.0647289593f, 0.242610903f);
        sum = add(sum, t, -0.255754553f);
        sum = add(sum, t, 0.273375749f);
        sum = add(sum, t, -0.0469528987f);
        sum = add(sum, t, 0.107284167f);
        sum = add(sum, t, 0.0742218757f);
        sum = add(sum, t, 0.0853491167f);
        sum = add(sum, t, 0.0845945894f);
        const Native below = sum * t * e;
        share = x > 0.0f ? 1.0f - below : below;
        slope = fused(x, 0.39894228f * e, share) + (x - x);
    }
};

template <typename Level>
struct Activated {
    using T = typename Level::T;
    using Chunk = simd::Chunk<Level>;
    using Power = typename Gates<Level>::Power;
    template <bool kCubic>
    using Logistic = typename Gates<Level>::template Logistic<kCubic>;

    // body(a function of x that returns `share`, by which x is multiplied, and the slope of their product)
    template <typename Body>
    static void with_curve(const ActivationArgs& args, const Body& body) {
        const Power p{args.linear, args.cubic};
        if (args.normal)
            body([](const Native& x) { return Normal(x); });
        else if (args.cubic != 0)
            body([p](const Native& x) { return Logistic<true>(p, x); });
        else
            body([p](const Native& x) { return Logistic<false>(p, x); });
    }

    template <typename Curve>
    static void forward_of(const ActivationArgs& args, int64_t first, int64_t last, const Curve& curve) {
        Chunk x;
        for (; first < last; first += kChunk) {
            const int64_t count = std::min(kChunk, last - first);
            x.load(static_cast<const T*>(args.x) + first, count);
            for (int64_t i = 0; i < kChunk; i += kNative) {
                Native& value = native_at(x.value + i);
                value *= curve(value).share;
            }
            x.store(static_cast<T*>(args.y) + first, count);
        }
    }

    template <typename Curve>
    static void backward_of(const ActivationArgs& args, int64_t first, int64_t last, const Curve& curve) {
        Chunk x, grad;
        for (; first < last; first += kChunk) {
            const int64_t count = std::min(kChunk, last - first);
            x.load(static_cast<const T*>(args.x) + first, count);
            grad.load(static_cast<const T*>(args.dy) + first, count);
            for (int64_t i = 0; i < kChunk; i += kNative) {
                Native& value = native_at(x.value + i);
                value = native_at(grad.value + i) * curve(value).slope;
            }
            x.store(static_cast<T*>(args.y) + first, count);
        }
    }

    static void forward(const ActivationArgs& args, int64_t first, int64_t last) {
        with_curve(args, [&](const auto& curve) { forward_of(args, first, last, curve); });
    }
    static void backward(const ActivationArgs& args, int64_t first, int64_t last) {
        with_curve(args, [&](const auto& curve) { backward_of(args, first, last, curve); });
    }

    static ActivationKernels kernels() { return {.forward = forward, .backward = backward}; }
};

}  // namespace elementwise
}  // namespace peftcore

// y = act(g) ∘ u and its gradients, each in one pass over memory, in fp32. act is x s, s = 1 / (1 + e^-p): silu with p = x,
// GELU by tanh with p = 2 √(2/π) (x + 0.044715 x³). Loops over a chunk take a vector at a time (sixteen.h).
#pragma once

#include "lora/cpu/blocks.h"
#include "lora/cpu/sixteen.h"

namespace peftcore {
namespace lora {

constexpr uint32_t kSignBit = 0x80000000u;

// x with at most the magnitude whose bits are `most`. Here and below F is float or a vector of sixteen.h.
template <typename F>
PEFTCORE_INLINED F limited(const F& x, uint32_t most) {
    return bits_float(at_most(float_bits(x) & ~kSignBit, most) | (float_bits(x) & kSignBit));
}

// How a b + c is rounded: the product and the sum, with the same bits at all levels, or `fused`.
struct Twice {
    template <typename F>
    PEFTCORE_INLINED F multiply_add(const F& a, const F& b, const F& c) {
        return a * b + c;
    }
};
struct Fused {
    PEFTCORE_INLINED Native multiply_add(const Native& a, const Native& b, const Native& c) {
        return fused(a, b, c);
    }
};

// e^x for x in [-88, 88]. Relative error at most 2e-7: 2^n times the Taylor polynomial of degree seven, whose error on
// half of ln 2 is 5e-9.
template <typename Rounding = Twice, typename F>
PEFTCORE_INLINED F exponential_within(const F& x) {
    const auto add = [](const F& a, const F& b, float c)
                         __attribute__((always_inline)) { return Rounding::multiply_add(a, b, F{} + c); };
    constexpr float kRound = 12582912.0f;  // 1.5 · 2^23, where fp32 values are integers
    const F shifted = add(x, F{} + 1.44269504f, kRound), n = shifted - kRound;
    // ln 2 in two parts
    const F above = Rounding::multiply_add(n, F{} - 0.693359375f, x);
    const F r = Rounding::multiply_add(n, F{} + 2.12194440e-4f, above);
    F sum = add(r, F{} + 1.0f / 5040, 1.0f / 720);
    sum = add(sum, r, 1.0f / 120);
    sum = add(sum, r, 1.0f / 24);
    sum = add(sum, r, 1.0f / 6);
    sum = add(sum, r, 0.5f);
    sum = add(sum, r, 1.0f);
    sum = add(sum, r, 1.0f);
    return sum * bits_float((float_bits(shifted) - (float_bits(kRound) - 127u)) << 23u);
}

// e^x, with x clamped to [-88, 88].
template <typename Rounding = Twice, typename F>
PEFTCORE_INLINED F exponential(const F& x) {
    constexpr uint32_t k88 = 0x42b00000u;
    return exponential_within<Rounding>(limited(x, k88));
}

template <typename Level>
struct Gates {
    using T = typename Level::T;
    static constexpr int kLanes = Level::kLanes;
    static constexpr int64_t kChunk = 256;
    static_assert(kChunk % kLanes == 0);

    struct Chunk {
        alignas(64) float value[kChunk] = {};

        void load(const T* from, int64_t count) {
            for (int64_t n = 0; n < count; n += kLanes)
                Level::store(value + n, load_some<Level>(from + n, count - n));
        }
        void store(T* to, int64_t count) const {
            for (int64_t n = 0; n < count; n += kLanes)
                store_some<Level>(to + n, count - n, Level::load(value + n));
        }
        // Rounds the values to T.
        void round(int64_t count = kChunk) {
            if constexpr (sizeof(T) < sizeof(float)) {
                alignas(64) T rounded[kLanes];
                for (int64_t n = 0; n < count; n += kLanes) {
                    Level::store(rounded, Level::load(value + n));
                    Level::store(value + n, Level::load(rounded));
                }
            }
        }
    };

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

}  // namespace lora
}  // namespace peftcore

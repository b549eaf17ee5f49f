// y = silu(g) ∘ u for rows [g, u], and its gradient, each in one pass over memory, in fp32 with one rounding. The
// compiler vectorizes the loops over a chunk, without contractions, so that all levels give the same bits.
#pragma once

#include "lora/cpu/blocks.h"

namespace peftcore {
namespace lora {

// e^x for x in [-88, 88]. Relative error at most 2e-7: 2^n times the Taylor polynomial of degree seven, whose error on
// half of ln 2 is 5e-9.
static inline float exponential_within(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 · 2^23, where fp32 values are integers
    const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * bits_float((float_bits(shifted) - float_bits(kRound) + 127) << 23);
}

// e^x, with x clamped to [-88, 88].
static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -88.0f ? -88.0f : x;
    return exponential_within(x);
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
    };

    static void forward(const GateArgs& args, int64_t first, int64_t last) {
        Chunk gate, up;
        for (; first < last; ++first)
            for (int64_t n = 0; n < args.columns; n += kChunk) {
                const T* x = static_cast<const T*>(args.x) + 2 * first * args.columns + n;
                const int64_t count = std::min(kChunk, args.columns - n);
                gate.load(x, count);
                up.load(x + args.columns, count);
                for (int64_t i = 0; i < kChunk; ++i)
                    gate.value[i] = gate.value[i] / (1.0f + exponential(-gate.value[i])) * up.value[i];
                gate.store(static_cast<T*>(args.y) + first * args.columns + n, count);
            }
    }

    static void backward(const GateArgs& args, int64_t first, int64_t last) {
        Chunk gate, up, grad;
        for (; first < last; ++first)
            for (int64_t n = 0; n < args.columns; n += kChunk) {
                const int64_t row = 2 * first * args.columns + n, count = std::min(kChunk, args.columns - n);
                const T* x = static_cast<const T*>(args.x) + row;
                gate.load(x, count);
                up.load(x + args.columns, count);
                grad.load(static_cast<const T*>(args.dy) + first * args.columns + n, count);
                for (int64_t i = 0; i < kChunk; ++i) {
                    const float g = gate.value[i], s = 1.0f / (1.0f + exponential(-g));
                    gate.value[i] = grad.value[i] * up.value[i] * s * (1.0f + g * (1.0f - s));
                    up.value[i] = grad.value[i] * g * s;
                }
                T* dx = static_cast<T*>(args.y) + row;
                gate.store(dx, count);
                up.store(dx + args.columns, count);
            }
    }

    static GateKernels kernels() { return {.forward = forward, .backward = backward}; }
};

}  // namespace lora
}  // namespace peftcore

// The rules, written once in terms of what a SIMD level `V` supplies: a register `F` of kWidth fp32 values,
// and
//
//   load, store, set1, add, sub, mul, div, sqrt, fma     each rounded once
//   sign                                                 -1, 0, 1
//   where_zero(x, d)                                     x where d is 0, else 0, also where d is NaN
//   Largest                                              a running maximum of |x|
//   decode(codes, table, absmax, out)                    kChunk codes to registers of table[code] * absmax
//   encode<signed>(x, inverse, encoder, codes)           256 values times `inverse` to codes
//
// What is left over of a span goes through the scalar level, whose bits are the same.
#pragma once

#include "optim/cpu/kernels.h"

namespace peftcore {
namespace optim {

struct Scalar {
    using F = float;
    static constexpr int kWidth = 1;
    static inline F load(const float* x) { return *x; }
    static inline void store(float* out, F x) { *out = x; }
    static inline F set1(float x) { return x; }
    static inline F add(F a, F b) { return a + b; }
    static inline F sub(F a, F b) { return a - b; }
    static inline F mul(F a, F b) { return a * b; }
    static inline F div(F a, F b) { return a / b; }
    static inline F sqrt(F a) { return __builtin_sqrtf(a); }
    static inline F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
    static inline F sign(F a) { return a > 0 ? 1.0f : a < 0 ? -1.0f : a; }
};

// m + weight (g - m) with one rounding of the product and sum, exact at both ends (as torch.lerp).
template <typename V>
static inline typename V::F lerp(typename V::F m, typename V::F g, float weight) {
    const typename V::F way = V::sub(g, m);
    if (weight < 0.5f) return V::fma(V::set1(weight), way, m);
    return V::fma(V::set1(weight - 1.0f), way, g);
}

template <typename V>
static inline void adamw_moments(typename V::F g, typename V::F& m, typename V::F& v, const AdamW& c) {
    m = lerp<V>(m, g, c.weight1);
    v = V::fma(V::mul(V::set1(c.weight2), g), g, V::mul(v, V::set1(c.beta2)));
}

template <typename V>
static inline int64_t adamw_part(float* p, const float* g, float* m, float* v, int64_t i, int64_t count,
                                 const AdamW& c) {
    using F = typename V::F;
    for (; i + V::kWidth <= count; i += V::kWidth) {
        F mean = V::load(m + i), square = V::load(v + i);
        adamw_moments<V>(V::mul(V::load(g + i), V::set1(c.factor)), mean, square, c);
        V::store(m + i, mean);
        V::store(v + i, square);
        const F divisor = V::add(V::div(V::sqrt(square), V::set1(c.root)), V::set1(c.eps));
        const F way = V::div(V::mul(V::set1(c.step), mean), divisor);
        V::store(p + i, V::add(V::mul(V::load(p + i), V::set1(c.decay)), way));
    }
    return i;
}

template <typename V>
static void adamw(float* p, const float* g, float* m, float* v, int64_t count, const AdamW& c) {
    adamw_part<Scalar>(p, g, m, v, adamw_part<V>(p, g, m, v, 0, count, c), count, c);
}

// A whole block; the caller pads.
template <typename V>
static inline void adamw_8bit_block(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_absmax,
                                    float* v_absmax, const AdamW c) {  // a copy: p may not alias it
    using F = typename V::F;
    const auto& m_table = V::signed_table();
    const auto& v_table = V::unsigned_table();
    alignas(64) float means[kBlock], squares[kBlock];
    const float m_old = *m_absmax, v_old = *v_absmax;
    typename V::Largest m_largest, v_largest;
    for (int chunk = 0; chunk < kBlock; chunk += V::kChunk) {
        constexpr int kParts = V::kChunk / V::kWidth;
        F mean[kParts], square[kParts];
        // The next block: encoding keeps the core from looking that far ahead.
        __builtin_prefetch(m + chunk + kBlock, 1);
        __builtin_prefetch(v + chunk + kBlock, 1);
        V::decode(m + chunk, m_table, m_old, mean);
        V::decode(v + chunk, v_table, v_old, square);
        for (int part = 0; part < kParts; ++part) {
            const int i = chunk + part * V::kWidth;
            __builtin_prefetch(p + i + kBlock, 1);
            __builtin_prefetch(g + i + kBlock);
            adamw_moments<V>(V::mul(V::load(g + i), V::set1(c.factor)), mean[part], square[part], c);
            const F divisor = V::add(V::sqrt(square[part]), V::set1(c.eps));
            const F way = V::div(V::mul(V::set1(c.step), mean[part]), divisor);
            V::store(p + i, V::add(V::mul(V::load(p + i), V::set1(c.decay)), way));
            // NaN or infinity in one element must not become the scale of 256: its state begins anew.
            const F finite = V::add(V::sub(mean[part], mean[part]), V::sub(square[part], square[part]));
            mean[part] = V::where_zero(mean[part], finite);
            square[part] = V::where_zero(square[part], finite);
            V::store(means + i, mean[part]);
            V::store(squares + i, square[part]);
            m_largest.take(mean[part]);
            v_largest.take(square[part]);
        }
    }
    const float m_scale = m_largest.value(), v_scale = v_largest.value();
    *m_absmax = m_scale;
    *v_absmax = v_scale;
    // A block of zeros has no reciprocal; its values times 0 are the code of 0.
    V::template encode<true>(means, m_scale > 0 ? 1.0f / m_scale : 0.0f, signed_map().encoder, m);
    V::template encode<false>(squares, v_scale > 0 ? 1.0f / v_scale : 0.0f, unsigned_map().encoder, v);
}

template <typename V>
static void adamw_8bit(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_absmax, float* v_absmax,
                       int64_t count, const AdamW& c) {
    if (count == kBlock) return adamw_8bit_block<V>(p, g, m, v, m_absmax, v_absmax, c);
    float p_block[kBlock] = {}, g_block[kBlock] = {};
    uint8_t m_block[kBlock], v_block[kBlock] = {};
    memset(m_block, 127, kBlock);  // zeros, as the padding of p and g
    memcpy(p_block, p, count * sizeof(float));
    memcpy(g_block, g, count * sizeof(float));
    memcpy(m_block, m, count);
    memcpy(v_block, v, count);
    adamw_8bit_block<V>(p_block, g_block, m_block, v_block, m_absmax, v_absmax, c);
    memcpy(p, p_block, count * sizeof(float));
    memcpy(m, m_block, count);
    memcpy(v, v_block, count);
}

template <typename V>
static inline int64_t lion_part(float* p, const float* g, float* m, int64_t i, int64_t count, const Lion& c) {
    using F = typename V::F;
    for (; i + V::kWidth <= count; i += V::kWidth) {
        const F grad = V::mul(V::load(g + i), V::set1(c.factor)), mean = V::load(m + i);
        const F way = V::mul(V::set1(c.step), V::sign(lerp<V>(mean, grad, c.weight1)));
        V::store(p + i, V::add(V::mul(V::load(p + i), V::set1(c.decay)), way));
        V::store(m + i, lerp<V>(mean, grad, c.weight2));
    }
    return i;
}

template <typename V>
static void lion(float* p, const float* g, float* m, int64_t count, const Lion& c) {
    lion_part<Scalar>(p, g, m, lion_part<V>(p, g, m, 0, count, c), count, c);
}

template <typename V>
static inline int64_t momentum_part(float* p, const float* g, float* buffer, int64_t i, int64_t count,
                                    const Momentum& c) {
    using F = typename V::F;
    for (; i + V::kWidth <= count; i += V::kWidth) {
        const F param = V::load(p + i);
        const F grad =
            V::add(V::mul(V::load(g + i), V::set1(c.factor)), V::mul(V::set1(c.weight_decay), param));
        const F mean =
            V::add(V::mul(V::load(buffer + i), V::set1(c.momentum)), V::mul(V::set1(c.weight), grad));
        V::store(buffer + i, mean);
        const F way = c.nesterov != 0 ? V::add(grad, V::mul(V::set1(c.momentum), mean)) : mean;
        V::store(p + i, V::add(param, V::mul(V::set1(c.step), way)));
    }
    return i;
}

template <typename V>
static void momentum(float* p, const float* g, float* buffer, int64_t count, const Momentum& c) {
    momentum_part<Scalar>(p, g, buffer, momentum_part<V>(p, g, buffer, 0, count, c), count, c);
}

template <typename T>
static void widen_rest(const void* x, int64_t i, int64_t count, float* out) {
    for (; i < count; ++i) out[i] = to_float(static_cast<const T*>(x)[i]);
}

template <typename T>
static void narrow_rest(const float* x, int64_t i, int64_t count, void* out) {
    for (; i < count; ++i) static_cast<T*>(out)[i] = from_float<T>(x[i]);
}

template <typename V>
static void widen(const void* x, Dtype dtype, int64_t count, float* out) {
    const int64_t whole = count / V::kWidth * V::kWidth;
    const uint16_t* bits = static_cast<const uint16_t*>(x);
    if (dtype == Dtype::kHalf) {
        for (int64_t i = 0; i < whole; i += V::kWidth) V::store(out + i, V::widen_half(bits + i));
        widen_rest<Half>(x, whole, count, out);
    } else {
        for (int64_t i = 0; i < whole; i += V::kWidth) V::store(out + i, V::widen_bfloat16(bits + i));
        widen_rest<BFloat16>(x, whole, count, out);
    }
}

template <typename V>
static void narrow(const float* x, int64_t count, Dtype dtype, void* out) {
    const int64_t whole = count / V::kWidth * V::kWidth;
    uint16_t* bits = static_cast<uint16_t*>(out);
    if (dtype == Dtype::kHalf) {
        for (int64_t i = 0; i < whole; i += V::kWidth) V::narrow_half(V::load(x + i), bits + i);
        narrow_rest<Half>(x, whole, count, out);
    } else {
        for (int64_t i = 0; i < whole; i += V::kWidth) V::narrow_bfloat16(V::load(x + i), bits + i);
        narrow_rest<BFloat16>(x, whole, count, out);
    }
}

// Sixteen calls of the generator side by side, so that the compiler can use whatever vectors there are.
static inline void draw(int64_t stream, int64_t step, int64_t group, PhiloxWords* drawn) {
    for (int i = 0; i < 16; ++i) drawn[i] = rounding_words(stream, group + i, step);
}

template <typename T>
static void narrow_at_random(const float* x, int64_t count, T* out, int64_t stream, int64_t step,
                             int64_t first) {
    PhiloxWords drawn[16];
    for (int64_t i = 0; i < count; ++i) {
        if (i % 128 == 0) draw(stream, step, (first + i) / 8, drawn);
        out[i] = round_stochastic(x[i], random_bits(drawn[i % 128 / 8], i), out);
    }
}

static void narrow_stochastic(const float* x, int64_t count, Dtype dtype, void* out, int64_t stream,
                              int64_t step, int64_t first) {
    if (dtype == Dtype::kHalf)
        return narrow_at_random(x, count, static_cast<Half*>(out), stream, step, first);
    narrow_at_random(x, count, static_cast<BFloat16*>(out), stream, step, first);
}

template <typename V>
static Kernels kernels_of() {
    return {widen<V>, narrow<V>, narrow_stochastic, adamw<V>, adamw_8bit<V>, lion<V>, momentum<V>};
}

}  // namespace optim
}  // namespace peftcore

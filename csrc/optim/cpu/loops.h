// The loops of all rules, written once in terms of operations that each SIMD level supplies. The remainder of a span
// goes through the scalar level, which gives the same bits.
#pragma once

#include <concepts>

#include "optim/cpu/kernels.h"

namespace peftcore {
namespace optim {

// A register `F` of kWidth fp32 values, and what rules.h reads.
template <typename V>
concept Arithmetic = requires(typename V::F x, float value, const float* from, float* to) {
    { V::kWidth } -> std::convertible_to<int>;
    { V::load(from) } -> std::same_as<typename V::F>;
    V::store(to, x);
    { V::set1(value) } -> std::same_as<typename V::F>;
    { V::add(x, x) } -> std::same_as<typename V::F>;
    { V::sub(x, x) } -> std::same_as<typename V::F>;
    { V::mul(x, x) } -> std::same_as<typename V::F>;
    { V::div(x, x) } -> std::same_as<typename V::F>;
    { V::sqrt(x) } -> std::same_as<typename V::F>;
    { V::fma(x, x, x) } -> std::same_as<typename V::F>;
    { V::sign(x) } -> std::same_as<typename V::F>;
};

template <typename V>
concept Lanes = Arithmetic<V> && requires(typename V::F x, typename V::Largest largest, float value,
                                          const float* from, const uint8_t* codes, uint8_t* out,
                                          const Encoder& encoder, const uint16_t* bits, uint16_t* narrow) {
    // The first where the second is 0, else 0, also where it is NaN.
    { V::where_zero(x, x) } -> std::same_as<typename V::F>;
    largest.take(x);  // of |x|; NaN is above all
    { largest.value() } -> std::same_as<float>;
    { V::kChunk } -> std::convertible_to<int>;
    V::decode(codes, V::signed_table(), value, &x);  // kChunk codes to registers of table[code] * value
    V::decode(codes, V::unsigned_table(), value, &x);
    V::template encode<true>(from, value, encoder, out);  // kBlock floats times value, to codes
    V::template encode<false>(from, value, encoder, out);
    { V::widen_half(bits) } -> std::same_as<typename V::F>;
    { V::widen_bfloat16(bits) } -> std::same_as<typename V::F>;
    V::narrow_half(x, narrow);  // to the nearest
    V::narrow_bfloat16(x, narrow);
};

namespace {  // a copy for each level: of functions with one name the linker would keep one level's instructions

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

}  // namespace

template <Arithmetic V, typename Rule>
static inline int64_t update_part(float* p, const float* g, float* const* state, int64_t i, int64_t count,
                                  const Rule& rule) {
    using F = typename V::F;
    for (; i + V::kWidth <= count; i += V::kWidth) {
        F param = V::load(p + i), moments[Rule::kMoments];
        for (int k = 0; k < Rule::kMoments; ++k) moments[k] = V::load(state[k] + i);
        rule.template update<V>(param, V::mul(V::load(g + i), V::set1(rule.factor)), moments);
        for (int k = 0; k < Rule::kMoments; ++k) V::store(state[k] + i, moments[k]);
        V::store(p + i, param);
    }
    return i;
}

// State in fp32.
template <Lanes V, typename Rule>
static void update_floats(float* p, const float* g, void* const* state, int64_t count,
                          const Scalars& scalars) {
    const Rule rule = with_scalars<Rule>(scalars);
    float* moments[Rule::kMoments];
    for (int k = 0; k < Rule::kMoments; ++k) moments[k] = static_cast<float*>(state[k]);
    const int64_t whole = update_part<V>(p, g, moments, 0, count, rule);
    update_part<Scalar>(p, g, moments, whole, count, rule);
}

// A whole block of a rule with a signed and an unsigned moment in 8 bits; the caller pads.
template <Lanes V, typename Rule>
static inline void update_block(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_absmax,
                                float* v_absmax, const Rule rule) {  // a copy: p may not alias it
    using F = typename V::F;
    static_assert(Rule::kMoments == 2);
    const auto& m_table = V::signed_table();
    const auto& v_table = V::unsigned_table();
    alignas(64) float means[kBlock], squares[kBlock];
    const float m_old = *m_absmax, v_old = *v_absmax;
    typename V::Largest m_largest, v_largest;
    for (int chunk = 0; chunk < kBlock; chunk += V::kChunk) {
        constexpr int kParts = V::kChunk / V::kWidth;
        F mean[kParts], square[kParts];
        // Prefetches the next block: encoding keeps the core from reaching it early enough.
        __builtin_prefetch(m + chunk + kBlock, 1);
        __builtin_prefetch(v + chunk + kBlock, 1);
        V::decode(m + chunk, m_table, m_old, mean);
        V::decode(v + chunk, v_table, v_old, square);
        for (int part = 0; part < kParts; ++part) {
            const int i = chunk + part * V::kWidth;
            __builtin_prefetch(p + i + kBlock, 1);
            __builtin_prefetch(g + i + kBlock);
            F param = V::load(p + i), moments[2] = {mean[part], square[part]};
            rule.template update<V>(param, V::mul(V::load(g + i), V::set1(rule.factor)), moments);
            V::store(p + i, param);
            // NaN or infinity in one element must not become the scale of 256: its state is reset.
            const F finite = V::add(V::sub(moments[0], moments[0]), V::sub(moments[1], moments[1]));
            moments[0] = V::where_zero(moments[0], finite);
            moments[1] = V::where_zero(moments[1], finite);
            V::store(means + i, moments[0]);
            V::store(squares + i, moments[1]);
            m_largest.take(moments[0]);
            v_largest.take(moments[1]);
        }
    }
    const float m_scale = m_largest.value(), v_scale = v_largest.value();
    *m_absmax = m_scale;
    *v_absmax = v_scale;
    // A block of zeros has no reciprocal; its values times 0 are the code of 0.
    V::template encode<true>(means, m_scale > 0 ? 1.0f / m_scale : 0.0f, signed_map().encoder, m);
    V::template encode<false>(squares, v_scale > 0 ? 1.0f / v_scale : 0.0f, unsigned_map().encoder, v);
}

// A span of fewer elements than a block.
template <Lanes V, typename Rule>
static void update_padded_block(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_absmax,
                                float* v_absmax, int64_t count, const Rule& rule) {
    float p_block[kBlock] = {}, g_block[kBlock] = {};
    uint8_t m_block[kBlock], v_block[kBlock] = {};
    memset(m_block, 127, kBlock);  // zeros, as the padding of p and g
    memcpy(p_block, p, count * sizeof(float));
    memcpy(g_block, g, count * sizeof(float));
    memcpy(m_block, m, count);
    memcpy(v_block, v, count);
    update_block<V>(p_block, g_block, m_block, v_block, m_absmax, v_absmax, rule);
    memcpy(p, p_block, count * sizeof(float));
    memcpy(m, m_block, count);
    memcpy(v, v_block, count);
}

// State in codes of 8 bits.
template <Lanes V, typename Rule>
static void update_codes(float* p, const float* g, void* const* state, int64_t count,
                         const Scalars& scalars) {
    const Rule rule = with_scalars<Rule>(scalars);
    for (int64_t i = 0; i < count; i += kBlock) {
        uint8_t *m = static_cast<uint8_t*>(state[0]) + i, *v = static_cast<uint8_t*>(state[1]) + i;
        float* m_absmax = static_cast<float*>(state[2]) + i / kBlock;
        float* v_absmax = static_cast<float*>(state[3]) + i / kBlock;
        if (count - i >= kBlock)
            update_block<V>(p + i, g + i, m, v, m_absmax, v_absmax, rule);
        else
            update_padded_block<V>(p + i, g + i, m, v, m_absmax, v_absmax, count - i, rule);
    }
}

template <Lanes V, typename Rule>
static void update(float* p, const float* g, void* const* state, int64_t count, const Scalars& scalars) {
    if constexpr (Rule::kIn8Bits)
        update_codes<V, Rule>(p, g, state, count, scalars);
    else
        update_floats<V, Rule>(p, g, state, count, scalars);
}

template <typename T>
static void widen_rest(const void* x, int64_t i, int64_t count, float* out) {
    for (; i < count; ++i) out[i] = to_float(static_cast<const T*>(x)[i]);
}

template <typename T>
static void narrow_rest(const float* x, int64_t i, int64_t count, void* out) {
    for (; i < count; ++i) static_cast<T*>(out)[i] = from_float<T>(x[i]);
}

template <Lanes V>
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

template <Lanes V>
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

// Sixteen calls of the generator at once, so that the compiler can vectorize them.
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

template <Lanes V, typename... Rule>
static Kernels kernels_of(RuleList<Rule...>) {
    return {.widen = widen<V>,
            .narrow = narrow<V>,
            .narrow_stochastic = narrow_stochastic,
            .update = {update<V, Rule>...}};
}

template <Lanes V>
static Kernels kernels_of() {
    return kernels_of<V>(Rules());
}

}  // namespace optim
}  // namespace peftcore

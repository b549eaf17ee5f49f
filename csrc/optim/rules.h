// The rules of optimizers: what each does to an element of a parameter p, given its gradient g and its state.
//
// peftcore/ops/optim_rules.py has the table of rules with their planes of state and scalars, and passes it when it is
// imported. A rule here has its name in that table, the scalars that its update reads, in the table's order, and the
// update. It is written once for all SIMD levels and CUDA, in terms of
//
//     V::F                                  fp32 values: a register of them, or one
//     add, sub, mul, div, sqrt, fma         each rounded once
//     set1                                  one value everywhere
//     sign                                  -1, 0 or 1; NaN stays
//
// `factor` is the first scalar of every rule: g is already multiplied by it (1 / loss scale, negative to
// maximise).
//
// State of `kMoments` fp32 values per element has as many planes; in 8 bits, as many planes of codes and then of
// scales. A new rule needs an entry in the table, a struct here, and a place in `Rules`.
#pragma once

#include "optim/segment.h"

namespace peftcore {
namespace optim {

// The members that scalars are read into, and their names as one text.
#define PEFTCORE_SCALARS(...) \
    float __VA_ARGS__;        \
    static constexpr const char* kScalars = #__VA_ARGS__

// m + weight (g - m) with one rounding of the product and sum, exact at both ends (as torch.lerp).
template <typename V>
static PEFTCORE_HD typename V::F lerp(typename V::F m, typename V::F g, float weight) {
    const typename V::F way = V::sub(g, m);
    if (weight < 0.5f) return V::fma(V::set1(weight), way, m);
    return V::fma(V::set1(weight - 1.0f), way, g);
}

// AdamW's state: m = lerp(m, g, weight1), v = fma(weight2 g, g, v beta2).
template <typename V, typename F, typename Rule>
static PEFTCORE_HD void update_moments(F g, F& m, F& v, const Rule& rule) {
    m = lerp<V>(m, g, rule.weight1);
    v = V::fma(V::mul(V::set1(rule.weight2), g), g, V::mul(v, V::set1(rule.beta2)));
}

// p = p decay + step m / (sqrt(v) / root + eps)
struct AdamW {
    PEFTCORE_SCALARS(factor, decay, weight1, beta2, weight2, step, root, eps);
    static constexpr const char* kName = "adamw";
    static constexpr bool kIn8Bits = false;
    static constexpr int kMoments = 2;

    template <typename V, typename F = typename V::F>
    PEFTCORE_HD void update(F& p, F g, F* state) const {
        F &m = state[0], &v = state[1];
        update_moments<V>(g, m, v, *this);
        const F divisor = V::add(V::div(V::sqrt(v), V::set1(root)), V::set1(eps));
        const F way = V::div(V::mul(V::set1(step), m), divisor);
        p = V::add(V::mul(p, V::set1(decay)), way);
    }
};

// p = p decay + step m / (sqrt(v) + eps): step and eps come multiplied by root
struct AdamW8bit {
    PEFTCORE_SCALARS(factor, decay, weight1, beta2, weight2, step, eps);
    static constexpr const char* kName = "adamw_8bit";
    static constexpr bool kIn8Bits = true;
    static constexpr int kMoments = 2;

    template <typename V, typename F = typename V::F>
    PEFTCORE_HD void update(F& p, F g, F* state) const {
        F &m = state[0], &v = state[1];
        update_moments<V>(g, m, v, *this);
        const F divisor = V::add(V::sqrt(v), V::set1(eps));
        const F way = V::div(V::mul(V::set1(step), m), divisor);
        p = V::add(V::mul(p, V::set1(decay)), way);
    }
};

// p = p decay + step sign(lerp(m, g, weight1)), m = lerp(m, g, weight2)
struct Lion {
    PEFTCORE_SCALARS(factor, decay, weight1, weight2, step);
    static constexpr const char* kName = "lion";
    static constexpr bool kIn8Bits = false;
    static constexpr int kMoments = 1;

    template <typename V, typename F = typename V::F>
    PEFTCORE_HD void update(F& p, F g, F* state) const {
        F& m = state[0];
        const F way = V::mul(V::set1(step), V::sign(lerp<V>(m, g, weight1)));
        p = V::add(V::mul(p, V::set1(decay)), way);
        m = lerp<V>(m, g, weight2);
    }
};

// g' = g + weight_decay p, b = momentum b + weight g', p = p + step b; Nesterov: p + step (g' + momentum b)
struct Momentum {
    PEFTCORE_SCALARS(factor, weight_decay, momentum, weight, step, nesterov);
    static constexpr const char* kName = "momentum";
    static constexpr bool kIn8Bits = false;
    static constexpr int kMoments = 1;

    template <typename V, typename F = typename V::F>
    PEFTCORE_HD void update(F& p, F g, F* state) const {
        F& b = state[0];
        const F grad = V::add(g, V::mul(V::set1(weight_decay), p));
        b = V::add(V::mul(b, V::set1(momentum)), V::mul(V::set1(weight), grad));
        const F way = nesterov != 0 ? V::add(grad, V::mul(V::set1(momentum), b)) : b;
        p = V::add(p, V::mul(V::set1(step), way));
    }
};

// All rules; a rule's number is its index.
template <typename... Rule>
struct RuleList {
    static constexpr int kCount = sizeof...(Rule);
};
using Rules = RuleList<AdamW, AdamW8bit, Lion, Momentum>;

}  // namespace optim
}  // namespace peftcore

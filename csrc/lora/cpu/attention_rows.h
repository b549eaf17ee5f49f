// A row of attention's scores, which becomes one of probabilities, and its gradient. Loops take a vector at a time
// (sixteen.h).
#pragma once

#include <cmath>
#include <limits>

#include "lora/cpu/cross_entropy.h"

namespace peftcore {
namespace lora {

typedef uint8_t NativeBytes __attribute__((vector_size(kNative), may_alias));

template <typename Level>
struct ScoreRows {
    static constexpr float kInfinity = std::numeric_limits<float>::infinity();

    // Keys that a query attends to and that dropout keeps, as bits of a vector's values.
    struct Seen {
        const AttentionArgs& args;
        const uint8_t* mask;
        int64_t end;

        Seen(const AttentionArgs& its_args, int64_t batch, int64_t head, int64_t query)
            : args(its_args),
              mask(args.mask == nullptr ? nullptr
                                        : args.mask + batch * args.mask_strides[0] +
                                              head * args.mask_strides[1] + query * args.mask_strides[2]),
              end(args.causal ? std::min(args.keys, query + 1) : args.keys) {}

        __attribute__((always_inline)) inline NativeBits operator()(int64_t key) const {
            NativeBits seen = ~NativeBits{};
            if (key + kNative > end) {
                const int64_t left = std::max<int64_t>(0, end - key);
                for (int64_t j = 0; j < kNative; ++j) seen[j] = j < left ? ~0u : 0u;
            }
            if (mask == nullptr) return seen;
            if (args.mask_strides[3] == 0) return mask[0] != 0 ? seen : NativeBits{};
            NativeBytes bytes{};
            if (const int64_t left = args.keys - key; left >= kNative)
                std::memcpy(&bytes, mask + key, sizeof bytes);
            else if (left > 0)
                std::memcpy(&bytes, mask + key, size_t(left));
            return where_above(__builtin_convertvector(bytes, NativeBits), 0u) & seen;
        }
    };

    struct Kept {
        uint16_t bits[kMostKeys / 16];

        Kept(const AttentionArgs& args, int64_t row) {
            if (args.dropout.threshold != 0)
                Level::keep_bytes(args.dropout, row, 0, ceil_div(args.keys, kColumnsPerCounter),
                                  reinterpret_cast<uint8_t*>(bits));
        }
        __attribute__((always_inline)) inline NativeBits operator()(int64_t key) const {
            NativeBits some = NativeBits{} + (uint32_t(bits[key / 16]) >> key % 16);
            for (int64_t j = 0; j < kNative; ++j) some[j] = some[j] >> j & 1u;
            return 0u - some;
        }
    };

    PEFTCORE_INLINED Native where(const NativeBits& there, const Native& value) {
        return bits_float(float_bits(value) & there);
    }

    static float sum_of(const Native& x) {
        float sum = 0;
        for (int64_t j = 0; j < kNative; ++j) sum += x[j];
        return sum;
    }

    // `s` becomes e^(s - the largest) of `count` scores, 0 for keys that are not seen or kept. Returns lse, and 1 / the
    // sum over the seen ones. A row that sees no key has an lse of infinity and a factor of 0; of a row that is not
    // finite both are NaN.
    struct Softmax {
        float lse, factor;
    };

    template <bool kDrops>
    static Softmax softmax(float* s, float scale, const Seen& seen, const Kept& kept, int64_t count) {
        const Native unseen = Native{} - kInfinity;
        Native most = unseen;
        NativeBits nan{};
        for (int64_t n = 0; n < count; n += kNative) {
            Native& value = native_at(s + n);
            const NativeBits there = seen(n);
            const Native z = bits_float((float_bits(value * scale) & there) | (float_bits(unseen) & ~there));
            nan |= where_nan(z);
            most = z > most ? z : most;
            value = z;
        }
        float largest = most[0];
        uint32_t any = nan[0];
        for (int j = 1; j < kNative; ++j) {
            largest = std::max(largest, most[j]);
            any |= nan[j];
        }
        Native sum{};
        for (int64_t n = 0; n < count; n += kNative) {
            Native& value = native_at(s + n);
            const Native e = Below(value - largest).exponential;
            sum += e;
            value = kDrops ? where(kept(n), e) : e;
        }
        constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
        if (any != 0 || largest == kInfinity) return {kNan, kNan};
        if (largest == -kInfinity) {
            std::memset(s, 0, size_t(count) * sizeof *s);
            return {kInfinity, 0.0f};
        }
        const float total = sum_of(sum);
        return {largest + std::log(total), 1.0f / total};
    }

    // P, as dv needs it, and dS of a row in the place of scores and dP.
    template <bool kDrops>
    static void slopes_of(float* s, float* dp, const AttentionArgs& args, float lse, float delta,
                          const Seen& seen, const Kept& kept, int64_t count) {
        const bool none = lse == kInfinity;
        const float not_finite = none ? 0.0f : lse - lse;  // added: 0, or NaN
        const float shift = none ? 0.0f : lse;
        for (int64_t n = 0; n < count; n += kNative) {
            Native &score = native_at(s + n), &slope = native_at(dp + n);
            const NativeBits there = none ? NativeBits{} : seen(n);
            const Native z = score * args.scale - shift;
            // Above 0 or NaN only where lse is not that of these scores.
            const Native power = z > -87.0f ? exponential(z) : Native{};
            const Native e = where(there, bits_float(float_bits(power) | where_nan(z)) + not_finite);
            Native of_p = slope, p = e;
            if constexpr (kDrops) {
                const NativeBits keeps = kept(n);
                of_p = where(keeps, of_p * args.kept_factor);
                p = where(keeps, e * args.kept_factor);
            }
            score = p;
            slope = where(there, e * (of_p - delta) * args.scale);
        }
    }
};

}  // namespace lora
}  // namespace peftcore

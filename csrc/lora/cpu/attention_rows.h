// A row of attention's scores, which becomes one of probabilities, and its gradient. Loops take a vector at a time
// (sixteen.h).
#pragma once

#include <cmath>
#include <limits>

#include "lora/cpu/cross_entropy.h"

namespace peftcore {
namespace lora {

typedef uint8_t NativeBytes __attribute__((vector_size(kNative), may_alias));

// Keys that a query attends to: those before `end` whose byte of the mask is not 0. There may be no mask, or one byte for
// all keys, with a stride of 0.
struct Seen {
    const uint8_t* mask;
    int64_t stride, end;

    [[gnu::always_inline]] Seen(const AttentionArgs& args, int64_t batch, int64_t head, int64_t query)
        : mask(args.mask), stride(args.mask_strides[3]), end(args.keys) {
        if (mask != nullptr)
            mask += batch * args.mask_strides[0] + head * args.mask_strides[1] + query * args.mask_strides[2];
        if (args.causal && query + 1 < end) end = query + 1;
    }
};

// Keys of a query that dropout keeps, as bits.
template <typename Level>
struct Kept {
    uint16_t bits[kMostKeys / 16];

    Kept(const AttentionArgs& args, int64_t row) {
        if (args.dropout.threshold != 0)
            Level::keep_bytes(args.dropout, row, 0, ceil_div(args.keys, kColumnsPerCounter),
                              reinterpret_cast<uint8_t*>(bits));
    }
};

template <typename Level>
struct ScoreRows {
    static constexpr float kInfinity = std::numeric_limits<float>::infinity();
    using Kept = lora::Kept<Level>;

    // Bits of a vector of keys, from `key` on, that are seen or kept.
    PEFTCORE_INLINED NativeBits bits_of(const Seen& seen, int64_t key) {
        const int64_t left = seen.end - key;
        NativeBits before_end = ~NativeBits{};
        if (left < kNative)
            for (int64_t j = 0; j < kNative; ++j) before_end[j] = j < left ? ~0u : 0u;
        if (seen.mask == nullptr) return before_end;
        if (seen.stride == 0) return seen.mask[0] != 0 ? before_end : NativeBits{};
        NativeBytes bytes{};
        if (left >= kNative)
            std::memcpy(&bytes, seen.mask + key, sizeof bytes);
        else if (left > 0)
            std::memcpy(&bytes, seen.mask + key, size_t(left));
        return where_above(__builtin_convertvector(bytes, NativeBits), 0u) & before_end;
    }
    PEFTCORE_INLINED NativeBits bits_of(const Kept& kept, int64_t key) {
        NativeBits some = NativeBits{} + (uint32_t(kept.bits[key / 16]) >> key % 16);
        for (int64_t j = 0; j < kNative; ++j) some[j] = some[j] >> j & 1u;
        return 0u - some;
    }

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
            const NativeBits there = bits_of(seen, n);
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
            value = kDrops ? where(bits_of(kept, n), e) : e;
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
            const NativeBits there = none ? NativeBits{} : bits_of(seen, n);
            const Native z = score * args.scale - shift;
            // Above 0 or NaN only where lse is not that of these scores.
            const Native power = z > -87.0f ? exponential(z) : Native{};
            const Native e = where(there, bits_float(float_bits(power) | where_nan(z)) + not_finite);
            Native of_p = slope, p = e;
            if constexpr (kDrops) {
                const NativeBits keeps = bits_of(kept, n);
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

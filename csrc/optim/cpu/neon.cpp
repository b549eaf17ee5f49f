// NEON. Maps are read one value at a time, as there are no gathers; the encoder's 16 rows are tables of bytes.
#include "common/neon.h"

#include "optim/cpu/loops.h"

namespace peftcore {
namespace optim {
namespace {

struct Neon {
    using F = float32x4_t;
    static constexpr int kWidth = 4;
    static inline F load(const float* x) { return vld1q_f32(x); }
    static inline void store(float* out, F x) { vst1q_f32(out, x); }
    static inline F set1(float x) { return vdupq_n_f32(x); }
    static inline F add(F a, F b) { return vaddq_f32(a, b); }
    static inline F sub(F a, F b) { return vsubq_f32(a, b); }
    static inline F mul(F a, F b) { return vmulq_f32(a, b); }
    static inline F div(F a, F b) { return vdivq_f32(a, b); }
    static inline F sqrt(F a) { return vsqrtq_f32(a); }
    static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static inline F sign(F a) {
        const F unit = vbslq_f32(vdupq_n_u32(0x80000000u), a, set1(1.0f));
        return vbslq_f32(vcagtq_f32(a, set1(0.0f)), unit, a);  // not where it is zero or NaN
    }

    static const float* signed_table() { return signed_map().value; }
    static const float* unsigned_table() { return unsigned_map().value; }

    static inline F where_zero(F x, F d) {
        return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vceqzq_f32(d)));
    }

    struct Largest {
        uint32x4_t bits = vdupq_n_u32(0);
        void take(F x) { bits = vmaxq_u32(bits, vreinterpretq_u32_f32(vabsq_f32(x))); }
        float value() const { return bits_float(vmaxvq_u32(bits)); }
    };

    static constexpr int kChunk = 8;
    static inline void decode(const uint8_t* codes, const float* table, float absmax, F* out) {
        uint64_t eight;
        memcpy(&eight, codes, sizeof eight);
        const auto entry = [&](int i) { return table[eight >> 8 * i & 255]; };
        for (int half = 0; half < 2; ++half) {
            const F entries = {entry(4 * half), entry(4 * half + 1), entry(4 * half + 2),
                               entry(4 * half + 3)};
            out[half] = mul(entries, set1(absmax));
        }
    }

    // Sixteen fp32 values, addressed by bytes.
    struct Table {
        explicit Table(const float* from) {
            for (int i = 0; i < 4; ++i) bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(from + 4 * i));
        }
        inline F operator()(uint8x16_t index) const { return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, index)); }
        uint8x16x4_t bytes;
    };
    struct Tables {
        explicit Tables(const Encoder& from)
            : threshold(from.threshold),
              slope(from.slope),
              slope_above(from.slope + 16),
              parts(from.parts),
              parts_above(from.parts + 16) {}
        Table threshold, slope, slope_above, parts, parts_above;
    };

    static inline int32x4_t magnitude(F a, const Tables& tables) {
        const F smallest = set1(kSmallestMagnitude), below_two = set1(kBelowTwo);
        const F raised = vbslq_f32(vcgtq_f32(a, smallest), a, smallest);  // a NaN becomes the smallest
        const uint32x4_t exponent =
            vandq_u32(vshrq_n_u32(vreinterpretq_u32_f32(raised), 24), vdupq_n_u32(15));
        const uint8x16_t row = byte_index(vnegq_s32(vreinterpretq_s32_u32(exponent)));
        const uint32x4_t above = vcgtq_f32(raised, tables.threshold(row));
        const F slope = vbslq_f32(above, tables.slope_above(row), tables.slope(row));
        const F part = add(mul(raised, slope), set1(kEightNinths));
        const F parts = vbslq_f32(above, tables.parts_above(row), tables.parts(row));
        return vcvtq_s32_f32(mul(vbslq_f32(vcltq_f32(part, below_two), part, below_two), parts));
    }

    template <bool kSigned>
    static inline int32x4_t code(F scaled, const Tables& tables) {
        const int32x4_t n = magnitude(kSigned ? vabsq_f32(scaled) : scaled, tables);
        if constexpr (kSigned) {
            const uint32x4_t negative = vcltzq_f32(scaled);
            return vaddq_s32(vdupq_n_s32(127), vbslq_s32(negative, vnegq_s32(n), n));
        }
        const int32x4_t above = vreinterpretq_s32_u32(vcgtzq_f32(scaled));
        return vandq_s32(above, vsubq_s32(n, vdupq_n_s32(1)));
    }

    template <bool kSigned>
    static inline void encode(const float* x, float inverse, const Encoder& encoder, uint8_t* codes) {
        const Tables tables(encoder);
        const F factor = set1(inverse);
        for (int i = 0; i < kBlock; i += 8) {
            const int32x4_t a = code<kSigned>(mul(load(x + i), factor), tables),
                            b = code<kSigned>(mul(load(x + i + 4), factor), tables);
            // One that is below zero, of -1, becomes 0.
            vst1_u8(codes + i, vqmovun_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))));
        }
    }

    static inline F widen_half(const uint16_t* x) { return from_half(vld1_u16(x)); }
    static inline F widen_bfloat16(const uint16_t* x) { return from_bfloat16(vld1_u16(x)); }
    static inline void narrow_half(F x, uint16_t* out) {
        vst1_u16(out, rounded(x, static_cast<const Half*>(nullptr)));
    }
    static inline void narrow_bfloat16(F x, uint16_t* out) {
        vst1_u16(out, rounded(x, static_cast<const BFloat16*>(nullptr)));
    }
};

}  // namespace

void fill_neon(Kernels& kernels) { kernels = kernels_of<Neon>(); }

}  // namespace optim
}  // namespace peftcore

// NEON: 16 words a chunk of "rows", in four registers; of "integers" a block of 64 values.
#include "common/neon.h"

#include "quant4/cpu/linear/integers.h"
#include "quant4/cpu/linear/rows.h"
#include "quant4/cpu/linear/zeros.h"

namespace peftcore {
namespace quant4 {
namespace {

struct Neon {
    static constexpr int kLanes = 16, kRows = 1;
    using Vector = FloatTable::Values;
    using Words = uint8x16x4_t;  // the words' first bytes, second, third and fourth

    template <typename Make>
    static inline Vector each(const Make& make) {
        return {{make(0), make(1), make(2), make(3)}};
    }
    static inline Vector zero() {
        return each([](int) { return vdupq_n_f32(0); });
    }
    static inline Vector load(const float* from) {
        return each([&](int i) { return vld1q_f32(from + 4 * i); });
    }
    static inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
        return each([&](int i) { return vfmaq_f32(c.of[i], a.of[i], b.of[i]); });
    }

    static inline Words load_words(const uint8_t* from, int count) {
        if (count == kLanes) return vld4q_u8(from);
        uint8_t whole[4 * kLanes] = {};
        std::memcpy(whole, from, size_t(4 * count));
        return vld4q_u8(whole);
    }

    struct Table : FloatTable {
        using FloatTable::FloatTable;
        inline Vector operator()(const Words& words, int shift) const {
            const uint8x16_t bytes = words.val[shift / 8];
            return FloatTable::operator()(shift % 8 == 0 ? vandq_u8(bytes, vdupq_n_u8(15))
                                                         : vshrq_n_u8(bytes, 4));
        }
    };

    static inline Vector scales(const float* from, int64_t within, int shift) {
        if (within % 32 == 0 && shift >= 5)  // four words, which are all in one block
            return each([&](int i) { return vld1q_dup_f32(from + ((within + 32 * i) >> shift)); });
        float lane[kLanes];
        for (int i = 0; i < kLanes; ++i) lane[i] = from[(within + 8 * i) >> shift];
        return load(lane);
    }

    static inline float sum(const Vector& v) {
        return vaddvq_f32(vaddq_f32(vaddq_f32(v.of[0], v.of[1]), vaddq_f32(v.of[2], v.of[3])));
    }
};

struct NeonIntegers {
    static constexpr int kRows = 2, kTile = 4;  // of 32 registers, 16 hold sums and 8 what was looked up
    struct Words {
        uint8x16_t of[2];
    };
    using Floats = EightFloats;
    struct Values {
        int16x8_t of[8];
    };

    static inline Words load_words(const uint8_t* from) { return {{vld1q_u8(from), vld1q_u8(from + 16)}}; }

    struct Table : ShortTable {
        explicit Table(const int16_t* code)
            : ShortTable(vreinterpretq_u16_s16(vld1q_s16(code)), vreinterpretq_u16_s16(vld1q_s16(code + 8))) {
        }
        inline Values operator()(const Words& words) const {
            Values values;
            for (int i = 0; i < 2; ++i) {
                const uint16x8x2_t low = ShortTable::operator()(vandq_u8(words.of[i], vdupq_n_u8(15)));
                const uint16x8x2_t high = ShortTable::operator()(vshrq_n_u8(words.of[i], 4));
                for (int j = 0; j < 2; ++j) {
                    values.of[2 * j + i] = vreinterpretq_s16_u16(low.val[j]);
                    values.of[4 + 2 * j + i] = vreinterpretq_s16_u16(high.val[j]);
                }
            }
            return values;
        }
    };

    static inline Floats dot(const Values& w, const int16_t* x) {
        int32x4_t halves[2] = {vdupq_n_s32(0),
                               vdupq_n_s32(0)};  // of the block: vectors alternate between them
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const int16x8_t inputs = vld1q_s16(x + 8 * i);
            int32x4_t& sum = halves[i % 2];
            sum = vmlal_s16(sum, vget_low_s16(w.of[i]), vget_low_s16(inputs));
            sum = vmlal_high_s16(sum, w.of[i], inputs);
        }
        return {vcvtq_f32_s32(halves[0]), vcvtq_f32_s32(halves[1])};
    }

    static inline Floats zero() { return all(0); }
    static inline Floats load(const float* from) { return load_eight(from); }
    static inline Floats scales(const float* one) { return all(*one); }
    static inline Floats half_scales(const float* two) { return {vdupq_n_f32(two[0]), vdupq_n_f32(two[1])}; }
    static inline Floats mul(Floats a, Floats b) {
        return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
    }
    static inline Floats fma(Floats a, Floats b, Floats c) {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }
    static inline float sum(Floats v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }
    static inline Floats all(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static inline Floats larger(Floats a, Floats b) {
        return {vmaxq_f32(a.low, vabsq_f32(b.low)), vmaxq_f32(a.high, vabsq_f32(b.high))};
    }
    static inline float largest(Floats v) { return vmaxvq_f32(vmaxq_f32(v.low, v.high)); }
    static inline Floats rounded(Floats v, int16_t* out) {
        const int32x4_t low = vcvtnq_s32_f32(v.low), high = vcvtnq_s32_f32(v.high);
        vst1q_s16(out, vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)));
        return {vcvtq_f32_s32(low), vcvtq_f32_s32(high)};
    }
};

}  // namespace

// Numbers of rows are not measured, as these kernels have never run on hardware: fewer than AVX2's, as the library may
// be faster.
void fill_neon(LinearKernels& kernels) {
    kernels.zeros = kZeroPoints;
    kernels.integers = LinearIntegers<NeonIntegers>::kernel(64);
    kernels.rows = LinearRows<Neon>::kernel({.fp32 = 8, .fp16 = 8, .bf16 = 8});
}

}  // namespace quant4
}  // namespace peftcore

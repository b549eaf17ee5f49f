// Plain C++ for any CPU; it is also the readable version of the SIMD levels.
#include "quant4/cpu/blocks.h"

namespace peftcore {
namespace quant4 {
namespace {

struct Portable {
    struct Encoder {
        explicit Encoder(const Codebook& source) : book(source) {}
        Codebook book;
    };

    struct Decoder {
        explicit Decoder(const float* source) : code(source) {}
        const float* code;
    };

    template <typename T>
    static uint32_t absmax_bits(const T* x, int64_t count) {
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = magnitude_bits(x[i]);
            largest = bits > largest ? bits : largest;
        }
        return largest;
    }

    // Threshold by threshold over 32 values, so that the compiler can vectorize it.
    template <typename T>
    static void encode(const T* x, int64_t count, float inverse, const Encoder& encoder, uint8_t* out) {
        for (int64_t i = 0; i < count; i += 32) {
            float scaled[32];
            int32_t rank[32];
            for (int j = 0; j < 32; ++j) {
                scaled[j] = to_float(x[i + j]) * inverse;
                rank[j] = 0;
            }
            for (int k = 0; k < 15; ++k) {
                const float threshold = encoder.book.threshold[k];
                for (int j = 0; j < 32; ++j) rank[j] += !(scaled[j] <= threshold);
            }
            for (int j = 0; j < 16; ++j)
                out[i / 2 + j] =
                    uint8_t(encoder.book.order[rank[2 * j]] << 4 | encoder.book.order[rank[2 * j + 1]]);
        }
    }

    template <typename T>
    static void decode(const uint8_t* packed, int64_t count, float scale, const Decoder& decoder, T* out,
                       bool) {
        T table[16];
        for (int i = 0; i < 16; ++i) table[i] = from_float<T>(decoder.code[i] * scale);
        for (int64_t i = 0; i < count / 2; ++i) {
            out[2 * i] = table[packed[i] >> 4];
            out[2 * i + 1] = table[packed[i] & 15];
        }
    }

    static void fence() {}
};

}  // namespace

void fill_portable(Kernels& kernels) { kernels = kernels_of<Portable>(); }

}  // namespace quant4
}  // namespace peftcore

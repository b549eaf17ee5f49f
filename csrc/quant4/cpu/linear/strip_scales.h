// Scales of blocks of 16 (NVFP4's) as the "tile" way multiplies by them: a vector with a scale of each row of a strip.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "common/avx512.h"
#include "quant4/cpu/linear/byte_scales.h"

namespace peftcore {
namespace quant4 {
namespace {

constexpr int kStripRows = 16;  // of W

struct HalfScales {
    __m512i of[2];
};

// The four bytes of each word in fp16, as vectors of bytes 0 and 1 and of bytes 2 and 3.
inline HalfScales half_scales(__m512i words) {
    alignas(64) static constexpr auto kEven = [] {
        std::array<uint16_t, 32> places{};
        for (int i = 0; i < 32; ++i) places[size_t(i)] = uint16_t(i % 16 * 2 + i / 16 * 32);
        return places;
    }();
    const __m512i even = _mm512_load_si512(kEven.data()), byte = _mm512_set1_epi16(127);
    const auto halves = [&](__m512i bytes) {
        return _mm512_slli_epi16(_mm512_and_si512(bytes, byte), ByteScales::kPlace);
    };
    const __m512i first = halves(words), second = halves(_mm512_srli_epi16(words, 8));
    return {{_mm512_permutex2var_epi16(first, even, second),
             _mm512_permutex2var_epi16(first, _mm512_add_epi16(even, _mm512_set1_epi16(1)), second)}};
}

// Products of E2M1's entries and E4M3's scales, in bf16, where a scale is 16 bits: as part of an index its three bits
// after the first, and how much smaller its exponent is than the largest one, at the place of bf16's. That is subtracted
// from a product, with saturation: what is multiplied by zero stays zero.
struct ExactCodebook {
    static constexpr int kLargestExponent = 15;
    static constexpr uint16_t kZero = 0xffff;

    explicit ExactCodebook(const float* map) {
        std::memcpy(of, map, sizeof of);
        for (int i = 0; i < 64; ++i) {
            const float size = map[i % 8], product = size * float(8 + i / 8) / 8;
            const uint32_t bits = float_bits(product);
            // No exponent below becomes subnormal.
            exact &= map[8 + i % 8] == -size && bits << 16 == 0 &&
                     (product == 0 || (product >= 0x1p-64f && product <= 0x1p64f));
            entries[i] = product == 0 ? 0 : uint16_t((bits >> 16) + uint32_t(i / 8 << 3));
        }
        for (int byte = 0; byte < 128; ++byte) {
            int exponent = byte < 8 ? 1 : byte / 8, significand = byte < 8 ? byte : 8 + byte % 8;
            for (; byte != 0 && significand < 8; significand *= 2) --exponent;
            scales[byte] =
                byte == 0 ? kZero : uint16_t((kLargestExponent - exponent) << 7 | (significand - 8) << 3);
        }
    }

    alignas(64) uint16_t entries[64], scales[128];
    bool exact = true;
    float of[16];
};

// A function that looks up byte i of each word as two equal halves of a word.
inline auto exact_scales(const ExactCodebook& code) {
    const auto part = [&](int i) { return _mm512_load_si512(code.scales + 32 * i); };
    return [a = part(0), b = part(1), c = part(2), d = part(3)](__m512i words, int i) {
        const __m512i first = _mm512_broadcast_i32x4(
            _mm_setr_epi32(int(0x80008000), int(0x80048004), int(0x80088008), int(0x800c800c)));
        const __m512i index =
            _mm512_shuffle_epi8(words, _mm512_add_epi16(first, _mm512_set1_epi16(short(i))));
        return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                                       _mm512_permutex2var_epi16(a, index, b),
                                       _mm512_permutex2var_epi16(c, index, d));
    };
}

// The scales of some rows of W in blocks of 16, made of their bytes: [step][kStripRows] of fp16, or of ExactCodebook's
// scales, each twice.
class StripBytes {
 public:
    StripBytes(const WeightView& weight, bool exact) : weight_(weight), bytes_(weight) {
        if (!exact) return;
        const ExactCodebook& code = made_of_code<ExactCodebook>(weight.quant_map);
        if (code.exact) code_ = &code;
    }

    // The products with these scales, or nullptr if they are fp16.
    const ExactCodebook* exact() const { return code_; }

    // What products are to be multiplied by; nothing if no scales are written.
    std::optional<float> write(int64_t n, int64_t rows, void* out) {
        const std::optional<float> factor = bytes_.factor(n, rows);
        if (!factor) return {};
        const int64_t row_bytes = bytes_.row_bytes(), count = rows * row_bytes;
        const uint8_t* from = bytes_.of_row(n);
        if ((weight_.rows - n) * row_bytes < count + kRead) {
            copied_.resize(size_t(count + kRead));
            memcpy(copied_.data(), from, size_t(count));
            from = copied_.data();
        }
        if (code_ == nullptr)
            each_four_steps(from, rows, [&](__m512i words, int64_t k) {
                const HalfScales halves = half_scales(words);
                uint16_t* to = static_cast<uint16_t*>(out) + k * kStripRows;
                _mm512_storeu_si512(to, halves.of[0]);
                _mm512_storeu_si512(to + 2 * kStripRows, halves.of[1]);
            });
        else
            each_four_steps(from, rows, [&, scales = exact_scales(*code_)](__m512i words, int64_t k) {
                uint32_t* to = static_cast<uint32_t*>(out) + k * kStripRows;
                for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + i * kStripRows, scales(words, i));
            });
        return factor;
    }

 private:
    static constexpr int64_t kRead = 16;  // bytes of a row

    // body(a word of the bytes of steps k to k + 3 of each row, k), the last of `rows` being repeated.
    template <typename Body>
    void each_four_steps(const uint8_t* from, int64_t rows, const Body& body) const {
        const int64_t row_bytes = bytes_.row_bytes();
        for (int64_t k = 0; k < row_bytes; k += kRead) {
            const FourColumns turned =
                four_columns([&](int row) { return from + least(row, rows - 1) * row_bytes + k; });
            for (int i = 0; i < 4 && k + 4 * i < row_bytes; ++i) body(turned.of[i], k + 4 * i);
        }
    }

    const WeightView& weight_;
    const ByteScales bytes_;
    const ExactCodebook* code_ = nullptr;
    std::vector<uint8_t> copied_;
};

}  // namespace
}  // namespace quant4
}  // namespace peftcore

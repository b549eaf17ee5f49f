// The emulator's side of csrc/common/tensor_core.cuh: fragments as the PTX ISA lays them out (mma.m16n8k16,
// mma.m16n8k8, ldmatrix), and cp.async that does not arrive before it is waited for.
#pragma once

#include <bit>
#include <cmath>

#include "common/half.h"
#include "emulator.h"

namespace peftcore {

// c + a[0] b[0] + a[1] b[1] + ... as a tensor core of sm_80 adds, by published measurements (Fasi et al. 2021,
// "Numerical behavior of NVIDIA tensor cores"; Khattak and Mikaitis 2025, "Accurate models of NVIDIA tensor cores"):
// products are exact; all terms are aligned to the largest exponent, with one bit more than fp32 has, and truncated
// there; their sum is truncated to fp32. Later GPUs add more products at a time, with one more bit.
template <int kCount>
float tensor_core_sum(float c, const float (&a)[kCount], const float (&b)[kCount]) {
    constexpr int kBits = 24 + 1;
    const auto exponent = [](float x) { return int(float_bits(x) >> 23 & 255) - 127; };
    bool finite = std::isfinite(c);
    double plain = c;
    int largest = c != 0 ? exponent(c) : -1000;
    for (int k = 0; k < kCount; ++k) {
        const double product = double(a[k]) * b[k];
        plain += product;
        finite = finite && std::isfinite(product);
        if (product != 0) largest = std::max(largest, exponent(a[k]) + exponent(b[k]));
    }
    if (!finite || largest == -1000) return float(plain);
    const auto power_of_two = [](int e) { return std::bit_cast<double>(uint64_t(1023 + e) << 52); };
    const double scale = power_of_two(kBits - 1 - largest);
    int64_t sum = int64_t(c * scale);  // a conversion truncates
    for (int k = 0; k < kCount; ++k) sum += int64_t(double(a[k]) * b[k] * scale);
    const double value = double(sum) * power_of_two(largest - kBits + 1);
    const float rounded = float(value);
    return std::fabs(double(rounded)) > std::fabs(value) ? std::nextafter(rounded, 0.0f) : rounded;
}

template <typename T>
struct MmaOperand {
    float* d;
    const uint32_t *a, *b;
};

// d[16 x 8] += a[16 x 16] b[16 x 8], eight products at a time.
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MmaOperand<T> mine{d, a, b};
    emulator::meet(0xffffffffu, "mma.m16n8k16", mine, [](MmaOperand<T>** all) {
        auto half_of = [](uint32_t word, int which) { return to_float(T{uint16_t(word >> 16 * which)}); };
        float a_full[16][16], b_full[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int group = lane / 4, pair = lane % 4 * 2;
            for (int i = 0; i < 2; ++i) {
                for (int r = 0; r < 4; ++r)
                    a_full[group + r % 2 * 8][pair + i + r / 2 * 8] = half_of(all[lane]->a[r], i);
                for (int r = 0; r < 2; ++r) b_full[pair + i + r * 8][group] = half_of(all[lane]->b[r], i);
            }
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < 4; ++r) {
                const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
                for (int first = 0; first < 16; first += 8) {
                    float left[8], right[8];
                    for (int k = 0; k < 8; ++k) {
                        left[k] = a_full[row][first + k];
                        right[k] = b_full[first + k][column];
                    }
                    all[lane]->d[r] = tensor_core_sum(all[lane]->d[r], left, right);
                }
            }
    });
}

// d[16 x 8] += a[16 x 8] b[8 x 8] of tf32, four products at a time: the lower 13 bits of a value are not read.
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MmaOperand<float> mine{d, a, b};
    emulator::meet(0xffffffffu, "mma.m16n8k8", mine, [](MmaOperand<float>** all) {
        auto value_of = [](uint32_t word) { return bits_float(word & 0xffffe000u); };
        float a_full[16][8], b_full[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int group = lane / 4, in_group = lane % 4;
            for (int r = 0; r < 4; ++r)
                a_full[group + r % 2 * 8][in_group + r / 2 * 4] = value_of(all[lane]->a[r]);
            for (int r = 0; r < 2; ++r) b_full[in_group + r * 4][group] = value_of(all[lane]->b[r]);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < 4; ++r) {
                const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
                for (int first = 0; first < 8; first += 4) {
                    float left[4], right[4];
                    for (int k = 0; k < 4; ++k) {
                        left[k] = a_full[row][first + k];
                        right[k] = b_full[first + k][column];
                    }
                    all[lane]->d[r] = tensor_core_sum(all[lane]->d[r], left, right);
                }
            }
    });
}

struct LdmatrixOperand {
    uint32_t* r;
    const void* row;
};

template <int kMatrices, bool kTranspose>
void emulated_ldmatrix(uint32_t* r, const void* row) {
    LdmatrixOperand mine{r, row};
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0 && emulator::lane() < 8 * kMatrices)
        emulator::fail("ldmatrix: lane " + std::to_string(emulator::lane()) +
                       " gives a row off a 16-byte boundary");
    emulator::meet(0xffffffffu, kTranspose ? "ldmatrix.trans" : "ldmatrix", mine, [](LdmatrixOperand** all) {
        for (int matrix = 0; matrix < kMatrices; ++matrix)
            for (int lane = 0; lane < 32; ++lane) {
                uint32_t word = 0;
                for (int i = 0; i < 2; ++i) {
                    const int row = kTranspose ? lane % 4 * 2 + i : lane / 4;
                    const int column = kTranspose ? lane / 4 : lane % 4 * 2 + i;
                    const uint16_t* source = static_cast<const uint16_t*>(all[matrix * 8 + row]->row);
                    word |= uint32_t(source[column]) << 16 * i;
                }
                all[lane]->r[matrix] = word;
            }
    });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<4, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<4, true>(r, row); }

// Of the eight bytes of `low` and `high` the four that the nibbles of `selector` name; bit 3 of a nibble, which asks
// for a byte's sign, is not used.
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    if (selector & 0x8888u) emulator::fail("permute_bytes: a nibble of the selector is above 7");
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xffu) << 8 * i;
    return result;
}

inline void prefetch(const void* from) { (void)*static_cast<const volatile uint8_t*>(from); }

// 16 bytes to shared memory, of which the first `bytes` come from `from` and the rest are zero.
inline void cp_async_16(void* to, const void* from, int bytes = 16) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (bytes && reinterpret_cast<uintptr_t>(from) % 16 != 0))
        emulator::fail("cp.async: an address off a 16-byte boundary");
    memset(to, 0xff, 16);  // whoever reads before the wait sees this
    emulator::machine.fibers[emulator::machine.current].copies.push_back({to, from, bytes, 16 - bytes});
}

inline void cp_async_commit() {
    emulator::Fiber& fiber = emulator::machine.fibers[emulator::machine.current];
    fiber.groups.push_back(std::move(fiber.copies));
    fiber.copies.clear();
}

// Until at most kPending of this thread's groups are on their way.
template <int kPending>
void cp_async_wait() {
    emulator::Fiber& fiber = emulator::machine.fibers[emulator::machine.current];
    while (int(fiber.groups.size()) > kPending) {
        for (const emulator::Copy& copy : fiber.groups.front()) {
            if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
            if (copy.zeros) memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
        }
        fiber.groups.erase(fiber.groups.begin());
    }
}

}  // namespace peftcore

// Plain C++, and the reading of what the SIMD levels do.
#include "nf4/cpu/linear/rows.h"

namespace peftcore {
namespace nf4 {
namespace {

struct Portable {
    static constexpr int kLanes = 8, kRows = 1;
    struct Vector {
        float lane[kLanes];
    };
    struct Words {
        uint32_t lane[kLanes];
    };

    static Vector zero() { return {}; }

    static Vector load(const float* from) {
        Vector result;
        memcpy(result.lane, from, sizeof result.lane);
        return result;
    }

    static Vector fma(const Vector& a, const Vector& b, const Vector& c) {
        Vector result;
        for (int i = 0; i < kLanes; ++i) result.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
        return result;
    }

    static Words load_words(const uint8_t* from, int count) {
        Words result;
        for (int i = 0; i < kLanes; ++i)
            result.lane[i] = i >= count
                                 ? 0
                                 : uint32_t(from[4 * i]) | uint32_t(from[4 * i + 1]) << 8 |
                                       uint32_t(from[4 * i + 2]) << 16 | uint32_t(from[4 * i + 3]) << 24;
        return result;
    }

    struct Table {
        explicit Table(const float* source) : code(source) {}
        Vector operator()(const Words& words, int shift) const {
            Vector result;
            for (int i = 0; i < kLanes; ++i) result.lane[i] = code[words.lane[i] >> shift & 15];
            return result;
        }
        const float* code;
    };

    static Vector scales(const float* from, int64_t within, int shift) {
        Vector result;
        for (int i = 0; i < kLanes; ++i) result.lane[i] = from[(within + 8 * i) >> shift];
        return result;
    }

    static float sum(const Vector& v) {
        float total = 0;
        for (float value : v.lane) total += value;
        return total;
    }
};

}  // namespace

LinearKernel portable_linear() { return LinearRows<Portable>::kernel(2); }

}  // namespace nf4
}  // namespace peftcore

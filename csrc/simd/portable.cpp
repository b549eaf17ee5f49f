// Plain C++, with four lanes for the compiler to vectorize.
#include "simd/loops.h"

namespace peftcore {
namespace simd {
namespace {

struct Portable {
    static constexpr int kLanes = 4, kRows = 4;
    struct Vector {
        float lane[kLanes];
    };

    static inline Vector set(float value) { return {{value, value, value, value}}; }
    static inline Vector zero() { return set(0); }
    template <typename T>
    static inline Vector load(const T* from) {
        return {{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
    }
    template <typename T>
    static inline void store(T* to, Vector v) {
        for (int i = 0; i < kLanes; ++i) to[i] = from_float<T>(v.lane[i]);
    }
    static inline Vector add(Vector a, Vector b) {
        for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    static inline Vector mul(Vector a, Vector b) {
        for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
        return a;
    }
    static inline Vector fma(Vector a, Vector b, Vector c) { return add(mul(a, b), c); }
    static inline Vector keep(Vector v, uint32_t bits) {
        for (int i = 0; i < kLanes; ++i)
            if (!(bits >> i & 1)) v.lane[i] = 0;
        return v;
    }

    static inline void keep_bytes(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                                  uint8_t* out) {
        plain_keep_bytes(dropout, row, first, count, out);
    }

    static inline Vector sums(const Vector* v) {
        Vector result;
        for (int i = 0; i < kLanes; ++i)
            result.lane[i] = (v[i].lane[0] + v[i].lane[1]) + (v[i].lane[2] + v[i].lane[3]);
        return result;
    }
};

}  // namespace

void fill_portable(CpuKernels& table) { fill_loops<Portable>(table); }

}  // namespace simd
}  // namespace peftcore

// Shared by the tests of all families: numbers, tolerances, and a digest of all results.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"

namespace peftcore {

inline uint64_t digest;
inline int cases, calls;
inline bool brief = false;
inline std::mt19937 source;

// Whether to leave a case out, as four of five are if `brief`. Five divides no loop of cases, so that each value of each
// loop is tried.
inline bool left_out() { return brief && calls++ % 5 != 0; }

inline void require(bool condition, const char* what, int64_t i) {
    if (condition) return;
    printf("%s: differs at %lld\n", what, (long long)i);
    exit(1);
}

// Memory of its own, which ends before a page that nobody may touch: where it ends, or in every other one a value later,
// so that addresses are multiples of no more than a value.
template <typename T>
class Values {
 public:
    explicit Values(int64_t count, T value = {}) : count_(count) {
        static int64_t made = 0;
        const int64_t page = sysconf(_SC_PAGESIZE), behind = made++ % 2;
        const int64_t inside = filled_up((count + behind) * int64_t(sizeof(T)), page);
        bytes_ = size_t(inside + page);
        memory_ = static_cast<char*>(
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        require(memory_ != MAP_FAILED && mprotect(memory_ + inside, size_t(page), PROT_NONE) == 0, "memory",
                count);
        data_ = reinterpret_cast<T*>(memory_ + inside) - behind - count;
        std::fill(begin(), end(), value);
    }
    Values(const Values& other) : Values(other.count()) { std::copy(other.begin(), other.end(), begin()); }
    Values& operator=(const Values&) = delete;
    ~Values() { munmap(memory_, bytes_); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    T* begin() { return data_; }
    T* end() { return data_ + count_; }
    const T* begin() const { return data_; }
    const T* end() const { return data_ + count_; }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }
    int64_t count() const { return count_; }

 private:
    int64_t count_;
    size_t bytes_;
    char* memory_;
    T* data_;
};

// The sign of a NaN that arithmetic makes is the processor's own.
template <typename T>
T with_one_nan(T value) {
    if constexpr (std::is_integral_v<T>)
        return value;
    else
        return std::isnan(to_float(value)) ? from_float<T>(NAN) : value;
}

template <typename T>
void note(const Values<T>& results) {
    for (const T& result : results) {
        const T value = with_one_nan(result);
        unsigned char bytes[sizeof value];
        std::memcpy(bytes, &value, sizeof value);
        for (unsigned char byte : bytes) digest = (digest ^ byte) * 1099511628211u;  // FNV-1a
    }
}

// In [-2, 2). Not std::normal_distribution, which every library makes otherwise.
inline float number() { return (int64_t(source() >> 8) - (1 << 23)) * 0x1p-22f; }

template <typename T>
Values<T> numbers(int64_t count) {
    Values<T> made(count);
    for (T& value : made) value = from_float<T>(number());
    return made;
}

template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, float>  ? Dtype::kFloat
                           : std::is_same_v<T, Half> ? Dtype::kHalf
                                                     : Dtype::kBFloat16;

template <typename T>
double rounding() {
    return sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
}

// found = sum, of products whose magnitudes are `magnitude` together, rounded to T.
template <typename T>
void close(T found, double sum, double magnitude, const char* what, int64_t i, double lost = 0x1p-20) {
    const double error = std::fabs(double(to_float(found)) - sum);
    require(error <= magnitude * lost + std::fabs(sum) * rounding<T>() + 0x1p-24, what, i);
}

// Of NF4's kind, one for all tests.
constexpr float kCode[16] = {-1.0f, -0.7f, -0.52f, -0.39f, -0.28f, -0.18f, -0.09f, 0.0f,
                             0.08f, 0.16f, 0.25f,  0.34f,  0.44f,  0.56f,  0.72f,  1.0f};

// A weight in 4 bits, with scales of any kind.
struct Packed {
    Packed(int64_t rows, int64_t columns, int64_t blocksize, ScaleKind kind)
        : codes((rows * columns + 1) / 2),
          absmax(ceil_div(rows * columns, blocksize)),
          shorts(absmax.count()),
          bytes(absmax.count()),
          nested_absmax((kFirstBlock + absmax.count() + 31) / 32),
          nested_map(256) {
        for (uint8_t& byte : codes) byte = uint8_t(source() >> 8);
        for (float& scale : absmax) scale = 0.5f + std::fabs(number());
        for (BFloat16& scale : shorts) scale = from_float<BFloat16>(0.5f + std::fabs(number()));
        for (uint8_t& byte : bytes) byte = uint8_t(source() >> 8);
        for (float& scale : nested_absmax) scale = 0.5f + std::fabs(number());
        for (int i = 0; i < 256; ++i) nested_map[i] = float(i) / 512;
        view.rows = rows;
        view.columns = columns;
        view.codes = codes.data();
        view.absmax = absmax.data();
        view.quant_map = kCode;
        view.shift = log2_of(blocksize);
        view.scales = kind;
        if (kind == ScaleKind::kAffine) {
            view.absmax = shorts.data();
            view.scale_dtype = Dtype::kBFloat16;
        }
        if (kind == ScaleKind::kPowerOfTwo) {
            for (uint8_t& byte : bytes) byte = uint8_t(120 + byte % 16);
            if (rows > 8) bytes[0] = 0;
            view.absmax = bytes.data();
        }
        if (kind != ScaleKind::kNested) return;
        view.absmax = bytes.data();
        view.nested_absmax = nested_absmax.data();
        view.nested_quant_map = nested_map.data();
        view.nested_offset = &offset;
        view.nested_shift = 5;
        view.first_block = kFirstBlock;
    }
    Packed(const Packed&) = delete;

    int code(int64_t i) const { return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }
    float scale(int64_t i) const { return block_scale(view, i >> view.shift); }

    static constexpr int64_t kFirstBlock = 3;  // as an expert's, within a block of scales
    Values<uint8_t> codes;
    Values<float> absmax;
    Values<BFloat16> shorts;
    Values<uint8_t> bytes;
    Values<float> nested_absmax, nested_map;
    float offset = 0.25f;
    WeightView view;
};

void try_quant4(const CpuKernels&);
void try_linear(const CpuKernels&);
void try_gemm(const CpuKernels&);
void try_lora(const CpuKernels&);
void try_optim(const CpuKernels&);

}  // namespace peftcore

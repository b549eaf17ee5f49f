// The levels and the entries that each fills. setup.py defines PEFTCORE_HAVE_* for the levels that were compiled; the
// functions `fill_LEVEL` are in files named after the level.
#include "simd/levels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace peftcore {
namespace {

// Whether this CPU has dot products of bf16: those of AVX-512, or ARM's (with its products of 2 x 4 by 4 x 2).
[[maybe_unused]] bool has_bf16_dot() {
#if defined(__x86_64__) && defined(__linux__)
    // CPUID 7.1, EAX. Not __builtin_cpu_supports, as compilers that do not know the level do not know its name.
    constexpr unsigned kBf16 = 1u << 5;
    unsigned a, b, c, d = 0;
    return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 &&
           (a & kBf16) != 0;
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
    return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value == 1;
#else
    return false;
#endif
}

// Whether this process may use tiles of bf16: if so the library's products use them, even if this build has no such
// level.
[[maybe_unused]] bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // CPUID 7, EDX
    // Linux saves the large state of tiles only for processes that have requested it.
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTiles) != 0 &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

bool always() { return true; }

void portable(CpuKernels& table) {
    fill_portable(table.quant4);
    simd::fill_portable(table);
    fill_portable(table.optim);
}

#if defined(PEFTCORE_HAVE_AVX2)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}

void avx2(CpuKernels& table) {
    fill_avx2(table.quant4);
    fill_avx2(table.linear);
    fill_avx2(table.skinny);
    fill_avx2(table.many_rows);
    quant4::fill_avx2(table.many_rows);
    simd::fill_avx2(table);
    fill_avx2(table.optim);
}
#endif

#if defined(PEFTCORE_HAVE_AVX512)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Whether this CPU multiplies fp16.
bool has_fp16() {
    constexpr unsigned kFp16 = 1u << 23;  // CPUID 7, EDX
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kFp16) != 0;
}

void avx512(CpuKernels& table) {
    fill_avx512(table.quant4);
    fill_avx512(table.linear);
    fill_avx512(table.many_rows);
    simd::fill_avx512(table);
    fill_avx512(table.optim);
    // Where the processor multiplies a 16-bit dtype and no level of this build does, the library is faster.
    const auto leave = [&](Dtype dtype) {
        table.skinny[int(dtype)] = {};
        table.many_rows[int(dtype)] = {};
    };
    if (has_fp16()) leave(Dtype::kHalf);
#if !defined(PEFTCORE_HAVE_AVX512BF16)
    if (has_bf16_dot()) leave(Dtype::kBFloat16);
#endif
}
#endif

#if defined(PEFTCORE_HAVE_AVX512BF16)
void avx512bf16(CpuKernels& table) {
    fill_avx512bf16(table.linear);
    fill_avx512bf16(table.attention[int(Dtype::kBFloat16)]);
    fill_avx512bf16(table.lora.thin[int(Dtype::kBFloat16)]);
    fill_avx512bf16(table.skinny[int(Dtype::kBFloat16)]);
    gemm::ManyRows& products = table.many_rows[int(Dtype::kBFloat16)];
    products = {};
#if !defined(PEFTCORE_HAVE_AMX)
    if (has_amx()) return;  // the library's products, which use it, are faster
#endif
    fill_avx512bf16(products.kernel);
    fill_avx512bf16(products.dense);
    quant4::fill_avx512bf16(products.packed);
    products.factor = products.dense;
}
#endif

#if defined(PEFTCORE_HAVE_AMX)
void amx(CpuKernels& table) {
    fill_amx(table.linear);
    fill_amx(table.many_rows[int(Dtype::kBFloat16)].kernel);
    fill_amx(table.lora);
}
#endif

#if defined(PEFTCORE_HAVE_NEON)
void neon(CpuKernels& table) {
    fill_neon(table.quant4);
    fill_neon(table.linear);
    simd::fill_neon(table);
    fill_neon(table.optim);
}
#endif

#if defined(PEFTCORE_HAVE_NEONBF16)
void neonbf16(CpuKernels& table) {
    fill_neonbf16(table.linear);
    gemm::ManyRows& products = table.many_rows[int(Dtype::kBFloat16)];
    fill_neonbf16(products.kernel);
    fill_neonbf16(products.dense);
    quant4::fill_neonbf16(products.packed);
    products.factor = products.dense;
}
#endif

struct Level {
    const char* name;
    bool (*available)();        // whether this CPU and its operating system support what this level adds
    void (*fill)(CpuKernels&);  // overwrites entries of the levels before it in this list
};

const Level kLevels[] = {
    {"portable", always, portable},
#if defined(PEFTCORE_HAVE_AVX2)
    {"avx2", has_avx2, avx2},
#endif
#if defined(PEFTCORE_HAVE_AVX512)
    {"avx512", has_avx512, avx512},
#endif
#if defined(PEFTCORE_HAVE_AVX512BF16)
    {"avx512bf16", has_bf16_dot, avx512bf16},
#endif
#if defined(PEFTCORE_HAVE_AMX)
    {"amx", has_amx, amx},
#endif
#if defined(PEFTCORE_HAVE_NEON)
    {"neon", always, neon},
#endif
#if defined(PEFTCORE_HAVE_NEONBF16)
    {"neonbf16", has_bf16_dot, neonbf16},
#endif
};

// The levels available here: each needs all levels before it.
const std::vector<CpuKernels>& tables() {
    static const std::vector<CpuKernels> tables = [] {
        std::vector<CpuKernels> all;
        CpuKernels table{};
        for (const Level& level : kLevels) {
            if (!level.available()) break;
            table.level = level.name;
            level.fill(table);
            all.push_back(table);
        }
        return all;
    }();
    return tables;
}

const CpuKernels& named(const std::string& name) {
    std::string level_names;
    for (const CpuKernels& table : tables()) {
        if (name == table.level) return table;
        level_names += (level_names.empty() ? "" : ", ") + std::string(table.level);
    }
    throw std::invalid_argument("no CPU level '" + name +
                                "' in this build on this CPU (available: " + level_names + ")");
}

const CpuKernels& initial() {
    const char* requested = std::getenv("PEFTCORE_CPU_LEVEL");
    return requested != nullptr && *requested != '\0' ? named(requested) : tables().back();
}

std::atomic<const CpuKernels*>& in_use() {
    static std::atomic<const CpuKernels*> table{&initial()};
    return table;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *in_use().load(std::memory_order_relaxed); }

std::vector<std::string> cpu_levels() {
    std::vector<std::string> names;
    for (const CpuKernels& table : tables()) names.push_back(table.level);
    return names;
}

void set_cpu_level(const std::string& name) { in_use().store(&named(name), std::memory_order_relaxed); }

}  // namespace peftcore

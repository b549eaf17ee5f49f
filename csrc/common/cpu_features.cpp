#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftcore {
namespace {

bool cpu_has(CpuLevel level) {
    switch (level) {
        case CpuLevel::kPortable:
            return true;
#if defined(PEFTCORE_HAVE_AVX2)
        case CpuLevel::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                   __builtin_cpu_supports("fma");
#endif
#if defined(PEFTCORE_HAVE_AVX512)
        case CpuLevel::kAvx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#if defined(PEFTCORE_HAVE_AMX)
        case CpuLevel::kAmx:
            return cpu_has_bf16_dot() && cpu_has_amx();
#endif
        default:
            return false;
    }
}

CpuLevel parse(const std::string& name) {
    std::string known;
    for (CpuLevel level : available_cpu_levels()) {
        if (name == cpu_level_name(level)) return level;
        known += (known.empty() ? "" : ", ") + std::string(cpu_level_name(level));
    }
    throw std::invalid_argument("no CPU level '" + name + "' in this build on this CPU (available: " + known +
                                ")");
}

CpuLevel initial_level() {
    const char* wanted = std::getenv("PEFTCORE_CPU_LEVEL");
    if (wanted != nullptr && *wanted != '\0') return parse(wanted);
    return available_cpu_levels().back();
}

std::atomic<CpuLevel>& current() {
    static std::atomic<CpuLevel> level{initial_level()};
    return level;
}

}  // namespace

const char* cpu_level_name(CpuLevel level) {
    switch (level) {
        case CpuLevel::kAmx:
            return "amx";
        case CpuLevel::kAvx512:
            return "avx512";
        case CpuLevel::kAvx2:
            return "avx2";
        default:
            return "portable";
    }
}

bool cpu_has_bf16_dot() {
#if defined(PEFTCORE_HAVE_AVX512BF16)
    static const bool has = cpu_has(CpuLevel::kAvx512) && __builtin_cpu_supports("avx512bf16");
    return has;
#else
    return false;
#endif
}

bool cpu_has_amx() {
#if defined(__x86_64__) && defined(__linux__)
    static const bool has = [] {
        constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID 7, EDX
        // Tiles are more than Linux saves of a thread unasked: a process asks for them once.
        constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
        unsigned a, b, c, d = 0;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0 &&
               syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    }();
    return has;
#else
    return false;
#endif
}

std::vector<CpuLevel> available_cpu_levels() {
    std::vector<CpuLevel> levels;
    for (CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kAmx})
        if (cpu_has(level)) levels.push_back(level);
    return levels;
}

CpuLevel cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(const std::string& name) {
    const CpuLevel level = parse(name);
    current().store(level, std::memory_order_relaxed);
}

}  // namespace peftcore

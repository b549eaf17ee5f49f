#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

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

std::vector<CpuLevel> available_cpu_levels() {
    std::vector<CpuLevel> levels;
    for (CpuLevel level : {CpuLevel::kPortable, CpuLevel::kAvx2, CpuLevel::kAvx512})
        if (cpu_has(level)) levels.push_back(level);
    return levels;
}

CpuLevel cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(const std::string& name) {
    const CpuLevel level = parse(name);
    current().store(level, std::memory_order_relaxed);
}

}  // namespace peftcore

// Which SIMD level the CPU kernels run at: the best of what was compiled, what this CPU has, and what
// PEFTCORE_CPU_LEVEL allows.
#pragma once

#include <string>
#include <vector>

namespace peftcore {

// AMX: AVX-512 with dot products of bf16, and tiles of bf16.
enum class CpuLevel { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* cpu_level_name(CpuLevel level);

// Levels that this build contains and this CPU can run, lowest first.
std::vector<CpuLevel> available_cpu_levels();

// The level in use. The first call reads PEFTCORE_CPU_LEVEL and throws std::invalid_argument if it names no
// available level.
CpuLevel cpu_level();

// Whether AVX-512 here includes dot products of bf16.
bool cpu_has_bf16_dot();

// Whether this process may use tiles of bf16 (compiled here or not: the library's products then use them).
bool cpu_has_amx();

// Changes the level in use; throws std::invalid_argument for a name that is not available here.
void set_cpu_level(const std::string& name);

}  // namespace peftcore

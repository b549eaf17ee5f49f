// A family's kernels at each level that this CPU runs, lowest first.
#pragma once

#include <utility>
#include <vector>

template <typename Kernels>
std::vector<std::pair<const char*, Kernels>> kernels_of_levels() {
    std::vector<std::pair<const char*, Kernels>> levels;
    Kernels kernels{};
    fill_portable(kernels);
    levels.emplace_back("portable", kernels);
#if defined(PEFTCORE_HAVE_AVX2)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return levels;
    fill_avx2(kernels);
    levels.emplace_back("avx2", kernels);
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")) return levels;
    fill_avx512(kernels);
    levels.emplace_back("avx512", kernels);
#endif
    return levels;
}

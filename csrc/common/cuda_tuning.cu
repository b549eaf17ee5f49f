#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/cuda_launch.cuh"
#include "common/cuda_tuning.h"

#if !defined(PEFTCORE_EMULATOR)
#include <atomic>
#endif

namespace peftcore {
namespace {

constexpr CudaTuning kTuning[] = {
    // architecture, down, reduce, panel, loop, quantize, step, one_launch_rows, panel_rows, clusters
    {80, 264, 264, 128, 4096, 1056, 1056, 8, 64, 1},
    {90, 264, 264, 128, 4096, 1056, 1056, 8, 64, 1},
};

// A column by its name, and its lowest value: a grid of no blocks cannot be launched.
struct Column {
    const char* name;
    int CudaTuning::* value;
    int lowest;
};
constexpr Column kColumns[] = {
    {"down_blocks", &CudaTuning::down_blocks, 1},
    {"reduce_blocks", &CudaTuning::reduce_blocks, 1},
    {"panel_blocks", &CudaTuning::panel_blocks, 1},
    {"loop_blocks", &CudaTuning::loop_blocks, 1},
    {"quantize_blocks", &CudaTuning::quantize_blocks, 1},
    {"step_blocks", &CudaTuning::step_blocks, 1},
    {"one_launch_rows", &CudaTuning::one_launch_rows, 0},
    {"panel_rows", &CudaTuning::panel_rows, 0},
    {"clusters", &CudaTuning::clusters, 0},
};

constexpr bool sums_agree() {
    for (const CudaTuning& row : kTuning)
        if (row.down_blocks != kTuning[0].down_blocks || row.reduce_blocks != kTuning[0].reduce_blocks ||
            row.panel_blocks != kTuning[0].panel_blocks || row.panel_rows != kTuning[0].panel_rows)
            return false;
    return true;
}
static_assert(sums_agree(), "results would differ between GPUs in their last bits");

using Table = std::array<CudaTuning, std::size(kTuning)>;

// Sets a column in every row from an entry "name=value"; returns whether the entry is valid.
bool set_column(Table& table, const std::string& entry) {
    for (const Column& column : kColumns) {
        const std::string name = std::string(column.name) + "=";
        if (entry.compare(0, name.size(), name) != 0) continue;
        int value = 0;
        const char* end = entry.data() + entry.size();
        const auto parsed = std::from_chars(entry.data() + name.size(), end, value);
        if (parsed.ec != std::errc() || parsed.ptr != end || value < column.lowest) return false;
        for (CudaTuning& row : table) row.*column.value = value;
        return true;
    }
    return false;
}

Table table_with_environment() {
    Table table;
    std::copy(std::begin(kTuning), std::end(kTuning), table.begin());
    const char* setting = std::getenv("PEFTCORE_CUDA_TUNING");
    std::istringstream entries(setting == nullptr ? "" : setting);
    for (std::string entry; std::getline(entries, entry, ',');)
        if (!set_column(table, entry))
            throw std::invalid_argument(
                "PEFTCORE_CUDA_TUNING must list columns of csrc/common/cuda_tuning.h with their values, such "
                "as "
                "clusters=0,panel_blocks=64, found '" +
                entry + "'");
    return table;
}

}  // namespace
}  // namespace peftcore

extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning_of(int architecture) {
    static const peftcore::Table table = peftcore::table_with_environment();
    const peftcore::CudaTuning* best = table.data();
    for (const peftcore::CudaTuning& row : table)
        if (row.architecture <= architecture) best = &row;
    return best;
}

#if defined(PEFTCORE_EMULATOR)

extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning() { return peftcore_cuda_tuning_of(90); }

#else

extern "C" const peftcore::CudaTuning* peftcore_cuda_tuning() {
    static std::array<std::atomic<const peftcore::CudaTuning*>, 64> rows{};  // by device
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) == cudaSuccess && device < int(rows.size())) {
        if (const peftcore::CudaTuning* row = rows[device]) return row;
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
            return rows[device] = peftcore_cuda_tuning_of(10 * major + minor);
    }
    (void)cudaGetLastError();  // else the next launch would report it
    return peftcore_cuda_tuning_of(0);
}

#endif

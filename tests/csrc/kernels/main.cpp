// The CPU kernels without PyTorch, beside sums in double, at each level that this CPU has. Prints, for each level and
// room, how many cases agree, and a digest of all results: where levels have the same arithmetic, the same bits.
#include "checks.h"

int main() {
    using namespace peftcore;
    struct Room {
        const char* name;
        void (*try_all)(const CpuKernels&);
    };
    const Room rooms[] = {{"quant4", try_quant4},
                          {"linear", try_linear},
                          {"gemm", try_gemm},
                          {"lora", try_lora},
                          {"optim", try_optim}};
    for (const std::string& level : cpu_levels()) {
        set_cpu_level(level);
        for (const Room& room : rooms) {
            digest = 1469598103934665603u;
            cases = 0;
            source.seed(1);
            room.try_all(cpu_kernels());
            printf("%s %s %d %016llx\n", level.c_str(), room.name, cases, (unsigned long long)digest);
        }
    }
    return 0;
}

// The CPU kernels without PyTorch, compared with sums in double, at each level that this CPU has. Prints, for each level
// and family, how many cases agree, and a digest of all results, which is the same where levels have the same arithmetic.
// `kernels brief` runs every fifth case.
#include "checks.h"

int main(int count, char** arguments) {
    using namespace peftcore;
    brief = count > 1 && strcmp(arguments[1], "brief") == 0;
    struct Family {
        const char* name;
        void (*try_all)(const CpuKernels&);
    };
    const Family families[] = {{"quant4", try_quant4},
                               {"linear", try_linear},
                               {"gemm", try_gemm},
                               {"lora", try_lora},
                               {"optim", try_optim}};
    for (const std::string& level : cpu_levels()) {
        set_cpu_level(level);
        for (const Family& family : families) {
            digest = 1469598103934665603u;
            cases = 0;
            calls = 0;
            source.seed(1);
            family.try_all(cpu_kernels());
            printf("%s %s %d %016llx\n", level.c_str(), family.name, cases, (unsigned long long)digest);
        }
    }
    return 0;
}

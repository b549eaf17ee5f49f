// What Python asks of the emulated library beside the launchers.
#include "emulator.h"
#include "weight/view.h"

extern "C" void emulator_seed(uint64_t seed) { emulator::machine.seed = seed; }

extern "C" uint64_t emulator_launches() { return emulator::machine.launches; }

// Where kernels were launched from since the last call of this function, one place a line.
extern "C" const char* emulator_launch_sites() {
    static std::string text;
    text.clear();
    for (const std::string& site : emulator::launch_sites()) text += site + "\n";
    emulator::launch_sites().clear();
    return text.c_str();
}

extern "C" void expert_of(const peftcore::WeightView* weight, int64_t index, int64_t experts,
                          peftcore::WeightView* expert) {
    *expert = peftcore::expert_of(*weight, index, experts);
}

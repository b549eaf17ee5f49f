// What Python asks of the emulated library beside the launchers.
#include "emulator.h"
#include "weight/view.h"

extern "C" void emulator_seed(uint64_t seed) { emulator::machine.seed = seed; }

extern "C" uint64_t emulator_launches() { return emulator::machine.launches; }

extern "C" void expert_of(const peftcore::WeightView* weight, int64_t index, int64_t experts,
                          peftcore::WeightView* expert) {
    *expert = peftcore::expert_of(*weight, index, experts);
}

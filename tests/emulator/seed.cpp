// The one thing tests set on the emulator: which order of threads and blocks it draws.
#include "emulator.h"

extern "C" void emulator_seed(uint64_t seed) { emulator::machine.seed = seed; }

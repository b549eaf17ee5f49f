#include "lora/cpu/avx512bf16.h"

namespace peftcore {
namespace lora {

Kernels avx512bf16_kernels() { return Blocks<Pairs>::kernels(); }

}  // namespace lora
}  // namespace peftcore

// AVX-512 with products of fp32.
#include "lora/cpu/avx512.h"

#include "lora/cpu/level.h"

namespace peftcore {
namespace lora {

void fill_avx512(Kernels& kernels) { kernels = kernels_of<Avx512>(); }

}  // namespace lora
}  // namespace peftcore

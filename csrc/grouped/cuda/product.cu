// Choice of the kernel of a product. The kernels of each dtype are in separate files, compiled in parallel.
#include "grouped/cuda/grouped_cuda.h"
#include "quant4/cuda/linear.cuh"

extern "C" bool peftcore_grouped_is_skinny(const peftcore::grouped::Product* p) {
    return p->dtype != peftcore::Dtype::kFloat && p->weight.quant_map != nullptr && !p->across &&
           p->groups.rows <= 16 * p->groups.experts && peftcore::quant4::in_pieces(p->wide, p->weight) &&
           (p->rank == 0 || !p->factor_across) && p->dropout.threshold == 0;
}

extern "C" const char* peftcore_grouped_product(const peftcore::grouped::Product* product, void* stream) {
    using peftcore::Dtype;
    if (product->groups.rows == 0 || product->columns == 0) return nullptr;
    if (peftcore_grouped_is_skinny(product)) return peftcore_grouped_skinny(product, stream);
    switch (product->dtype) {
        case Dtype::kFloat:
            return peftcore_grouped_product_float(product, stream);
        case Dtype::kHalf:
            return peftcore_grouped_product_half(product, stream);
        case Dtype::kBFloat16:
            return peftcore_grouped_product_bfloat16(product, stream);
    }
    return "unknown dtype";
}

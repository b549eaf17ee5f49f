#include "grouped/cuda/product.cuh"

extern "C" const char* peftcore_grouped_product_half(const peftcore::grouped::Product* product,
                                                     void* stream) {
    return peftcore::grouped::launch_product<peftcore::Half>(*product, stream);
}

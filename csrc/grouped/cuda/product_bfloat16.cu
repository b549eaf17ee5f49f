#include "grouped/cuda/product.cuh"

extern "C" const char* peftcore_grouped_product_bfloat16(const peftcore::grouped::Product* product,
                                                         void* stream) {
    return peftcore::grouped::launch_product<peftcore::BFloat16>(*product, stream);
}

// Launchers of the 4-bit CUDA kernels. Pointers are device memory, except for pointers to views; `stream` is a
// cudaStream_t, dtypes are peftcore::Dtype. They return nullptr, or why the launch failed. The caller checks arguments
// (weight/weight.h).
#pragma once

#include <cstdint>

#include "weight/view.h"

extern "C" {

const char* peftcore_quant4_quantize(const void* x, int dtype, const float* quant_map, int64_t count,
                                     int blocksize, uint8_t* codes, float* absmax, void* stream);

// Scales to 8 bits around *offset, the nearest of 256 sorted entries.
const char* peftcore_quant4_quantize_absmax(const float* absmax, const float* quant_map, const float* offset,
                                            int64_t count, int blocksize, uint8_t* codes,
                                            float* nested_absmax, void* stream);

const char* peftcore_quant4_dequantize(const peftcore::WeightView* weight, void* out, int dtype,
                                       void* stream);

// y [batch, rows] = x [batch, columns] Wᵀ + bias + thin factorᵀ, x, bias (or nullptr) and y of `dtype`, thin
// [batch, rank] and factor [rows, rank] fp32. Rank 0: neither of the last two. Only where
// peftcore_quant4_linear_takes them. `partial`: peftcore_quant4_linear_workspace floats.
const char* peftcore_quant4_linear(const void* x, int dtype, int batch, const peftcore::WeightView* weight,
                                   const void* bias, const float* thin, const float* factor, int rank,
                                   float* partial, void* y, void* stream);
int64_t peftcore_quant4_linear_workspace(int batch, const peftcore::WeightView* weight);

// Whether the kernels take x and the weight: up to 64 rows of 16 bits, and rows of W that are whole blocks of 64
// columns on 16 bytes.
bool peftcore_quant4_linear_takes(const void* x, int dtype, int64_t batch,
                                  const peftcore::WeightView* weight);
}

// The calls of CUDA's runtime that launches make on the host, without a GPU: tests/csrc/cuda_launch.cpp counts them.
#pragma once

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct dim3 {
    dim3(unsigned, unsigned) {}
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

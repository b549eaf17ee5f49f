// allow_shared asks CUDA once for each device, kernel and size, whatever the number of threads; a refusal is repeated.
#include "common/cuda_launch.cuh"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

namespace {

thread_local int current = 0;
std::atomic<int> asked{0};

void one(int) {}
void other(int) {}

bool all_allowed(void (*kernel)(int), int bytes) {
    std::atomic<int> refused{0};
    std::vector<std::thread> threads;
    for (int device : {0, 1, 0, 1, 0, 1})
        threads.emplace_back([&, device] {
            current = device;
            for (int i = 0; i < 100; ++i) refused += peftcore::allow_shared(kernel, bytes) != nullptr;
        });
    for (std::thread& thread : threads) thread.join();
    return refused == 0;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    ++asked;
    return bytes > 100000 ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

int main() {
    const bool first = all_allowed(one, 60000);
    const int once = asked;  // on two devices
    const bool second = all_allowed(other, 60000) && all_allowed(one, 50000) && all_allowed(one, 70000);
    const int larger = asked;
    const char* error = peftcore::allow_shared(one, 200000);
    const bool refused = error && !strcmp(error, "invalid value") && peftcore::allow_shared(one, 200000);
    printf("%d %d %d %d %d %d\n", first, once, second, larger, refused, int(asked));
}

// Small kernels that show what the emulator finds, each with the fault and without it.
#include "common/cuda_clusters.cuh"
#include "common/cuda_launch.cuh"
#include "common/tensor_core.cuh"

namespace {

using peftcore::BFloat16;
using peftcore::Half;

// Reverses each block's values through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const int* in, int* out) {
    PEFTCORE_SHARED(int, values, [256]);
    const int last = blockDim.x - 1, base = blockIdx.x * blockDim.x;
    values[threadIdx.x] = in[base + threadIdx.x];
    if constexpr (kBarrier) __syncthreads();
    out[base + threadIdx.x] = values[last - threadIdx.x];
}

// Sums neighbours: the last thread's neighbour is beyond the end unless it is guarded.
__global__ void neighbour_kernel(const int* in, int* out, int count, int limit) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = in[i] + (i + 1 < limit ? in[i + 1] : 0);
}

// Writes one element beyond a shared array if told to.
__global__ void shared_kernel(int* out, int index) {
    PEFTCORE_SHARED(int, values, [32]);
    values[threadIdx.x] = threadIdx.x;
    if (threadIdx.x == 0) values[index] = 7;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}

// A barrier that half the block does not reach, because it waits at another.
__global__ void divergent_kernel(int* out, int at) {
    if (int(threadIdx.x) < at)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}

// Sums a warp by shuffles under a mask; `lanes` lanes call.
__global__ void warp_sum_kernel(const float* in, float* out, uint32_t mask, int lanes) {
    float sum = in[threadIdx.x];
    if (int(threadIdx.x) >= lanes) return;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(mask, sum, offset);
    const uint32_t positive = __ballot_sync(mask, in[threadIdx.x] > 0);
    if (threadIdx.x == 0) {
        out[0] = sum;
        out[1] = float(positive);
    }
}

// c[16 x 8] = a[16 x 16] b[16 x 8] (b given as 8 columns of 16), by cp.async, ldmatrix and mma.
template <typename T, bool kWait>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
    PEFTCORE_SHARED(T, a_tile, [16][16]);
    PEFTCORE_SHARED(T, b_tile, [8][16]);
    const int lane = threadIdx.x;
    peftcore::cp_async_16(&a_tile[lane / 2][lane % 2 * 8], a + lane * 8);
    if (lane < 16) peftcore::cp_async_16(&b_tile[lane / 2][lane % 2 * 8], b + lane * 8);
    peftcore::cp_async_commit();
    if constexpr (kWait) peftcore::cp_async_wait<0>();
    __syncthreads();
    uint32_t a_fragment[4], b_fragment[4];  // of b twice
    peftcore::ldmatrix_x4(a_fragment, &a_tile[lane % 16][lane / 16 * 8]);
    peftcore::ldmatrix_x4(b_fragment, &b_tile[lane % 8][lane / 8 % 2 * 8]);
    float sums[4] = {};
    peftcore::mma_m16n8k16<T>(sums, a_fragment, {b_fragment[0], b_fragment[1]});
    for (int r = 0; r < 4; ++r) c[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sums[r];
}

// Two 8 x 8 matrices transposed on the way from shared memory, the second behind a half-filled copy.
__global__ void transpose_kernel(const uint16_t* in, uint16_t* out) {
    PEFTCORE_SHARED(uint16_t, tile, [16][8]);
    const int lane = threadIdx.x;
    if (lane < 16) peftcore::cp_async_16(tile[lane], in + lane * 8, lane < 8 ? 16 : 6);
    peftcore::cp_async_commit();
    peftcore::cp_async_wait<0>();
    __syncthreads();
    uint32_t r[4];  // both twice
    peftcore::ldmatrix_x4_trans(r, tile[lane % 16]);
    for (int matrix = 0; matrix < 2; ++matrix)
        for (int i = 0; i < 2; ++i)
            out[matrix * 64 + lane / 4 * 8 + lane % 4 * 2 + i] = uint16_t(r[matrix] >> 16 * i);
}

// Each block reads what the next of its cluster wrote, with both barriers or without one of them.
__global__ void cluster_kernel(float* out, unsigned blocks, bool before, bool behind) {
    PEFTCORE_DYNAMIC_SHARED(memory);
    PEFTCORE_SHARED(unsigned, own_block, [1]);
    float* values = reinterpret_cast<float*>(memory);
    if (threadIdx.x == 0) own_block[0] = blockIdx.x;
    values[threadIdx.x] = float(blockIdx.x * blockDim.x + threadIdx.x);
    __syncthreads();
    if (before) peftcore::cluster_sync();
    const float value = peftcore::shared_of_block((own_block[0] + 1) % blocks, &values[threadIdx.x]);
    if (behind) peftcore::cluster_sync();
    out[own_block[0] * blockDim.x + threadIdx.x] = value;
}

}  // namespace

extern "C" {

const char* toy_reverse(const int* in, int* out, int blocks, int threads, int barrier, void* stream) {
    if (barrier) return PEFTCORE_LAUNCH(reverse_kernel<true>, blocks, threads, 0, stream, in, out);
    return PEFTCORE_LAUNCH(reverse_kernel<false>, blocks, threads, 0, stream, in, out);
}

const char* toy_neighbour(const int* in, int* out, int count, int limit, void* stream) {
    return PEFTCORE_LAUNCH(neighbour_kernel, (count + 63) / 64, 64, 0, stream, in, out, count, limit);
}

const char* toy_shared(int* out, int index, void* stream) {
    return PEFTCORE_LAUNCH(shared_kernel, 1, 32, 0, stream, out, index);
}

const char* toy_divergent(int* out, int at, void* stream) {
    return PEFTCORE_LAUNCH(divergent_kernel, 1, 64, 0, stream, out, at);
}

const char* toy_warp_sum(const float* in, float* out, uint32_t mask, int lanes, void* stream) {
    return PEFTCORE_LAUNCH(warp_sum_kernel, 1, 32, 0, stream, in, out, mask, lanes);
}

const char* toy_mma(const void* a, const void* b, float* c, int bfloat16, int wait, void* stream) {
    if (!wait)
        return PEFTCORE_LAUNCH((mma_kernel<Half, false>), 1, 32, 0, stream, static_cast<const Half*>(a),
                               static_cast<const Half*>(b), c);
    if (bfloat16)
        return PEFTCORE_LAUNCH((mma_kernel<BFloat16, true>), 1, 32, 0, stream,
                               static_cast<const BFloat16*>(a), static_cast<const BFloat16*>(b), c);
    return PEFTCORE_LAUNCH((mma_kernel<Half, true>), 1, 32, 0, stream, static_cast<const Half*>(a),
                           static_cast<const Half*>(b), c);
}

const char* toy_cluster(float* out, int blocks, int grid, int before, int behind, void* stream) {
    return PEFTCORE_LAUNCH_CLUSTERS(cluster_kernel, unsigned(blocks), unsigned(grid), 64u, 64 * 4, stream,
                                    out, unsigned(blocks), before != 0, behind != 0);
}

const char* toy_transpose(const uint16_t* in, uint16_t* out, void* stream) {
    return PEFTCORE_LAUNCH(transpose_kernel, 1, 32, 0, stream, in, out);
}
}

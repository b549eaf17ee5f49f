#include "common/cuda_launch.cuh"
#include "common/cuda_tickets.h"

#if defined(PEFTCORE_EMULATOR)

// Only the null stream has counters, so that tests cover both ways.
extern "C" unsigned* peftcore_tickets(int count, void* stream) {
    static unsigned tickets[peftcore::kMostTickets];
    return stream == nullptr && count <= peftcore::kMostTickets ? tickets : nullptr;
}

#else

#include <map>
#include <mutex>
#include <utility>

namespace peftcore {
namespace {

constexpr int kStreams = 128, kOfStreams = kStreams * kMostTickets;
constexpr int kOfGraphs = 1 << 20;  // a thousand graphs of 224 layers, 4 counters a layer

__device__ unsigned tickets[kOfStreams + kOfGraphs];  // on each device; zero when its code is loaded

struct Device {
    unsigned* tickets = nullptr;
    int of_graphs = 0;                        // taken
    std::map<unsigned long long, int> place;  // by stream id, which is never reused
};

unsigned* in_graph(Device& device, int count) {
    // The address is looked up before a capture begins: CUDA does not document whether that is allowed during one.
    if (device.tickets == nullptr || count > kOfGraphs - device.of_graphs) return nullptr;
    unsigned* counters = device.tickets + kOfStreams + device.of_graphs;
    device.of_graphs += count;
    return counters;
}

unsigned* on_stream(Device& device, cudaStream_t stream) {
    void* address = device.tickets;
    if (address == nullptr && cudaGetSymbolAddress(&address, tickets) != cudaSuccess) return nullptr;
    device.tickets = static_cast<unsigned*>(address);
    unsigned long long id = 0;
    if (cudaStreamGetId(stream, &id) != cudaSuccess) return nullptr;
    const auto entry = device.place.find(id);
    if (entry != device.place.end()) return device.tickets + entry->second;
    if (device.place.size() == kStreams) return nullptr;
    const int place = int(device.place.size()) * kMostTickets;
    device.place.emplace(id, place);
    return device.tickets + place;
}

}  // namespace
}  // namespace peftcore

extern "C" unsigned* peftcore_tickets(int count, void* stream) {
    using namespace peftcore;
    static std::mutex mutex;
    static std::map<int, Device> devices;
    if (count > kMostTickets) return nullptr;
    const auto on = static_cast<cudaStream_t>(stream);
    int number = 0;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const std::lock_guard<std::mutex> lock(mutex);
    unsigned* counters = nullptr;
    if (cudaGetDevice(&number) == cudaSuccess && cudaStreamIsCapturing(on, &status) == cudaSuccess) {
        Device& device = devices[number];
        counters = status == cudaStreamCaptureStatusNone ? on_stream(device, on) : in_graph(device, count);
    }
    if (counters == nullptr) (void)cudaGetLastError();  // else the next launch would report it
    return counters;
}

#endif

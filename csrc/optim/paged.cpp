#include "optim/paged.h"

#include <map>

namespace peftcore {
namespace optim {
namespace {

std::mutex registry_mutex;
std::map<int64_t, std::weak_ptr<Pool>> registry;
int64_t next_number = 0;

}  // namespace

int64_t register_pool(const std::shared_ptr<Pool>& pool) {
    const std::lock_guard locked(registry_mutex);
    std::erase_if(registry, [](const auto& entry) { return entry.second.expired(); });
    registry[next_number] = pool;
    return next_number++;
}

std::shared_ptr<Pool> pool_of(int64_t number, const char* op) {
    const std::lock_guard locked(registry_mutex);
    const auto found = registry.find(number);
    std::shared_ptr<Pool> pool = found == registry.end() ? nullptr : found->second.lock();
    TORCH_CHECK_VALUE(pool != nullptr, op, ": no pool has the number ", number);
    return pool;
}

}  // namespace optim
}  // namespace peftcore

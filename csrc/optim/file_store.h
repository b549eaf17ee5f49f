// Pages in memory of the host, and in an unnamed file, which disappears with the process, however that ends.
#pragma once

#include "optim/store.h"

namespace peftcore {
namespace optim {

// Throws std::runtime_error if no file can be created in `directory`.
std::unique_ptr<Store> make_file_store(const std::string& directory, int64_t page_bytes);

}  // namespace optim
}  // namespace peftcore

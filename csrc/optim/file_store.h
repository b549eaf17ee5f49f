// Pages in memory of the host, and in a file without a name: it is gone when the process is, however that
// ends.
#pragma once

#include "optim/store.h"

namespace peftcore {
namespace optim {

// Throws std::runtime_error if no file can be made in `directory`.
std::unique_ptr<Store> make_file_store(const std::string& directory, int64_t page_bytes);

}  // namespace optim
}  // namespace peftcore

// The table of rules, which peftcore/ops/optim_rules.py passes when it is imported.
#pragma once

#include <c10/core/ScalarType.h>

#include <string>
#include <string_view>
#include <vector>

#include "common/integers.h"
#include "optim/segment.h"

namespace peftcore {
namespace optim {

inline int64_t blocks_of(int64_t count) { return ceil_div(count, kBlock); }

// One plane of state: a value for each element, or one for each block of 256.
struct Plane {
    c10::ScalarType dtype;
    int64_t elements;  // that share a value: 1 or kBlock
    int64_t block_bytes = kBlock / elements * int64_t(c10::elementSize(dtype));

    int64_t numel(int64_t count) const { return elements == 1 ? count : blocks_of(count); }
};

struct RuleEntry {
    int number;  // its index in `Rules` of rules.h
    std::vector<Plane> planes;
    int scalars;  // how many

    int64_t block_bytes() const;  // of all planes
};

// Throws std::invalid_argument if the rule's kernel would read other planes or scalars.
void define_rule(const std::string& name, const std::vector<Plane>& planes, const std::string& scalars);

// Throws a ValueError that names the operator and all rules.
const RuleEntry& rule_named(std::string_view name, const char* op);

}  // namespace optim
}  // namespace peftcore

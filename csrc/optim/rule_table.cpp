#include "optim/rule_table.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <stdexcept>

#include "optim/rules.h"

namespace peftcore {
namespace optim {
namespace {

std::map<std::string, RuleEntry, std::less<>> table;

// Planes and scalars that a rule's kernels read.
struct Kernel {
    std::string name, scalars;
    int moments;
    bool in_8_bits;

    bool reads(const std::vector<Plane>& planes) const {
        if (planes.size() != size_t(in_8_bits ? 2 * moments : moments)) return false;
        for (int i = 0; i < int(planes.size()); ++i) {
            const bool codes = in_8_bits && i < moments, scales = in_8_bits && !codes;
            if (planes[i].dtype != (codes ? c10::kByte : c10::kFloat)) return false;
            if (planes[i].elements != (scales ? kBlock : 1)) return false;
        }
        return true;
    }
};

template <typename... Rule>
std::vector<Kernel> kernels_of(RuleList<Rule...>) {
    return {{Rule::kName, Rule::kScalars, Rule::kMoments, Rule::kIn8Bits}...};
}

}  // namespace

int64_t RuleEntry::block_bytes() const {
    int64_t bytes = 0;
    for (const Plane& plane : planes) bytes += plane.block_bytes;
    return bytes;
}

void define_rule(const std::string& name, const std::vector<Plane>& planes, const std::string& scalars) {
    const std::vector<Kernel> kernels = kernels_of(Rules());
    const auto kernel =
        std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& k) { return k.name == name; });
    if (kernel == kernels.end()) throw std::invalid_argument("no kernel has the rule '" + name + "'");
    if (kernel->scalars != scalars)
        throw std::invalid_argument("the kernel of '" + name + "' reads the scalars " + kernel->scalars +
                                    ", the table has " + scalars);
    if (!kernel->reads(planes))
        throw std::invalid_argument("the kernel of '" + name + "' reads other planes than the table has");
    const int count = 1 + int(std::count(scalars.begin(), scalars.end(), ','));
    table[name] = {int(kernel - kernels.begin()), planes, count};
}

const RuleEntry& rule_named(std::string_view name, const char* op) {
    const auto match = table.find(name);
    if (match != table.end()) return match->second;
    std::string names;
    for (const auto& entry : table) names += (names.empty() ? "" : ", ") + entry.first;
    TORCH_CHECK_VALUE(false, op, ": no rule '", name, "' (there are: ", names, ")");
}

}  // namespace optim
}  // namespace peftcore

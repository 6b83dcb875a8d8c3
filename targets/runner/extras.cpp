#include "extras.h"

#include <cstring>

namespace calora {

bool Extra::is_none(const char* data) const { return std::memcmp(data, none.data(), none.size() * sizeof(float)) == 0; }

Extras Extras::of(const Package& package) {
  const Fields slots = package.manifest.object("slots");
  Extras made;
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape, float none) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    made.fixed.push_back({name, shape, std::vector<float>(size_t(count), none)});
  };
  const std::vector<std::string> scaled = slots.texts("scaled");
  for (const std::string& site : scaled) add(site + ".before", {package.slot("package.json", site).inputs}, 1);
  for (const std::string& site : scaled) add(site + ".after", {package.slot("package.json", site).outputs}, 1);
  if (const auto routed = slots.maybe("routed")) {
    made.experts = routed->integer("experts");
    const std::vector<std::string> scopes = routed->texts("scopes");
    for (const std::string& scope : scopes) add(scope + ".router", {made.experts, routed->integer("features")}, 0);
    for (const std::string& scope : scopes) add(scope + ".router_bias", {2, made.experts}, 0);
  }
  return made;
}

Extra Extras::flat() const {
  Extra made{"extras", {0}, {}};
  for (const Extra& extra : fixed) made.none.insert(made.none.end(), extra.none.begin(), extra.none.end());
  made.shape[0] = int64_t(made.none.size());
  return made;
}

} // namespace calora

#include "package.h"

#include "error.h"

#include <sstream>

namespace calora {
namespace {

constexpr const char* file_name = "package.json";

void require_files(const std::filesystem::path& path, const Fields& files) {
  for (const std::string& name : files.keys()) {
    const int64_t expected = files.object(name).integer("size");
    std::error_code error;
    const auto size = std::filesystem::file_size(path / name, error);
    if (error || int64_t(size) != expected)
      throw refusal(name, "size", std::to_string(expected), error ? "nothing" : std::to_string(size),
                     "the package is incomplete or was changed");
  }
}

std::vector<SlotTensor> slots_of(const Fields& slots) {
  std::vector<SlotTensor> found;
  for (const Fields& tensor : slots.objects("tensors"))
    found.push_back({tensor.text("site"), tensor.text("down"), tensor.text("up"), tensor.integer("part"),
                     tensor.integer("parts"), tensor.integer("inputs"), tensor.integer("outputs")});
  return found;
}

std::string shown(const std::map<std::string, double>& mix) {
  std::ostringstream text;
  for (const auto& [id, gate] : mix) text << (text.tellp() ? ", " : "") << id << "=" << gate;
  return text.str();
}

} // namespace

void require_value(const std::string& key, const std::string& expected, const std::string& found) {
  if (expected != found) throw refusal(file_name, key, expected, found);
}

Package Package::load(const std::filesystem::path& path, const std::string& target) {
  if (!std::filesystem::is_regular_file(path / file_name))
    throw refusal(path.string(), "package", std::string("a directory with ") + file_name, "none");
  const Fields json = Fields::read(path / file_name);
  require_value("schema_version", "1", std::to_string(json.integer("schema_version")));
  require_value("target", target, json.text("target"));
  require_files(path, json.object("files"));
  const Fields model = json.object("model");
  const auto router = json.maybe("router");
  Package package{json,
                  path,
                  path / model.text("file"),
                  router ? path / router->text("file") : std::filesystem::path(),
                  json.text("base_fingerprint"),
                  slots_of(json.object("slots")),
                  {},
                  model.integer("vocab"),
                  model.integer("context"),
                  model.integers("eos")};
  for (const Fields& adapter : json.objects("adapters"))
    package.adapters[adapter.text("id")] = {path / adapter.text("file"),
                                            adapter.has("kind") ? adapter.text("kind") : "rows"};
  return package;
}

const Package::Entry& Package::adapter(const std::string& id) const {
  if (const auto found = adapters.find(id); found != adapters.end()) return found->second;
  std::string known;
  for (const auto& [name, _] : adapters) known += (known.empty() ? "" : ", ") + name;
  throw refusal(file_name, "adapters", "one of " + (known.empty() ? "none" : known), id);
}

const SlotTensor& Package::slot(const std::string& file, const std::string& site) const {
  for (const SlotTensor& slot : slots)
    if (slot.site == site) return slot;
  throw refusal(file, site, "a site with a slot", "another one");
}

void Package::require_mixable(const std::map<std::string, double>& mix) const {
  std::string routed;
  for (const auto& [id, gate] : mix) {
    const std::string& kind = adapter(id).kind;
    if (kind == "scales" && (mix.size() > 1 || gate != 1.0))
      throw refusal("mix", id, "it alone at weight 1, since it multiplies layers", shown(mix));
    if (kind != "routed") continue;
    if (!routed.empty())
      throw refusal("mix", id, "one adapter that weighs its experts by token", routed + " and " + id);
    routed = id;
  }
}

void Package::require_fingerprint(const std::string& file, const std::string& found) const {
  if (found != fingerprint) throw refusal(file, "base_fingerprint", fingerprint, found, "another base");
}

} // namespace calora

#include "package.h"

#include "error.h"
#include "fields.h"

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

/// The tensors of one group follow each other, from part 0 on.
std::vector<Group> groups_of(const Fields& slots, int64_t& elements) {
  std::vector<Group> groups;
  for (const Fields& tensor : slots.objects("tensors")) {
    if (groups.empty() || tensor.integer("part") == 0) groups.push_back({tensor.integer("inputs"), elements, {}});
    groups.back().outs.push_back(tensor.integer("outputs"));
    elements += tensor.integer("inputs") + tensor.integer("outputs");
  }
  return groups;
}

} // namespace

Package Package::load(const std::filesystem::path& path) {
  if (!std::filesystem::is_regular_file(path / file_name))
    throw refusal(path.string(), "package", std::string("a directory with ") + file_name, "none");
  const Fields json = Fields::read(path / file_name);
  const auto require = [](const std::string& key, const std::string& expected, const std::string& found) {
    if (expected != found) throw refusal(file_name, key, expected, found);
  };
  require("schema_version", "1", std::to_string(json.integer("schema_version")));
  require("target", "executorch", json.text("target"));
  require_files(path, json.object("files"));

  Package package;
  package.path = path;
  package.fingerprint = json.text("base_fingerprint");
  const Fields model = json.object("model");
  package.model = path / model.text("file");
  package.vocab = model.integer("vocab");
  package.context = model.integer("context");
  package.ends = model.integers("eos");
  require("model.logits", "last", model.text("logits"));
  const Fields settings = json.object("settings");
  package.rank_budget = settings.integer("rank_budget");
  package.portable = settings.text("kernels") == "portable";
  if (!package.portable) require("settings.kernels", "llm", settings.text("kernels"));
  const Fields slots = json.object("slots");
  package.half = slots.text("dtype") == "fp16";
  if (!package.half) require("slots.dtype", "fp32", slots.text("dtype"));
  package.groups = groups_of(slots, package.elements);
  for (const Fields& adapter : json.objects("adapters"))
    package.adapters[adapter.text("id")] = path / adapter.text("file");
  if (const auto router = json.maybe("router")) package.router = path / router->text("file");
  return package;
}

const std::filesystem::path& Package::adapter(const std::string& id) const {
  if (const auto found = adapters.find(id); found != adapters.end()) return found->second;
  std::string known;
  for (const auto& [name, _] : adapters) known += (known.empty() ? "" : ", ") + name;
  throw refusal(file_name, "adapters", "one of " + (known.empty() ? "none" : known), id);
}

} // namespace calora

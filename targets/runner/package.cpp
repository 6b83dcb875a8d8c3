#include "package.h"

#include "error.h"

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

} // namespace

void require_value(const std::string& key, const std::string& expected, const std::string& found) {
  if (expected != found) throw refusal(file_name, key, expected, found);
}

void require_rows_alone(const Fields& slots) {
  for (const char* const key : {"scaled", "routed"})
    if (slots.has(key))
      throw refusal(file_name, std::string("slots.") + key, "adapters of rows alone", key, "--device host runs it");
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
                  {},
                  model.integer("vocab"),
                  model.integer("context"),
                  model.integers("eos")};
  for (const Fields& adapter : json.objects("adapters"))
    package.adapters[adapter.text("id")] = path / adapter.text("file");
  return package;
}

const std::filesystem::path& Package::adapter(const std::string& id) const {
  if (const auto found = adapters.find(id); found != adapters.end()) {
    if (found->second.extension() == ".factors") // cores, which calora_export/factors.py multiplies with what is shared
      throw refusal(found->second.filename().string(), "kind", "rows", "factors of rows", "--device host multiplies them");
    return found->second;
  }
  std::string known;
  for (const auto& [name, _] : adapters) known += (known.empty() ? "" : ", ") + name;
  throw refusal(file_name, "adapters", "one of " + (known.empty() ? "none" : known), id);
}

void Package::require_fingerprint(const std::string& file, const std::string& found) const {
  if (found != fingerprint) throw refusal(file, "base_fingerprint", fingerprint, found, "another base");
}

} // namespace calora

#include "ort.h"

#include "error.h"

#include <dlfcn.h>

namespace calora::ort {
namespace {

constexpr const char* library = "libonnxruntime.so.1";

const ApiBase& open() {
  void* const opened = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) throw refusal(library, "library", "beside this program", ::dlerror());
  const auto base = reinterpret_cast<const ApiBase* (*)()>(::dlsym(opened, "OrtGetApiBase"));
  if (!base) throw refusal(library, "version", "1.20 or newer", "no such library");
  return *base();
}

const Api& table() {
  const void* const found = base().GetApi(api_version);
  if (!found) throw refusal(library, "version", "1.20 or newer", base().GetVersionString());
  return *static_cast<const Api*>(found);
}

} // namespace

const ApiBase& base() {
  static const ApiBase& opened = open();
  return opened;
}

const Api& api() {
  static const Api& found = table();
  return found;
}

void require(Status* status, const std::string& file) {
  if (!status) return;
  std::string said = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  said = said.substr(0, said.find('\n'));
  throw Error(file + ": ONNX Runtime refuses it: " + said);
}

} // namespace calora::ort

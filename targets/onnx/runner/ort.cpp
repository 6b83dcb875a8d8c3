#include "ort.h"

#include "error.h"

#include <dlfcn.h>

namespace calora::ort {
namespace {

constexpr const char* library = "libonnxruntime.so.1";

const Api& open() {
  void* const opened = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) throw refusal(library, "library", "beside this program", ::dlerror());
  const auto base = reinterpret_cast<const ApiBase* (*)()>(::dlsym(opened, "OrtGetApiBase"));
  const Api* const found = base ? base()->GetApi(api_version) : nullptr;
  if (!found) throw refusal(library, "version", "1.20 or newer", base ? base()->GetVersionString() : "no such library");
  return *found;
}

} // namespace

const Api& api() {
  static const Api& opened = open();
  return opened;
}

void require(Status* status, const std::string& file) {
  if (!status) return;
  std::string said = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  said = said.substr(0, said.find('\n'));
  throw Error(file + ": ONNX Runtime refuses it: " + said);
}

} // namespace calora::ort

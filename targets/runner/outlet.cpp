#include "outlet.h"

#include "error.h"

#include <nlohmann/json.hpp>

#include <cstdio>
#include <fstream>

namespace calora {
namespace {

constexpr const char* logits_name = "logits.bin";
constexpr const char* trace_name = "trace.json";

class Files : public Outlet {
 public:
  explicit Files(const std::filesystem::path& directory)
      : directory_(directory), logits_(directory / logits_name, std::ios::binary) {}

  void add(const std::vector<float>& logits) override {
    logits_.write(reinterpret_cast<const char*>(logits.data()), std::streamsize(logits.size() * sizeof(float)));
    if (!logits_.flush()) throw Error(std::string(logits_name) + ": cannot be written");
  }

  void say(const Json& trace) override {
    const std::filesystem::path whole = directory_ / trace_name, begun = directory_ / ".trace.json";
    std::ofstream file(begun, std::ios::binary);
    std::error_code error;
    if (file << trace.dump() << '\n' && file.flush()) std::filesystem::rename(begun, whole, error);
    if (!file || error) throw Error(std::string(trace_name) + ": cannot be written");
  }

 private:
  std::filesystem::path directory_;
  std::ofstream logits_;
};

class Stream : public Outlet {
 public:
  void add(const std::vector<float>& logits) override {
    send(logits_name, logits.data(), logits.size() * sizeof(float));
  }

  void say(const Json& trace) override {
    const std::string text = trace.dump();
    send(trace_name, text.data(), text.size());
  }

 private:
  static void send(const char* name, const void* bytes, size_t size) {
    std::printf("%s %zu\n", name, size);
    std::fwrite(bytes, 1, size, stdout);
    if (std::fflush(stdout) != 0) throw Error("standard output: cannot be written");
  }
};

} // namespace

std::unique_ptr<Outlet> to_files(const std::filesystem::path& directory) { return std::make_unique<Files>(directory); }

std::unique_ptr<Outlet> to_stream() { return std::make_unique<Stream>(); }

} // namespace calora

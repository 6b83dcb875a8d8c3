// What a user or an app did wrong, or a limit: main prints it in one line and exits with 1.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace calora {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// file: key: expected …, found … (hint)
inline Error refusal(const std::string& file, const std::string& key, const std::string& expected,
                      const std::string& found, const std::string& hint = "") {
  return Error(file + ": " + key + ": expected " + expected + ", found " + found +
               (hint.empty() ? "" : " (" + hint + ")"));
}

/// [2, 3]
inline std::string shown(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

} // namespace calora

// What a user or an app did wrong, or a limit: main prints it in one line and exits with 1.
#pragma once

#include <stdexcept>
#include <string>

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

} // namespace calora

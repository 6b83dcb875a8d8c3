// calora_runner PACKAGE JOBDIR            runs a job, its trace into the same directory
// calora_runner PACKAGE JOBDIR --stream   the trace as a stream
// calora_runner PACKAGE --prompt-ids 1,2,3 [--mix a=0.7,b=0.3] [--tokens 20] [--threads 2]      generates, prints ids
#include "answer.h"
#include "error.h"
#include "session.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>

namespace calora {
namespace {

constexpr const char* usage =
    "usage: calora_runner PACKAGE JOBDIR [--stream] | "
    "PACKAGE --prompt-ids 1,2,3 [--mix a=0.7,b=0.3] [--tokens N] [--threads N]";

struct Options {
  Tokens prompt;
  Mix mix;
  int64_t tokens = 20, threads = 2;
};

int64_t integer(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 0) throw refusal("calora_runner", option, "an integer from 0", text);
  return value;
}

double number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end) throw refusal("calora_runner", option, "a number", text);
  return value;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 0; i < count; i += 2) {
    const std::string option = arguments[i];
    if (i + 1 == count) throw refusal("calora_runner", option, "a value", "none");
    const std::string value = arguments[i + 1];
    if (option == "--prompt-ids") {
      for (const std::string& id : split(value)) options.prompt.push_back(integer(option, id));
    } else if (option == "--mix") {
      for (const std::string& part : split(value)) {
        const size_t equals = part.find('=');
        options.mix[part.substr(0, equals)] =
            equals == std::string::npos ? 1.0 : number(option, part.substr(equals + 1));
      }
    } else if (option == "--tokens") {
      options.tokens = integer(option, value);
    } else if (option == "--threads") {
      options.threads = std::max<int64_t>(1, integer(option, value));
    } else {
      throw Error(usage);
    }
  }
  return options;
}

void generate(const std::filesystem::path& package, const Options& options) {
  const std::unique_ptr<Session> opened = open_session(package, options.threads);
  Session& session = *opened;
  session.select(options.mix);
  const Tokens& ends = session.package().ends;
  Tokens fed = options.prompt;
  for (int64_t i = 0; i < options.tokens; ++i) {
    fed = {session.next(fed)};
    std::cout << (i ? " " : "") << fed[0] << std::flush;
    if (std::find(ends.begin(), ends.end(), fed[0]) != ends.end()) break;
  }
  std::cout << std::endl;
}

void run(int count, char** arguments) {
  const std::string second = count > 2 ? arguments[2] : "";
  if (count < 3) throw Error(usage);
  if (second.rfind("--", 0) == 0) return generate(arguments[1], parse(count - 2, arguments + 2));
  const bool stream = count == 4 && arguments[3] == std::string("--stream");
  if (count != 3 && !stream) throw Error(usage);
  answer(arguments[1], second, stream);
}

} // namespace
} // namespace calora

int main(int count, char** arguments) {
  try {
    calora::start_runtime();
    calora::run(count, arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

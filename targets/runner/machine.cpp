#include "machine.h"

#include "error.h"

#include <elf.h>
#include <nlohmann/json.hpp>
#include <sched.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>

namespace calora {
namespace {

#if defined(__x86_64__)
constexpr int own_machine = EM_X86_64;
#elif defined(__aarch64__)
constexpr int own_machine = EM_AARCH64;
#endif

namespace fs = std::filesystem;

/// A size of /proc/self/status, in bytes.
int64_t status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string word; file >> word;)
    if (int64_t kibibytes = 0; word == key && file >> kibibytes) return kibibytes * 1024;
  return 0;
}

/// A number in a file; Android lets a shell read some of them only.
std::optional<double> number(const fs::path& file) {
  double value = 0;
  return std::ifstream(file) >> value ? std::optional(value) : std::nullopt;
}

/// What is in a directory and begins so, in the order of the names.
std::vector<fs::path> entries(const fs::path& directory, const std::string& head) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error))
    if (entry.path().filename().string().rfind(head, 0) == 0) found.push_back(entry.path());
  std::sort(found.begin(), found.end());
  return found;
}

} // namespace

std::vector<int64_t> cores() {
  std::vector<int64_t> found;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int i = 0; i < CPU_SETSIZE; ++i)
      if (CPU_ISSET(i, &set)) found.push_back(i);
  return found;
}

void pin(const std::vector<int64_t>& wanted) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int64_t core : wanted)
    if (core >= 0 && core < CPU_SETSIZE) CPU_SET(int(core), &set);
  sched_setaffinity(0, sizeof set, &set); // what counts is where it may run now
  std::vector<int64_t> sorted = wanted;
  std::sort(sorted.begin(), sorted.end());
  if (cores() != sorted) throw refusal("job.json", "cores", "processors of this device", Json(wanted).dump());
}

Json conditions() {
  Json temperatures, clocks;
  for (const fs::path& zone : entries("/sys/class/thermal", "thermal_zone")) {
    std::string type;
    std::getline(std::ifstream(zone / "type"), type);
    const std::string name = zone.filename().string().substr(std::strlen("thermal_zone")) + (type.empty() ? "" : " ");
    if (const auto value = number(zone / "temp")) temperatures[name + type] = *value / 1000;
  }
  for (const fs::path& core : entries("/sys/devices/system/cpu", "cpu"))
    if (const auto value = number(core / "cpufreq" / "scaling_cur_freq"))
      clocks[core.filename().string()] = *value / 1000;
  return {{"temperature_c", temperatures}, {"clock_mhz", clocks}};
}

bool emulated() {
  // qemu-user shows its guest as /proc/self/exe, but knows that file by this one name only.
  std::ifstream file("/proc/./self/exe", std::ios::binary);
  Elf64_Ehdr header{};
  if (!file.read(reinterpret_cast<char*>(&header), sizeof header)) return false;
  return std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_machine != own_machine;
}

int64_t peak_rss() { return status("VmHWM:"); }

int64_t mapped() { return status("RssFile:"); }

} // namespace calora

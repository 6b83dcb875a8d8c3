#include "machine.h"

#include <elf.h>

#include <cstring>
#include <fstream>
#include <string>

namespace calora {
namespace {

#if defined(__x86_64__)
constexpr int own_machine = EM_X86_64;
#elif defined(__aarch64__)
constexpr int own_machine = EM_AARCH64;
#endif

} // namespace

bool emulated() {
  // qemu-user shows its guest as /proc/self/exe, but knows that file by this one name only.
  std::ifstream file("/proc/./self/exe", std::ios::binary);
  Elf64_Ehdr header{};
  if (!file.read(reinterpret_cast<char*>(&header), sizeof header)) return false;
  return std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_machine != own_machine;
}

int64_t peak_rss() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (int64_t kibibytes = 0; word == "VmHWM:" && status >> kibibytes) return kibibytes * 1024;
  return 0;
}

} // namespace calora

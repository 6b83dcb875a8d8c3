// The machine that runs this program.
#pragma once

#include <cstdint>

namespace calora {

/// Whether another processor's program (qemu-user) runs this one: then times mean nothing.
bool emulated();

/// Bytes; 0 where the system does not say.
int64_t peak_rss();

} // namespace calora

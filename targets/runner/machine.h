// The machine that runs this program.
#pragma once

#include "fields.h"

#include <cstdint>
#include <vector>

namespace calora {

/// Whether another processor's program (qemu-user) runs this one: then times mean nothing.
bool emulated();

/// The processors on which this program may run.
std::vector<int64_t> cores();

/// Run on these processors only, this thread and those that it starts from now on.
void pin(const std::vector<int64_t>& wanted);

/// `before` and `after` of trace.json: temperatures and clocks, null where the system does not say.
Json conditions();

/// Bytes; 0 where the system does not say.
int64_t peak_rss();

/// Bytes of files that are in this program's memory; 0 where the system does not say.
int64_t mapped();

} // namespace calora

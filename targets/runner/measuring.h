// How long loading, swapping, prefill and decode take on this device.
#pragma once

#include "fields.h"
#include "job.h"
#include "session.h"

namespace calora {

/// The `timing` of trace.json; load in milliseconds; route: router ids, or nothing.
Json measure(Session& session, const Timing& timing, double load, const std::vector<Tokens>& routes);

} // namespace calora

// Runs a job and writes its trace.
#pragma once

#include <filesystem>

namespace calora {

/// directory/job.json in; trace.json and logits.bin (fp32 [steps + 1, vocab] per case) out, as they come: into the
/// directory, or as a stream to standard output, of which another machine has all that was said when this one is gone.
void answer(const std::filesystem::path& package, const std::filesystem::path& directory, bool stream);

} // namespace calora

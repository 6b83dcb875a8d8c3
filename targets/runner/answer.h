// Runs a job and writes its trace.
#pragma once

#include <filesystem>

namespace calora {

/// directory/job.json in; trace.json and logits.bin (fp32 [steps + 1, vocab] per case) out.
void answer(const std::filesystem::path& package, const std::filesystem::path& directory);

} // namespace calora

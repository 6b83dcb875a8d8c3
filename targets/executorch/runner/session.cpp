#include "session.h"

#include "error.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace calora {
namespace {

using executorch::aten::ScalarType;

enum Input : size_t { tokens, input_pos, rows };

/// Where the model takes rows: how many elements, and as what.
using Shape = std::vector<int32_t>;

/// As a whole; or every group's down [parts · R, in] and every site's up [1, R, out], as they follow each other.
std::vector<Shape> row_inputs(const Package& package, int32_t rank) {
  if (!package.portable) return {{int32_t(rank * package.elements)}};
  std::vector<Shape> shapes;
  for (const Group& group : package.groups) {
    shapes.push_back({int32_t(group.outs.size()) * rank, int32_t(group.inputs)});
    for (const int64_t out : group.outs) shapes.push_back({1, rank, int32_t(out)});
  }
  return shapes;
}

int64_t elements_of(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
}

} // namespace

Session::Session(Package package, int64_t threads) : package_(std::move(package)) {
  set_threads(threads);
  model_ = std::make_unique<Program>(package_.model, "adapted");
  chunk_ = model_->limit(tokens, 1);
  fed_.resize(size_t(chunk_));
  select({});
}

void Session::select(const Mix& mix, bool keep_cache) {
  std::vector<std::pair<const Adapter*, float>> parts;
  for (const auto& [id, weight] : mix)
    if (weight != 0.0) parts.push_back({&adapter(id), float(weight)});
  Rows chosen = Rows::mix(parts, package_);
  const auto rank = int32_t(chosen.rank);
  const auto* from = static_cast<const char*>(chosen.rows);
  size_t input = rows;
  for (const Shape& shape : row_inputs(package_, rank)) {
    model_->set(input++, from, shape, package_.half ? ScalarType::Half : ScalarType::Float);
    if (from) from += elements_of(shape) * (package_.half ? 2 : 4);
  }
  model_->set(input++, chosen.gate.data(), {rank}, ScalarType::Float);
  model_->set(input++, chosen.recovery.data(), {rank}, ScalarType::Float);
  rows_ = std::move(chosen); // only now: the model read the old ones until here
  mix_ = mix;
  if (!keep_cache) forget();
}

const float* Session::extend(const int64_t* ids, size_t count) {
  if (length_ + int64_t(count) > package_.context)
    throw refusal("package.json", "model.context",
                  "at most " + std::to_string(package_.context) + " tokens of prompt and answer",
                  std::to_string(length_ + int64_t(count)));
  for (size_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= package_.vocab)
      throw refusal("package.json", "model.vocab", "tokens from 0 to " + std::to_string(package_.vocab - 1),
                    std::to_string(ids[i]));
  if (count == 0) throw refusal("prompt", "ids", "at least one token", "none");
  const float* logits = nullptr;
  for (size_t done = 0; done < count;) {
    const size_t now = std::min(count - done, size_t(chunk_));
    std::copy_n(ids + done, now, fed_.begin());
    position_ = length_;
    model_->set(tokens, fed_.data(), {1, int32_t(now)}, ScalarType::Long);
    model_->set(input_pos, &position_, {1}, ScalarType::Long);
    const Program::Output output = model_->run();
    if (output.count != package_.vocab)
      throw refusal(package_.model.filename().string(), "logits", std::to_string(package_.vocab) + " values",
                     std::to_string(output.count));
    logits = output.data;
    length_ += int64_t(now);
    done += now;
  }
  return logits;
}

int64_t Session::next(const Tokens& ids) {
  const float* const logits = extend(ids);
  return std::max_element(logits, logits + package_.vocab) - logits;
}

std::vector<double> Session::route(const Tokens& ids) {
  if (package_.router.empty())
    throw refusal("package.json", "router", "a router", "none", "name an adapter instead");
  if (!router_) router_ = std::make_unique<Program>(package_.router, "forward");
  router_->set(0, ids.data(), {1, int32_t(ids.size())}, ScalarType::Long);
  const Program::Output gates = router_->run();
  return {gates.data, gates.data + gates.count};
}

const Adapter& Session::adapter(const std::string& id) {
  const auto found = adapters_.find(id);
  if (found != adapters_.end()) return found->second;
  return adapters_.emplace(id, Adapter::load(package_.adapter(id), package_)).first->second;
}

} // namespace calora

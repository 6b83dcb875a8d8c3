// A package on ExecuTorch.
#include "session.h"

#include "adapter.h"
#include "error.h"
#include "program.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace calora {

const char* const target = "executorch";

void start_runtime() { capture_runtime_messages(); }

namespace {

using executorch::aten::ScalarType;

enum Input : size_t { tokens, input_pos, rows };

/// Where the model takes rows: how many elements, and as what.
using Shape = std::vector<int32_t>;

/// As a whole; or every group's down [parts · R, in] and every site's up [1, R, out], as they follow each other.
std::vector<Shape> row_inputs(const Layout& layout, int32_t rank) {
  if (!layout.portable) return {{int32_t(rank * layout.elements)}};
  std::vector<Shape> shapes;
  for (const Group& group : layout.groups) {
    shapes.push_back({int32_t(group.outs.size()) * rank, int32_t(group.inputs)});
    for (const int64_t out : group.outs) shapes.push_back({1, rank, int32_t(out)});
  }
  return shapes;
}

int64_t elements_of(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
}

class ExecutorchSession : public Session {
 public:
  ExecutorchSession(Package opened, int64_t threads)
      : Session(std::move(opened)), layout_(Layout::of(package())) {
    set_threads(threads);
    model_ = std::make_unique<Program>(package().model, "adapted");
    fed_.resize(size_t(model_->limit(tokens, 1)));
    activate({});
  }

  void admit(const std::filesystem::path& path) const override { Adapter::load(path, package(), layout_); }

 private:
  void activate(const Mix& mix) override {
    std::vector<std::pair<const Adapter*, float>> parts;
    for (const auto& [id, gate] : mix) parts.push_back({&adapter(id), float(gate)});
    Rows chosen = Rows::mix(parts, layout_);
    const auto rank = int32_t(chosen.rank);
    const auto* from = static_cast<const char*>(chosen.rows);
    size_t input = rows;
    for (const Shape& shape : row_inputs(layout_, rank)) {
      model_->set(input++, from, shape, layout_.half ? ScalarType::Half : ScalarType::Float);
      if (from) from += elements_of(shape) * layout_.width();
    }
    model_->set(input++, chosen.gate.data(), {rank}, ScalarType::Float);
    model_->set(input++, chosen.recovery.data(), {rank}, ScalarType::Float);
    if (!chosen.extras.empty())
      model_->set(input++, chosen.extras.data(), {int32_t(chosen.extras.size())}, ScalarType::Float);
    if (layout_.experts)
      model_->set(input, chosen.select.data(), {1, int32_t(layout_.experts), rank}, ScalarType::Float);
    rows_ = std::move(chosen); // only now: the model read the old ones until here
  }

  const float* run(const int64_t* ids, size_t count, int64_t position) override {
    const float* logits = nullptr;
    for (size_t done = 0; done < count;) {
      const size_t now = std::min(count - done, fed_.size());
      std::copy_n(ids + done, now, fed_.begin());
      position_ = position + int64_t(done);
      model_->set(tokens, fed_.data(), {1, int32_t(now)}, ScalarType::Long);
      model_->set(input_pos, &position_, {1}, ScalarType::Long);
      const Program::Output output = model_->run();
      if (output.count != package().vocab)
        throw refusal(package().model.filename().string(), "logits", std::to_string(package().vocab) + " values",
                      std::to_string(output.count));
      logits = output.data;
      done += now;
    }
    return logits;
  }

  std::vector<double> gates(const Tokens& ids) override {
    if (!router_) router_ = std::make_unique<Program>(package().router, "forward");
    router_->set(0, ids.data(), {1, int32_t(ids.size())}, ScalarType::Long);
    const Program::Output gates = router_->run();
    return {gates.data, gates.data + gates.count};
  }

  const Adapter& adapter(const std::string& id) {
    const auto found = adapters_.find(id);
    if (found != adapters_.end()) return found->second;
    return adapters_.emplace(id, Adapter::load(package().adapter(id).file, package(), layout_)).first->second;
  }

  Layout layout_;
  std::unique_ptr<Program> model_, router_;
  Tokens fed_; // as many as the program takes at once; what it reads stays here
  int64_t position_ = 0;
  std::map<std::string, Adapter> adapters_;
  Rows rows_;
};

} // namespace

std::unique_ptr<Session> open_session(const std::filesystem::path& package, int64_t threads) {
  return std::make_unique<ExecutorchSession>(Package::load(package, target), threads);
}

} // namespace calora

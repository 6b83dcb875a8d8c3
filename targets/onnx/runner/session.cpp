// A package on ONNX Runtime.
#include "session.h"

#include "adapter.h"
#include "error.h"
#include "graph.h"
#include "slots.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cstdlib>

namespace calora {

const char* const target = "onnx";

void start_runtime() { ort::api(); }

namespace {

/// Keys and values [1, KV, context, D] that the graph reads and writes in place.
struct Cache {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  struct Buffer {
    std::unique_ptr<char, Free> memory;
    ort::ValueHandle value;
    std::string past, present;
  };
  std::vector<Buffer> buffers;

  explicit Cache(const Package& package) {
    const Fields model = package.manifest.object("model");
    const int64_t width = model.integer("head_dim"), layers = model.integer("layers");
    const std::vector<int64_t> counts = model.integers("kv_heads", layers);
    for (int64_t i = 0; i < layers; ++i)
      for (const char* const kind : {"key", "value"}) {
        const int64_t heads = counts[size_t(i)];
        // calloc has large blocks from the system, which backs their pages when they are first written.
        auto* const memory = static_cast<char*>(std::calloc(size_t(heads * package.context * width), sizeof(float)));
        if (!memory) throw Error(package.model.filename().string() + ": no memory for the KV cache");
        const std::string name = std::to_string(i) + "." + kind;
        buffers.push_back({std::unique_ptr<char, Free>(memory),
                           tensor(memory, ort::fp32, {1, heads, package.context, width}), "past_key_values." + name,
                           "present." + name});
      }
  }
};

class OnnxSession : public Session {
 public:
  OnnxSession(Package opened, int64_t threads)
      : Session(std::move(opened)), threads_(threads), slots_(Slots::of(package())), model_(package().model, threads),
        cache_(package()), mask_(size_t(package().context), 1) {
    activate({});
  }

  /// MatMulNBits on 64-bit ARM: KleidiAI's kernels round per token, where the processor has dot products of int8, and
  /// none rounds where it has not. On x86-64 it rounds per block, as recipes say. Found by comparison, with 1.31.
  std::string rounding() const override {
#if defined(__aarch64__)
    return ::getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? "int8_token" : "float";
#else
    return "";
#endif
  }

  void admit(const std::filesystem::path& path) const override { Adapter::load(path, package(), slots_); }

 private:
  /// One file as it is: the runtime's adapter API, which reads it mapped. A mix, or what was multiplied: our tensors.
  void activate(const Mix& mix) override {
    std::vector<std::pair<const Adapter*, float>> parts;
    for (const auto& [id, gate] : mix) parts.push_back({&adapter(id), float(gate)});
    ort::RunOptions* options = nullptr;
    ort::require(ort::api().CreateRunOptions(&options), "ONNX Runtime");
    ort::RunOptionsHandle made(options);
    Blend blend;
    if (parts.size() == 1 && parts[0].second == 1.0f && parts[0].first->handle)
      ort::require(ort::api().RunOptionsAddActiveLoraAdapter(options, parts[0].first->handle.get()), "adapter");
    else if (!parts.empty() || slots_.required)
      blend = Blend::of(parts, slots_);
    options_ = std::move(made);
    blend_ = std::move(blend);
  }

  const float* run(const int64_t* ids, size_t count, int64_t position) override {
    const int64_t total = position + int64_t(count);
    const ort::ValueHandle tokens = tensor(ids, ort::int64, {1, int64_t(count)}),
                           mask = tensor(mask_.data(), ort::int64, {1, total});
    Feeds inputs{{"input_ids", "attention_mask"}, {tokens.get(), mask.get()}}, outputs{{"logits"}, {nullptr}};
    for (const Cache::Buffer& buffer : cache_.buffers) {
      inputs.add(buffer.past, buffer.value);
      outputs.add(buffer.present, buffer.value);
    }
    for (const auto& [name, value] : blend_.values) inputs.add(*name, value);
    const Graph::Output logits = model_.run(inputs, std::move(outputs), options_.get());
    const int64_t vocab = package().vocab;
    if (logits.count != vocab && logits.count != vocab * int64_t(count))
      throw refusal(package().model.filename().string(), "logits", std::to_string(vocab) + " values",
                    std::to_string(logits.count));
    return logits.data + logits.count - vocab;
  }

  std::vector<double> gates(const Tokens& ids) override {
    if (!router_) router_ = std::make_unique<Graph>(package().router, threads_);
    const ort::ValueHandle value = tensor(ids.data(), ort::int64, {1, int64_t(ids.size())});
    const Graph::Output gates = router_->run({{"ids"}, {value.get()}}, {{"gates"}, {nullptr}});
    return {gates.data, gates.data + gates.count};
  }

  const Adapter& adapter(const std::string& id) {
    const auto found = adapters_.find(id);
    if (found != adapters_.end()) return found->second;
    return adapters_.emplace(id, Adapter::load(package().adapter(id).file, package(), slots_)).first->second;
  }

  int64_t threads_;
  Slots slots_;
  Graph model_;
  std::unique_ptr<Graph> router_;
  Cache cache_;
  Tokens mask_; // all ones
  std::map<std::string, Adapter> adapters_;
  ort::RunOptionsHandle options_;
  Blend blend_;
};

} // namespace

std::unique_ptr<Session> open_session(const std::filesystem::path& package, int64_t threads) {
  return std::make_unique<OnnxSession>(Package::load(package, target), threads);
}

} // namespace calora

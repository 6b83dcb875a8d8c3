#include "slots.h"

#include "graph.h"

#include <map>
#include <set>

namespace calora {

std::vector<int64_t> SlotInput::shape(int64_t rank) const {
  if (width == 0) return {parts * rank};
  return {parts * rank, width};
}

int64_t SlotInput::bytes() const { return (width == 0 ? 1 : width) * size_of(type); }

Slots Slots::of(const Package& package) {
  const Fields settings = package.manifest.object("settings"), slots = package.manifest.object("slots");
  require_rows_alone(slots);
  Slots made;
  made.fingerprint = slots.text("fingerprint");
  made.required = settings.text("adapter_inputs") == "required";
  if (!made.required) require_value("settings.adapter_inputs", "optional", settings.text("adapter_inputs"));
  const std::map<std::string, ort::Type> types{{"fp32", ort::fp32}, {"fp16", ort::fp16}, {"int8", ort::int8}};
  const auto found = types.find(slots.text("dtype"));
  if (found == types.end()) require_value("slots.dtype", "fp32, fp16 or int8", slots.text("dtype"));
  const auto add = [&](const std::string& name, int64_t parts, int64_t width, bool gated) {
    const bool scaled = found->second == ort::int8; // each row by a number of its own, which takes the gate
    made.inputs.push_back({name, found->second, parts, width, gated && !scaled});
    if (scaled) made.inputs.push_back({name + ".scale", ort::fp32, parts, 0, gated});
  };
  std::set<std::string> known;
  for (const Fields& tensor : slots.objects("tensors")) {
    const std::string down = tensor.text("down");
    if (known.insert(down).second) add(down, tensor.integer("parts"), tensor.integer("inputs"), false);
    add(tensor.text("up"), 1, tensor.integer("outputs"), true);
  }
  if (slots.has("recovery")) made.inputs.push_back({slots.text("recovery"), ort::fp32, 1, 0, false});
  return made;
}

} // namespace calora

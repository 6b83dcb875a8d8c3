#include "slots.h"

#include <set>

namespace calora {

std::vector<int64_t> SlotInput::shape(int64_t rank) const {
  if (kind == recovery) return {rank};
  return {parts * rank, width};
}

Slots Slots::of(const Package& package) {
  const Fields settings = package.manifest.object("settings"), slots = package.manifest.object("slots");
  require_rows_alone(slots);
  Slots made;
  made.fingerprint = slots.text("fingerprint");
  made.required = settings.text("adapter_inputs") == "required";
  if (!made.required) require_value("settings.adapter_inputs", "optional", settings.text("adapter_inputs"));
  const bool half = slots.text("dtype") == "fp16";
  if (!half) require_value("slots.dtype", "fp32", slots.text("dtype"));
  const ort::Type type = half ? ort::fp16 : ort::fp32;
  std::set<std::string> known;
  for (const Fields& tensor : slots.objects("tensors")) {
    const std::string down = tensor.text("down");
    if (known.insert(down).second)
      made.inputs.push_back({SlotInput::down, down, type, tensor.integer("parts"), tensor.integer("inputs")});
    made.inputs.push_back({SlotInput::up, tensor.text("up"), type, 1, tensor.integer("outputs")});
  }
  if (slots.has("recovery")) made.inputs.push_back({SlotInput::recovery, slots.text("recovery"), ort::fp32, 1, 1});
  return made;
}

} // namespace calora

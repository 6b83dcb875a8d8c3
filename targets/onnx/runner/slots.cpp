#include "slots.h"

#include "graph.h"

#include <map>

namespace calora {

int64_t SlotInput::width() const {
  int64_t sum = 0;
  for (const Matrix& matrix : matrices) sum += matrix.width;
  return sum;
}

std::vector<int64_t> SlotInput::shape(int64_t rank) const {
  if (marks) return {int64_t(matrices.size()), rank};
  if (flat) return {rank * width()};
  return {int64_t(matrices.size()) * rank, matrices[0].width};
}

namespace {

/// One input of all matrices, and one of a number for each row where they are int8.
std::vector<SlotInput> together(const std::vector<SlotInput>& each, const std::string& name, bool scaled) {
  SlotInput rows{name, each.empty() ? ort::fp32 : each[0].type, {}, true};
  SlotInput scales{"scales", ort::fp32, {}, true, false, true};
  for (const SlotInput& input : each)
    for (const Matrix& matrix : input.matrices) {
      rows.matrices.push_back({matrix.width, matrix.gated && !scaled, matrix.site, matrix.up});
      scales.matrices.push_back({1, matrix.gated});
    }
  return scaled ? std::vector{rows, scales} : std::vector{rows};
}

} // namespace

Slots Slots::of(const Package& package) {
  const Fields settings = package.manifest.object("settings"), slots = package.manifest.object("slots");
  Slots made;
  made.fingerprint = slots.text("fingerprint");
  made.required = settings.text("adapter_inputs") == "required";
  if (!made.required) require_value("settings.adapter_inputs", "optional", settings.text("adapter_inputs"));
  const std::map<std::string, ort::Type> types{{"fp32", ort::fp32}, {"fp16", ort::fp16}, {"int8", ort::int8}};
  const auto found = types.find(slots.text("dtype"));
  if (found == types.end()) require_value("slots.dtype", "fp32, fp16 or int8", slots.text("dtype"));
  const ort::Type type = found->second;
  size_t down = 0;
  for (const SlotTensor& slot : package.slots) {
    if (slot.part == 0 || made.inputs.empty()) { // the first of a group
      down = made.inputs.size();
      made.inputs.push_back({slot.down, type, {}, false});
    }
    made.inputs[down].matrices.push_back({slot.inputs, false, slot.site});
    made.inputs.push_back({slot.up, type, {{slot.outputs, true, slot.site, true}}, false});
  }
  if (slots.has("rows")) made.inputs = together(made.inputs, slots.text("rows"), type == ort::int8);
  if (slots.has("recovery")) made.inputs.push_back({slots.text("recovery"), ort::fp32, {{1, false}}, true});
  made.extras = Extras::of(package);
  if (made.extras.experts) {
    const std::vector<Matrix> marks(size_t(made.extras.experts), {1, false});
    made.inputs.push_back({"select", ort::fp32, marks, false, true});
    made.inputs.push_back({always, ort::fp32, {{1, false}}, true});
  }
  return made;
}

} // namespace calora

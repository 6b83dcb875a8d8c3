#include "layout.h"

namespace calora {
namespace {

/// The tensors of one group follow each other, from part 0 on.
std::vector<Group> groups_of(const Package& package, int64_t& elements) {
  std::vector<Group> groups;
  for (const SlotTensor& slot : package.slots) {
    if (groups.empty() || slot.part == 0) groups.push_back({slot.inputs, elements, {}, {}});
    groups.back().sites.push_back(slot.site);
    groups.back().outs.push_back(slot.outputs);
    elements += slot.inputs + slot.outputs;
  }
  return groups;
}

} // namespace

Layout Layout::of(const Package& package) {
  Layout layout;
  require_value("model.logits", "last", package.manifest.object("model").text("logits"));
  const Fields settings = package.manifest.object("settings"), slots = package.manifest.object("slots");
  layout.rank_budget = settings.integer("rank_budget");
  layout.portable = settings.text("kernels") == "stock";
  if (!layout.portable) require_value("settings.kernels", "calora", settings.text("kernels"));
  layout.half = slots.text("dtype") == "fp16";
  if (!layout.half) require_value("slots.dtype", "fp32", slots.text("dtype"));
  layout.groups = groups_of(package, layout.elements);
  const Extras extras = Extras::of(package);
  layout.extras = extras.flat();
  layout.experts = extras.experts;
  return layout;
}

} // namespace calora

#include "layout.h"

namespace calora {
namespace {

/// The tensors of one group follow each other, from part 0 on.
std::vector<Group> groups_of(const Fields& slots, int64_t& elements) {
  std::vector<Group> groups;
  for (const Fields& tensor : slots.objects("tensors")) {
    if (groups.empty() || tensor.integer("part") == 0) groups.push_back({tensor.integer("inputs"), elements, {}});
    groups.back().outs.push_back(tensor.integer("outputs"));
    elements += tensor.integer("inputs") + tensor.integer("outputs");
  }
  return groups;
}

} // namespace

Layout Layout::of(const Package& package) {
  Layout layout;
  require_value("model.logits", "last", package.manifest.object("model").text("logits"));
  const Fields settings = package.manifest.object("settings"), slots = package.manifest.object("slots");
  require_rows_alone(slots);
  layout.rank_budget = settings.integer("rank_budget");
  layout.portable = settings.text("kernels") == "stock";
  if (!layout.portable) require_value("settings.kernels", "calora", settings.text("kernels"));
  layout.half = slots.text("dtype") == "fp16";
  if (!layout.half) require_value("slots.dtype", "fp32", slots.text("dtype"));
  layout.groups = groups_of(slots, layout.elements);
  return layout;
}

} // namespace calora

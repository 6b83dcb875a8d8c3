#include "factors.h"

#include "error.h"
#include "half.h"
#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace calora {
namespace {

struct Matrix {
  std::vector<int64_t> shape;
  std::vector<float> values;

  int64_t size(size_t dimension) const { return dimension < shape.size() ? shape[dimension] : 0; }
};

/// The tensors of an adapter file, and behind them those of its basis.
struct Factors {
  Safetensors own;
  std::unique_ptr<Safetensors> basis;

  Matrix read(const std::string& name) const {
    const Safetensors::Tensor* found = own.find(name);
    if (!found && basis) found = basis->find(name);
    if (!found || (found->dtype != "F32" && found->dtype != "F16"))
      throw refusal(own.name(), name, "a float tensor", found ? found->dtype : "none");
    Matrix made{found->shape, std::vector<float>(size_t(found->elements()))};
    if (found->dtype == "F32") {
      std::memcpy(made.values.data(), found->data, made.values.size() * sizeof(float));
      return made;
    }
    std::vector<Half> halves(made.values.size());
    std::memcpy(halves.data(), found->data, halves.size() * sizeof(Half));
    std::copy(halves.begin(), halves.end(), made.values.begin());
    return made;
  }

  void require(const std::string& name, const Matrix& matrix, const std::vector<int64_t>& shape) const {
    if (matrix.shape != shape) throw refusal(own.name(), name, shown(shape), shown(matrix.shape));
  }

  /// Rows of a site: down [r, inputs], and up [outputs, c] times core [c, r] as [r, outputs].
  Multiplied::Site rows(const Fields& names, const SlotTensor& slot) const {
    names.only({"down", "up", "core"});
    const std::string down_name = names.text("down"), up_name = names.text("up");
    Matrix down = read(down_name), up = read(up_name);
    const int64_t r = down.size(0), c = up.size(1), outputs = slot.outputs;
    require(down_name, down, {r, slot.inputs});
    require(up_name, up, {outputs, names.has("core") ? c : r});
    std::vector<float> turned(up.values.size()), made; // up as [c, outputs]
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t j = 0; j < c; ++j) turned[size_t(j * outputs + o)] = up.values[size_t(o * c + j)];
    if (!names.has("core")) return {std::move(down.values), std::move(turned)};
    const std::string core_name = names.text("core");
    const Matrix core = read(core_name);
    const bool diagonal = core.shape.size() == 1 && c == r;
    require(core_name, core, diagonal ? std::vector<int64_t>{r} : std::vector<int64_t>{c, r});
    for (int64_t k = 0; k < r; ++k) {
      std::vector<double> sums(size_t(outputs), 0.0); // rounded once, so that every runtime has the same rows
      for (int64_t j = diagonal ? k : 0; j < (diagonal ? k + 1 : c); ++j) {
        const double weight = core.values[size_t(diagonal ? k : j * r + k)];
        for (int64_t o = 0; o < outputs; ++o) sums[size_t(o)] += turned[size_t(j * outputs + o)] * weight;
      }
      made.insert(made.end(), sums.begin(), sums.end());
    }
    return {std::move(down.values), std::move(made)};
  }
};

} // namespace

Multiplied Multiplied::load(const std::filesystem::path& path, const Package& package) {
  Factors factors{Safetensors(path), nullptr};
  const std::string& file = factors.own.name();
  package.require_fingerprint(file, factors.own.stated(package.manifest.object("slots").text("fingerprint")));
  const Safetensors::Tensor* const text = factors.own.find("layout");
  if (!text || text->dtype != "U8") throw refusal(file, "layout", "a tensor of cores", "nothing");
  const Fields layout = Fields::parse(std::string(text->data, size_t(text->elements())), file);
  layout.only({"basis", "sites"});
  if (layout.has("basis")) {
    const std::string basis = layout.text("basis");
    if (!package.manifest.object("files").has(basis)) throw refusal(file, "basis", "a file of this package", basis);
    factors.basis = std::make_unique<Safetensors>(package.path / basis);
  }
  const Fields sites = layout.object("sites");
  Multiplied made;
  for (const std::string& site : sites.keys()) {
    const SlotTensor& slot = package.slot(file, site);
    const Site& rows = made.sites[site] = factors.rows(sites.object(site), slot);
    made.rank = std::max(made.rank, int64_t(rows.up.size()) / slot.outputs);
  }
  for (const SlotTensor& slot : package.slots) {
    made.sites[slot.site].down.resize(size_t(made.rank * slot.inputs));
    made.sites[slot.site].up.resize(size_t(made.rank * slot.outputs));
  }
  return made;
}

bool is_factored(const std::filesystem::path& path) { return path.extension() == ".factors"; }

} // namespace calora

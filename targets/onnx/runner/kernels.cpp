#include "kernels.h"

#include "operators.h"

#include <algorithm>
#include <array>
#include <cstdlib>

namespace calora::ort {
namespace {

/// The table of the runtime that this library is registered with: a process has one.
const Api* runtime = nullptr;
const Api24* newer = nullptr; // where the runtime has it

constexpr size_t most = 3;
enum Input : size_t { X, ROWS, SCALES, RECOVERY, GATE, Y, SKIP = Y + most, WEIGHT, EPSILON, INPUTS };


/// Why a call fails; `guarded` hands it to the runtime.
struct Refused {
  Status* status;
};

void check(Status* status) {
  if (status) throw Refused{status};
}

void expect(bool holds, const char* what) {
  constexpr int invalid_argument = 2;
  if (!holds) throw Refused{runtime->CreateStatus(invalid_argument, what)};
}

/// An input or output of a call; without dimensions: the node leaves it out.
struct Tensor {
  void* data = nullptr;
  Type type = any;
  std::array<int64_t, 3> sizes{};
  size_t dimensions = 0;

  explicit operator bool() const { return dimensions > 0; }
  bool fits() const { return dimensions > 0 && dimensions <= sizes.size(); }
  int64_t last() const { return sizes[dimensions - 1]; }
  int64_t rows() const { return dimensions == 3 ? sizes[0] * sizes[1] : sizes[0]; }
  float* floats() const { return static_cast<float*>(data); }
  bool is(Type kind, size_t count) const { return type == kind && dimensions == count; }
};

void read_shape(const Value* value, Tensor& tensor) {
  if (newer) {
    const int64_t* sizes = nullptr;
    check(newer->GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &sizes, &tensor.dimensions));
    if (tensor.fits()) std::copy_n(sizes, tensor.dimensions, tensor.sizes.begin());
    return;
  }
  TensorInfo* info = nullptr;
  check(runtime->GetTensorTypeAndShape(value, &info));
  Status* failed = runtime->GetTensorElementType(info, &tensor.type);
  if (!failed) failed = runtime->GetDimensionsCount(info, &tensor.dimensions);
  if (!failed && tensor.fits()) failed = runtime->GetDimensions(info, tensor.sizes.data(), tensor.dimensions);
  runtime->ReleaseTensorTypeAndShapeInfo(info);
  check(failed);
}

Tensor read(const Value* value) {
  Tensor tensor;
  if (!value) return tensor;
  check(runtime->GetTensorMutableData(const_cast<Value*>(value), &tensor.data));
  read_shape(value, tensor);
  expect(tensor.fits(), "a tensor of 1 to 3 dimensions");
  return tensor;
}

Tensor input(const KernelContext* context, size_t index) {
  const Value* value = nullptr;
  check(runtime->KernelContext_GetInput(context, index, &value));
  return read(value);
}

Tensor output(KernelContext* context, size_t index, const std::array<int64_t, 3>& sizes) {
  Value* value = nullptr;
  check(runtime->KernelContext_GetOutput(context, index, sizes.data(), sizes.size(), &value));
  return read(value);
}

Threads threads(KernelContext* context) {
  return {context, [](void* pool, void (*task)(void*, size_t), size_t count, void* data) {
            check(runtime->KernelContext_ParallelFor(static_cast<KernelContext*>(pool), task, count, 0, data));
          }};
}

/// Where the matrices of a node lie, in units of the rank.
struct Layout {
  int64_t width = 0, matrices = 0, offset = 0, first = 0;
  std::array<int64_t, most> outs{};
  size_t count = most;

  explicit Layout(const KernelInfo* info) {
    check(runtime->KernelInfoGetAttribute_int64(info, "width", &width));
    check(runtime->KernelInfoGetAttribute_int64(info, "matrices", &matrices));
    check(runtime->KernelInfoGetAttribute_int64(info, "offset", &offset));
    check(runtime->KernelInfoGetAttribute_int64(info, "first", &first));
    check(runtime->KernelInfoGetAttributeArray_int64(info, "outs", outs.data(), &count));
    expect(count > 0 && width > 0, "outs and width: of one linear at least");
  }

  int64_t all_outs() const {
    int64_t sum = 0;
    for (size_t j = 0; j < count; ++j) sum += outs[j];
    return sum;
  }
};

/// What the slots of a node read. Shapes are checked: adapters come from files.
struct Slots {
  const Layout& layout;
  Tensor x, rows, scales, recovery, gate;
  std::array<Tensor, most> ys;
  size_t y_count = 0;
  int64_t rank = 0;

  Slots(const Layout& of, const KernelContext* context)
      : layout(of),
        x(input(context, X)),
        rows(input(context, ROWS)),
        recovery(input(context, RECOVERY)),
        gate(input(context, GATE)) {
    while (y_count < layout.count && (ys[y_count] = input(context, Y + y_count))) ++y_count;
    expect(y_count == 1 || y_count == layout.count, "one y, or as many as outs");
    expect(x.is(fp32, 3), "x: fp32 [batch, positions, in]");
    const Type kind = rows.type;
    expect(kind == fp32 || kind == fp16 || kind == int8, "rows: fp32, fp16 or int8");
    rank = rows.last() / layout.width;
    expect(rows.is(kind, 1) && rows.last() == rank * layout.width, "rows: [rank · width]");
    const int64_t end = layout.offset + int64_t(layout.count) * x.last() + layout.all_outs();
    expect(layout.offset >= 0 && end <= layout.width, "offset: of matrices inside rows");
    expect(!recovery || (recovery.is(fp32, 1) && recovery.last() == rank), "recovery: fp32 [rank]");
    for (size_t j = 0; j < y_count; ++j) {
      expect(ys[j].is(fp32, 3) && ys[j].rows() == x.rows(), "y: fp32 [batch, positions, …]");
      expect(ys[j].last() == (y_count == 1 ? layout.all_outs() : layout.outs[j]), "y: a column for every output");
    }
    const bool fits = gate.is(fp32, 3) && gate.rows() == x.rows() && gate.last() == rank;
    expect(!gate || fits, "gate: fp32 [batch, positions, rank]");
    if (kind != int8) return;
    scales = input(context, SCALES);
    expect(scales.is(fp32, 1) && scales.last() == rank * layout.matrices, "scales: fp32 [rank · matrices]");
    const bool inside = layout.first >= 0 && layout.first + 2 * int64_t(layout.count) <= layout.matrices;
    expect(inside, "first: of matrices inside scales");
  }

  /// The rows' matrix that lies behind so many columns of them.
  const void* matrix(int64_t columns) const {
    const int64_t bytes = rows.type == fp32 ? 4 : rows.type == fp16 ? 2 : 1;
    return static_cast<const char*>(rows.data) + columns * rank * bytes;
  }

  const float* scale(size_t matrix) const {
    return scales ? scales.floats() + (layout.first + int64_t(matrix)) * rank : nullptr;
  }

  /// sums[j] = y_j and what the slots add.
  void add(const std::array<Tensor, most>& sums, const Threads& threads) const {
    const size_t count = layout.count;
    std::array<Member, most> members;
    int64_t before = layout.offset + int64_t(count) * x.last(), column = 0;
    for (size_t i = 0; i < count; ++i) {
      const int64_t outs = layout.outs[i];
      const size_t j = y_count == 1 ? 0 : i;
      members[i] = {matrix(before),           scale(i), scale(count + i), ys[j].floats() + column,
                    sums[j].floats() + column, outs,     ys[j].last()};
      before += outs;
      if (y_count == 1) column += outs;
    }
    const Rows type = rows.type == fp32 ? Rows::fp32 : rows.type == fp16 ? Rows::fp16 : Rows::int8;
    const Group group{x.floats(), matrix(layout.offset), gate.floats(),  recovery.floats(), x.last(),
                      rank,       members.data(),        int64_t(count), type,              rank};
    add_slots(group, x.rows(), threads);
  }
};

void slot(const Layout& layout, KernelContext* context) {
  const Slots slots(layout, context);
  std::array<Tensor, most> sums;
  for (size_t j = 0; j < slots.y_count; ++j) sums[j] = output(context, j, slots.ys[j].sizes);
  slots.add(sums, threads(context));
}

void slot_glu(const Layout& layout, KernelContext* context) {
  const Slots slots(layout, context);
  expect(layout.count == 2 && slots.y_count == 1 && layout.outs[0] == layout.outs[1], "two linears, one y");
  const Tensor& y = slots.ys[0];
  const Tensor out = output(context, 0, {y.sizes[0], y.sizes[1], y.last() / 2}), sum = output(context, 1, y.sizes);
  slots.add({sum}, threads(context));
  gate_linear_units(sum.floats(), out.floats(), out.last(), out.rows(), threads(context));
}

void slot_norm(const Layout& layout, KernelContext* context) {
  const Slots slots(layout, context);
  const Tensor skip = input(context, SKIP), weight = input(context, WEIGHT), epsilon = input(context, EPSILON);
  const Tensor& y = slots.ys[0];
  expect(layout.count == 1, "one linear");
  expect(skip.is(fp32, 3) && skip.rows() == y.rows() && skip.last() == y.last(), "skip: as y");
  expect(weight.is(fp32, 1) && weight.last() == y.last(), "weight: fp32 [out]");
  expect(epsilon.is(fp32, 1) && epsilon.last() == 1, "epsilon: fp32 [1]");
  const Tensor out = output(context, 0, y.sizes), sum = output(context, 1, y.sizes);
  slots.add({sum}, threads(context));
  add_and_norm({skip.floats(), weight.floats(), out.floats(), *epsilon.floats()}, sum.floats(), y.last(), y.rows(),
               threads(context));
}

/// No exception leaves the library.
template <void compute(const Layout&, KernelContext*)>
Status* guarded(void* layout, KernelContext* context) {
  try {
    compute(*static_cast<const Layout*>(layout), context);
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  }
}

/// Which outputs are in the memory of which inputs. A runtime that only may share it does not, where it cannot tell
/// that the shapes are the same; so y must have no other reader (kernels.h).
template <int... pairs>
size_t aliases(int** inputs, int** outputs) {
  static int all[] = {pairs...};
  constexpr size_t count = sizeof...(pairs) / 2;
  *inputs = all;
  *outputs = all + count;
  return count;
}

const char* name(const CustomOp* op);

CustomOp made() {
  CustomOp op{};
  op.version = 18;
  op.GetName = name;
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return INPUTS; };
  op.GetInputType = [](const CustomOp*, size_t i) { return i == ROWS ? any : fp32; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) {
    return i == X || i == ROWS || i == Y ? required : optional;
  };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.GetOutputType = [](const CustomOp*, size_t) { return fp32; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return most; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t i) { return i == 0 ? required : optional; };
  op.GetStartVersion = op.GetEndVersion = [](const CustomOp*) { return 1; };
  op.CreateKernelV2 = [](const CustomOp*, const Api*, const KernelInfo* info, void** kernel) -> Status* {
    try {
      *kernel = new Layout(info);
      return nullptr;
    } catch (const Refused& refused) {
      return refused.status;
    }
  };
  op.KernelDestroy = [](void* layout) { delete static_cast<Layout*>(layout); };
  op.ReleaseAliasMap = [](int*, int*) {};
  return op;
}

CustomOp slot_op() {
  CustomOp op = made();
  op.KernelComputeV2 = guarded<slot>;
  op.GetAliasMap = aliases<Y, Y + 1, Y + 2, 0, 1, 2>;
  return op;
}

template <void compute(const Layout&, KernelContext*)>
CustomOp slot_and_more() {
  CustomOp op = made();
  op.KernelComputeV2 = guarded<compute>;
  op.GetAliasMap = aliases<Y, 1>;
  return op;
}

const CustomOp ops[] = {slot_op(), slot_and_more<slot_glu>(), slot_and_more<slot_norm>()};

const char* name(const CustomOp* op) {
  constexpr const char* names[] = {"Slot", "SlotGlu", "SlotNorm"};
  return names[op - ops];
}

} // namespace

Status* register_kernels(const ApiBase& base, SessionOptions* options) {
  static CustomOpDomain* domain = nullptr; // must outlive every session
  if (!domain) {
    runtime = static_cast<const Api*>(base.GetApi(api_version));
    if (!runtime) {
      constexpr int not_implemented = 9;
      const auto old = static_cast<const Api*>(base.GetApi(1));
      return old->CreateStatus(not_implemented, "calora's operators need ONNX Runtime 1.20 or newer");
    }
    // "1.24.0" and on; asking an older one for it would print a complaint.
    if (std::atoi(base.GetVersionString() + 2) >= 24) newer = static_cast<const Api24*>(base.GetApi(24));
    CustomOpDomain* created = nullptr;
    if (Status* const failed = runtime->CreateCustomOpDomain("calora", &created)) return failed;
    for (const CustomOp& op : ops)
      if (Status* const failed = runtime->CustomOpDomain_Add(created, &op)) return failed;
    domain = created;
  }
  return runtime->AddCustomOpDomain(options, domain);
}

} // namespace calora::ort

/// What ONNX Runtime calls when it loads the library.
extern "C" [[gnu::visibility("default")]] calora::ort::Status* RegisterCustomOps(
    calora::ort::SessionOptions* options, const calora::ort::ApiBase* base) {
  return calora::ort::register_kernels(*base, options);
}

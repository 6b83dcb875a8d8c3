// The slots of a group for some positions, a gated linear unit and a norm, for the `Lanes` of the namespace that
// includes this (see tiles.h).

/// M positions from `s` on: down, activation and gate, up; rank by rank in tiles, so that what is between stays in
/// registers and on the stack whatever the rank is.
template <int M, typename T>
CALORA_INLINE void slot_positions(const Group& group, int64_t s) {
  constexpr int64_t tile = 64;
  const float* const x = group.x + s * group.inputs;
  const T* down = static_cast<const T*>(group.down);
  for (int64_t j = 0; j < group.count; ++j, down += group.rank * group.inputs) {
    const Member& member = group.members[j];
    const T* const up = static_cast<const T*>(member.up);
    const float* from = member.y + s * member.stride;
    float* const out = member.out + s * member.stride;
    for (int64_t r = 0; r < group.rank; r += tile) {
      const int64_t count = group.rank - r < tile ? group.rank - r : tile;
      float h[M * tile];
      dots<M>(x, group.inputs, down + r * group.inputs, group.inputs, group.inputs, count, h, tile);
      for (int m = 0; m < M; ++m) activate(group, member, h + m * tile, s + m, r, count);
      sums<M>(h, tile, up + r * member.outputs, member.outputs, count, from, out, member.stride, member.outputs);
      from = out;
    }
  }
}

/// Positions begin … end - 1.
template <typename T>
void slot(const Group& group, int64_t begin, int64_t end) {
  constexpr int M = Lanes::positions;
  for (; begin + M <= end; begin += M) slot_positions<M, T>(group, begin);
  for (; begin < end; ++begin) slot_positions<1, T>(group, begin);
}

/// One position in two steps that threads can share. First rows [begin, end) of all downs, one below the other;
template <typename T>
void slot_down(const Group& group, float* h, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(group.down) + begin * group.inputs;
  dots<1>(group.x, group.inputs, rows, group.inputs, group.inputs, end - begin, h + begin, 0);
}

/// then outputs [begin, end) of all members, counted on from member to member.
template <typename T>
void slot_up(const Group& group, const float* h, int64_t begin, int64_t end) {
  for (int64_t j = 0; j < group.count; ++j) {
    const Member& member = group.members[j];
    const int64_t outputs = member.outputs, first = begin > 0 ? begin : 0, last = end < outputs ? end : outputs;
    if (first < last)
      sums<1>(h + j * group.rank, 0, static_cast<const T*>(member.up) + first, outputs, group.rank, member.y + first,
              member.out + first, 0, last - first);
    begin -= outputs;
    end -= outputs;
  }
}

/// out = silu(y[0 … width - 1]) · y[width … 2 · width - 1].
void glu(const float* y, float* out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    const float small = exponential(y[i] < 0.0f ? y[i] : -y[i]);
    out[i] = y[i] * (y[i] < 0.0f ? small : 1.0f) / (1.0f + small) * y[width + i];
  }
}

/// Position s of add_and_norm.
void norm(const Norm& norm, float* sum, int64_t width, int64_t s) {
  const float* const skip = norm.skip + s * width;
  float *const row = sum + s * width, *const out = norm.out + s * width;
  typename Lanes::V squares[4] = {Lanes::set(0.0f), Lanes::set(0.0f), Lanes::set(0.0f), Lanes::set(0.0f)};
  float rest = 0.0f;
  for (int64_t i = 0; i < width; ++i) row[i] += skip[i];
  int64_t i = 0;
  for (; i + Lanes::width <= width; i += Lanes::width) {
    const typename Lanes::V value = Lanes::load(row + i);
    squares[0] = Lanes::fma(value, value, squares[0]);
  }
  for (; i < width; ++i) rest += row[i] * row[i];
  float sums[4];
  Lanes::sum4(squares, sums);
  const float factor = 1.0f / sqrtf((sums[0] + rest) / float(width) + norm.epsilon);
  for (i = 0; i < width; ++i) out[i] = row[i] * factor * norm.weight[i];
}

// The slots of a group for some positions, for the `Lanes` of the namespace that includes this (see tiles.h).

/// M positions from `s` on: down, activation and gate, up; rank by rank in tiles, so that what is between stays in
/// registers and on the stack whatever the rank is.
template <int M, typename T>
CALORA_INLINE void slot_positions(const Group& group, int64_t s) {
  constexpr int64_t tile = 64;
  const float* const x = group.x + s * group.inputs;
  const float* const y = group.y + s * group.width;
  float* const out = group.out + s * group.width;
  const T* down = static_cast<const T*>(group.rows);
  const T* up = down + group.rank * group.inputs * int64_t(group.outs.size());
  for (size_t j = 0; j < group.outs.size(); ++j) {
    const int64_t first = group.columns[j], outputs = group.outs[j];
    const float* from = y + first;
    for (int64_t r = 0; r < group.rank; r += tile) {
      const int64_t count = group.rank - r < tile ? group.rank - r : tile;
      float h[M * tile];
      dots<M>(x, group.inputs, down + r * group.inputs, group.inputs, group.inputs, count, h, tile);
      for (int m = 0; m < M; ++m) activate(h + m * tile, group.gate + r, group.recovery + r, count);
      sums<M>(h, tile, up + r * outputs, outputs, count, from, out + first, group.width, outputs);
      from = out + first;
    }
    down += group.rank * group.inputs;
    up += group.rank * outputs;
  }
}

/// Positions begin … end - 1.
template <typename T>
void slot(const Group& group, int64_t begin, int64_t end) {
  constexpr int M = Lanes::positions;
  for (; begin + M <= end; begin += M) slot_positions<M, T>(group, begin);
  for (; begin < end; ++begin) slot_positions<1, T>(group, begin);
}

/// One position in two steps that threads can share. First rows [begin, end) of all downs, which lie one below the other;
template <typename T>
void slot_down(const Group& group, float* h, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(group.rows) + begin * group.inputs;
  dots<1>(group.x, group.inputs, rows, group.inputs, group.inputs, end - begin, h + begin, 0);
}

/// then outputs [begin, end) of all members, counted on from member to member.
template <typename T>
void slot_up(const Group& group, const float* h, int64_t begin, int64_t end) {
  const T* up = static_cast<const T*>(group.rows) + group.rank * group.inputs * int64_t(group.outs.size());
  for (size_t j = 0; j < group.outs.size(); ++j) {
    const int64_t outputs = group.outs[j], first = begin > 0 ? begin : 0, last = end < outputs ? end : outputs;
    if (first < last) {
      const int64_t at = group.columns[j] + first;
      sums<1>(h + int64_t(j) * group.rank, 0, up + first, outputs, group.rank, group.y + at, group.out + at, 0,
              last - first);
    }
    begin -= outputs;
    end -= outputs;
    up += group.rank * outputs;
  }
}

// Attention of some queries that see almost the same keys, for the `Lanes` of the namespace that includes this.

constexpr int64_t block = 128; // keys whose weights stay on the stack

/// One row's scores [block] become weights exp(score · scale + mask - maximum), 0 from `seen` on, and what was summed
/// before them is brought to the new maximum. Milakov and Gimelshein, arXiv:1805.02867.
CALORA_INLINE void soften(float* scores, int64_t seen, float scale, const float* mask, Softmax& row, float* out,
                          int64_t depth) {
  constexpr int lanes = 16; // chains of their own: a compiler may not reorder one
  for (int64_t n = 0; n < seen; ++n) scores[n] = scores[n] * scale + (mask ? mask[n] : 0.0f);
  for (int64_t n = seen; n < block; ++n) scores[n] = -INFINITY;
  float peaks[lanes], totals[lanes] = {};
  for (int i = 0; i < lanes; ++i) peaks[i] = row.maximum;
  for (int64_t n = 0; n < block; n += lanes)
    for (int i = 0; i < lanes; ++i) peaks[i] = scores[n + i] > peaks[i] ? scores[n + i] : peaks[i];
  float most = peaks[0];
  for (int i = 1; i < lanes; ++i) most = peaks[i] > most ? peaks[i] : most;
  const float base = most == -INFINITY ? 0.0f : most; // every key so far is masked: ∞ - ∞ is not a weight
  for (int64_t n = 0; n < block; n += lanes)
    for (int i = 0; i < lanes; ++i) {
      scores[n + i] = exponential(scores[n + i] - base);
      totals[i] += scores[n + i];
    }
  if (most != row.maximum) {
    const float shrink = exponential(row.maximum - most);
    for (int64_t d = 0; d < depth; ++d) out[d] *= shrink;
    row.sum *= shrink;
    row.maximum = most;
  }
  for (int i = 0; i < lanes; ++i) row.sum += totals[i];
}

/// M rows of `queries` from `first` on.
template <int M>
CALORA_INLINE void attend_rows(const Queries& queries, int64_t first) {
  const float* const q = queries.q + first * queries.stride;
  float* const out = queries.out + first * queries.stride;
  Softmax rows[M];
  for (int m = 0; m < M; ++m)
    for (int64_t d = 0; d < queries.depth; ++d) out[m * queries.stride + d] = 0.0f;
  const int64_t keys = queries.visible(first + M - 1);
  for (int64_t n = 0; n < keys; n += block) {
    const int64_t count = keys - n < block ? keys - n : block;
    float weights[M * block];
    dots<M>(q, queries.stride, queries.k + n * queries.key_stride, queries.key_stride, queries.depth, count, weights,
            block);
    for (int m = 0; m < M; ++m) {
      const int64_t seen = queries.visible(first + m) - n;
      const float* const mask = queries.mask ? queries.mask + (first + m) * queries.mask_stride + n : nullptr;
      soften(weights + m * block, seen < 0 ? 0 : seen < count ? seen : count, queries.scale, mask, rows[m],
             out + m * queries.stride, queries.depth);
    }
    sums<M>(weights, block, queries.v + n * queries.key_stride, queries.key_stride, count, out, out, queries.stride,
            queries.depth);
  }
  for (int m = 0; m < M; ++m) {
    const float whole = rows[m].sum > 0.0f ? 1.0f / rows[m].sum : 0.0f;
    for (int64_t d = 0; d < queries.depth; ++d) out[m * queries.stride + d] *= whole;
  }
}

void attend(const Queries& queries) {
  constexpr int M = Lanes::positions;
  int64_t i = 0;
  for (; i + M <= queries.count; i += M) attend_rows<M>(queries, i);
  switch (queries.count - i) {
    case 3: return attend_rows<3>(queries, i);
    case 2: return attend_rows<2>(queries, i);
    case 1: return attend_rows<1>(queries, i);
  }
}

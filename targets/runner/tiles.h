// Two small matrix products, for the `Lanes` of the namespace that includes this. It is included once per instruction
// set, so it has no include guard; templates, and not lambdas, because only functions inherit an instruction set.
//
// Every result is one chain of additions whose order depends on the lengths alone. So a position has the same bits
// whichever tile, block or thread computes it.

/// One position reads every row once, from memory: how many bytes ahead of use to ask for them.
constexpr int ahead = 512;

/// h[m·ldh + n] = Σ_k x[m·ldx + k] · rows[n·ldr + k], for m < M, n < N ≤ 4 and k < length.
template <int M, int N, typename T>
CALORA_INLINE void dots_tile(
    const float* x, int64_t ldx, const T* rows, int64_t ldr, int64_t length, float* h, int64_t ldh) {
  typename Lanes::V sums[M][4];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 4; ++n) sums[m][n] = Lanes::set(0.0f);
  int64_t k = 0;
  for (; k + Lanes::width <= length; k += Lanes::width) {
    typename Lanes::V row[N];
    for (int n = 0; n < N; ++n) {
      row[n] = Lanes::load(rows + n * ldr + k);
      if (M == 1) __builtin_prefetch(rows + (n + 4) * ldr + k); // what the next tile reads
    }
    for (int m = 0; m < M; ++m) {
      const typename Lanes::V value = Lanes::load(x + m * ldx + k);
      for (int n = 0; n < N; ++n) sums[m][n] = Lanes::fma(value, row[n], sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    float sum[4];
    Lanes::sum4(sums[m], sum);
    for (int n = 0; n < N; ++n) {
      for (int64_t i = k; i < length; ++i) sum[n] += x[m * ldx + i] * float(rows[n * ldr + i]);
      h[m * ldh + n] = sum[n];
    }
  }
}

/// The same for any number of rows.
template <int M, typename T>
CALORA_INLINE void dots(
    const float* x, int64_t ldx, const T* rows, int64_t ldr, int64_t length, int64_t count, float* h, int64_t ldh) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) dots_tile<M, 4>(x, ldx, rows + n * ldr, ldr, length, h + n, ldh);
  for (; n < count; ++n) dots_tile<M, 1>(x, ldx, rows + n * ldr, ldr, length, h + n, ldh);
}

/// out[m·ldo + c] = from[m·ldo + c] + Σ_n h[m·ldh + n] · rows[n·ldr + c], for m < M and c < C · width.
template <int M, int C, typename T>
CALORA_INLINE void sums_tile(const float* h, int64_t ldh, const T* rows, int64_t ldr, int64_t count, const float* from,
                             float* out, int64_t ldo) {
  typename Lanes::V sums[M][C];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) sums[m][c] = Lanes::load(from + m * ldo + c * Lanes::width);
  for (int64_t n = 0; n < count; ++n) {
    typename Lanes::V row[C];
    for (int c = 0; c < C; ++c) {
      row[c] = Lanes::load(rows + n * ldr + c * Lanes::width);
      if (M == 1) __builtin_prefetch(rows + n * ldr + c * Lanes::width + ahead / sizeof(T));
    }
    for (int m = 0; m < M; ++m) {
      const typename Lanes::V value = Lanes::set(h[m * ldh + n]);
      for (int c = 0; c < C; ++c) sums[m][c] = Lanes::fma(value, row[c], sums[m][c]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) Lanes::store(out + m * ldo + c * Lanes::width, sums[m][c]);
}

/// The same for any number of columns; out may be `from`.
template <int M, typename T>
CALORA_INLINE void sums(const float* h, int64_t ldh, const T* rows, int64_t ldr, int64_t count, const float* from,
                        float* out, int64_t ldo, int64_t columns) {
  int64_t c = 0;
  for (; c + 4 * Lanes::width <= columns; c += 4 * Lanes::width)
    sums_tile<M, 4>(h, ldh, rows + c, ldr, count, from + c, out + c, ldo);
  for (; c + Lanes::width <= columns; c += Lanes::width)
    sums_tile<M, 1>(h, ldh, rows + c, ldr, count, from + c, out + c, ldo);
  for (; c < columns; ++c)
    for (int m = 0; m < M; ++m) {
      float sum = from[m * ldo + c];
      for (int64_t n = 0; n < count; ++n) sum += h[m * ldh + n] * float(rows[n * ldr + c]);
      out[m * ldo + c] = sum;
    }
}

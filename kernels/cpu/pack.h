// From tensors of any strides and dtype to what the products read: rows of floats, and panels.

// One (rows, columns) matrix of a tensor.
struct Matrix {
  char* data;
  int64_t dtype, first, row, column;  // offset of element (0, 0) and strides
};

INLINE Matrix matrix(const Tensor& tensor, int64_t batch, int64_t head) {
  return {tensor.data, tensor.dtype, batch * tensor.stride[0] + head * tensor.stride[1], tensor.stride[2],
          tensor.stride[3]};
}

// Whether each head has a table of its own: a shared one is handed over with stride 0.
INLINE bool differs_by_head(const Tensor& table) { return table.data && table.stride[1] != 0; }

// An element of a float32 tensor (B, H, L), such as the log-sum-exp.
INLINE float& element(const Tensor& tensor, int64_t batch, int64_t head, int64_t row) {
  return ((float*)tensor.data)[batch * tensor.stride[0] + head * tensor.stride[1] + row * tensor.stride[2]];
}

INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
INLINE int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

INLINE void fill(float* to, float value, int64_t count) {
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) store(to + done, splat(value));
  for (; done < count; ++done) to[done] = value;
}

INLINE void copy(float* to, const float* from, int64_t count) {
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) store(to + done, load(from + done));
  for (; done < count; ++done) to[done] = from[done];
}

INLINE void scale_row(float* row, float factor, int64_t count) {
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) store(row + done, load(row + done) * factor);
  for (; done < count; ++done) row[done] *= factor;
}

// to[...] += factor * from[...]
INLINE void add_scaled(float* to, const float* from, float factor, int64_t count) {
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) store(to + done, load(to + done) + load(from + done) * factor);
  for (; done < count; ++done) to[done] += factor * from[done];
}

INLINE void read_row(const Matrix& from, int64_t row, int64_t count, float* to) {
  read_row(from.data, from.dtype, from.first + row * from.row, from.column, count, to);
}

INLINE void write_row(const Matrix& to, int64_t row, int64_t count, const float* from, float factor) {
  write_row(to.data, to.dtype, to.first + row * to.row, to.column, count, from, factor);
}

// Row `row` of the matrix at to[0 ... count), zeros from there to `padded`.
INLINE void read_padded(const Matrix& from, int64_t row, int64_t count, int64_t padded, float* to) {
  read_row(from, row, count, to);
  for (int64_t column = count; column < padded; ++column) to[column] = 0.0f;
}

// Whether products can read the matrix's rows where they are, as Right{data, row stride, 16}: whole panels of floats,
// and not so far apart that they compete for the same few sets of the cache.
INLINE bool readable_in_place(const Matrix& m, int64_t rows, int64_t size) {
  return m.dtype == kFloat32 && m.column == 1 && size % kPanel == 0 && m.row >= size &&
         (m.row <= 2 * size || rows <= 32);
}

// to[c][r] = from[r][c] for 16 rows, `stride` apart, of kWidth elements; those of the result are `to_stride` apart.
INLINE void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of each quarter, for rows i ... i + 3
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512 low02 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), low13 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xDD);
    const __m512 high02 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88),
                 high13 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(low02, high02, 0x88));
    _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(low13, high13, 0x88));
    _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(low02, high02, 0xDD));
    _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(low13, high13, 0xDD));
  }
#elif defined(__AVX2__)
  for (int half = 0; half < 16; half += 8) {
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + (half + i) * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 4; ++c) {
      _mm256_storeu_ps(to + c * to_stride + half, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
      _mm256_storeu_ps(to + (4 + c) * to_stride + half, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
    }
  }
#else
  for (int c = 0; c < kWidth; ++c)
    for (int r = 0; r < 16; ++r) to[c * to_stride + r] = from[r * stride + c];
#endif
}

// What becomes panels: rows of a matrix times `factor`, and below them (as one more step of k) a single column times
// `bias_factor`.
struct PanelSource {
  Matrix matrix;  // no data: there is only the bias
  int64_t rows, size;
  float factor = 1.0f;
  bool reversed = false;     // the last row first
  bool repeat_last = false;  // beyond the last row copies of it, instead of zeros
  Matrix bias = {};          // no data: none
  float bias_factor = 0.0f;

  int64_t depth() const { return (matrix.data ? size : 0) + (bias.data ? 1 : 0); }
  int64_t panels() const { return panels_of(rows); }
  int64_t floats() const { return panels() * kPanel * depth(); }
};

// Panel `index` of the source: to[step * 16 + c] = element `step` of row 16 * index + c. `scratch` holds 16 rows of
// round_up(size, 16).
static void pack_panel(const PanelSource& source, int64_t index, float* to, float* scratch) {
  const int64_t first = index * kPanel, depth = source.depth(), size = source.matrix.data ? source.size : 0;
  const int64_t whole = size / kWidth * kWidth;
  const Matrix& m = source.matrix;
  const bool direct = m.dtype == kFloat32 && m.column == 1 && first + kPanel <= source.rows;
  const float* rows = scratch;
  int64_t stride = round_up(source.size, kPanel);
  if (size > 0) {
    if (direct) {
      stride = source.reversed ? -m.row : m.row;
      rows = (const float*)m.data + m.first + (source.reversed ? source.rows - 1 - first : first) * m.row;
    } else {
      for (int64_t r = 0; r < kPanel; ++r) {
        int64_t row = first + r;
        if (row >= source.rows && !source.repeat_last) {
          fill(scratch + r * stride, 0.0f, size);
        } else {
          row = least(row, source.rows - 1);
          read_padded(m, source.reversed ? source.rows - 1 - row : row, size, size, scratch + r * stride);
        }
      }
    }
    for (int64_t column = 0; column < whole; column += kWidth)
      transpose(rows + column, stride, to + column * kPanel, kPanel);
    for (int64_t column = whole; column < size; ++column)
      for (int64_t r = 0; r < kPanel; ++r) to[column * kPanel + r] = rows[r * stride + column];
    if (source.factor != 1.0f) scale_row(to, source.factor, size * kPanel);
  }
  if (source.bias.data) {
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t row = least(first + r, source.rows - 1);
      const Matrix& bias = source.bias;
      const float value =
          read_element(bias.data, bias.dtype, bias.first + (source.reversed ? source.rows - 1 - row : row) * bias.row);
      to[(depth - 1) * kPanel + r] = value * source.bias_factor;
    }
  }
}

// Products of tiles: C (rows, columns) = or += A (rows, k) B (k, columns), where the columns come in panels of 16.
//
// One register tile serves every product of attention, because A and C are addressed by two free strides:
//   skew on store    C's row stride + 1: a product with one column per *distance* lands with one column per *key*
//                    (kernels/README.md has a drawing);
//   unskew on read   A's row stride + 1: the same in reverse, for gradients of the table's side;
//   transposition    A's row stride 1 and k stride = its leading dimension.
// Measured on one AVX-512 core (k = 64 to 512): 175 to 185 GFLOP/s for all of them, the machine's own peak being 190.

constexpr int kPanel = 16;              // columns of a panel
constexpr int kVecs = kPanel / kWidth;  // vectors of a panel's row
constexpr int kRows = 6;                // rows of a register tile
// Panels of a register tile: 24 accumulators of 32 registers, or 12 of 16.
constexpr int kPanels = kWidth == 16 ? 4 : 1;

// Where A, B and C lie, in floats.
struct Left {
  const float* data;
  int64_t row, k;  // strides

  Left from(int64_t first_row) const { return {data + first_row * row, row, k}; }
};
struct Right {
  const float* data;
  int64_t k, panel;  // strides; the 16 columns of a panel are contiguous

  Right from(int64_t first_step) const { return {data + first_step * k, k, panel}; }
};
struct Result {
  float* data;
  int64_t row;  // stride

  Result from(int64_t first_row) const { return {data + first_row * row, row}; }
};

template <int Rows, int Panels, bool Accumulate>
static void tile(const Left& a, const Right& b, int64_t k, const Result& c) {
  constexpr int kColumns = Panels * kVecs;
  const float *left = a.data, *right = b.data;
  const int64_t left_row = a.row, left_k = a.k, right_k = b.k, right_panel = b.panel, result_row = c.row;
  float* result = c.data;
  Vec sum[Rows][kColumns];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      sum[row][v] = (Vec){};
      __builtin_prefetch(result + row * result_row + v * kWidth, 1);  // needed only at the end
    }
  for (int64_t step = 0; step < k; ++step, left += left_k, right += right_k) {
    Vec column[kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) column[v] = load(right + v / kVecs * right_panel + v % kVecs * kWidth);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const Vec scalar = splat(left[row * left_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) sum[row][v] += scalar * column[v];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      float* to = result + row * result_row + v * kWidth;
      store(to, Accumulate ? load(to) + sum[row][v] : sum[row][v]);
    }
}

template <int Panels, bool Accumulate>
static void tile_of_rows(int rows, const Left& a, const Right& b, int64_t k, const Result& c) {
  switch (rows) {
    case 1:
      return tile<1, Panels, Accumulate>(a, b, k, c);
    case 2:
      return tile<2, Panels, Accumulate>(a, b, k, c);
    case 3:
      return tile<3, Panels, Accumulate>(a, b, k, c);
    case 4:
      return tile<4, Panels, Accumulate>(a, b, k, c);
    case 5:
      return tile<5, Panels, Accumulate>(a, b, k, c);
    default:
      return tile<6, Panels, Accumulate>(a, b, k, c);
  }
}

// Up to kRows rows and any number of panels.
template <bool Accumulate>
static void multiply(int rows, int64_t panels, Left a, Right b, int64_t k, Result c) {
  if (panels <= 0) return;
  for (; panels >= kPanels; panels -= kPanels) {
    tile_of_rows<kPanels, Accumulate>(rows, a, b, k, c);
    b.data += kPanels * b.panel;
    c.data += kPanels * kPanel;
  }
  if constexpr (kPanels == 4) {
    switch (panels) {
      case 1:
        return tile_of_rows<1, Accumulate>(rows, a, b, k, c);
      case 2:
        return tile_of_rows<2, Accumulate>(rows, a, b, k, c);
      case 3:
        return tile_of_rows<3, Accumulate>(rows, a, b, k, c);
    }
  }
}

// relative.h in bfloat16: a table's products with a group's rows or with a tile, and the way back.

// Rows times a table's edge rows, where some distance of these columns lies beyond them.
static void edge_products_amx(const Skew& skew, const Range& columns, const HalfSource& table, const HalfLeft& rows,
                              const Edges& edges, const HalfScratch& scratch) {
  auto products = [&](int64_t table_row, float* edge) {
    read_halves(table, table_row, scratch.rows, scratch.row);
    for (int64_t row = 0; row < skew.rows; ++row) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t column = 0; column < table.padded; column += kTileDepth)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(rows.data + row * rows.row + column),
                               (__m512bh)_mm512_loadu_si512(scratch.rows + column));
      edge[row] = sum_lanes((Vec)sum);
    }
  };
  if (skew.beyond_left(columns)) products(0, edges.left);
  if (skew.beyond_right(columns)) products(table.rows - 1, edges.right);
}

// What a group's rows are multiplied with: `content` with a tile's columns, from its first key on, and `position` with
// the rows of a table (null: there is none); both in panels, `depth` elements deep.
struct GroupFactors {
  HalfLeft content, position;
  const Half *columns, *table;
  int64_t depth;
  Edges edges;  // of the position product
};

// result[row of the group][column]
static void group_products(const Skew& skew, const Range& columns, const GroupFactors& of, const Result& result) {
  const int64_t steps = of.depth / kTileDepth, panel = kPanel * of.depth,
                count = (columns.last - columns.first) / kPanel;
  const HalfRight right = {of.columns + columns.first * of.depth, panel};
  const Result target = {result.data + columns.first, result.row};
  const int rows = (int)skew.rows;
  if (!of.table) return amx_multiply<false>(rows, count, of.content, right, steps, target);
  const Range panels = skew.panels(columns);
  amx_multiply<false>(rows, panels.last - panels.first, of.position, {of.table + panels.first * panel, panel}, steps,
                      {result.data + panels.first * kPanel + skew.shift, result.row + 1});
  relative_edges(skew, columns, panels, of.edges, result);
  amx_multiply<true>(rows, count, of.content, right, steps, target);
}

// result[row] += the tile's row in the columns that are seen, times the table's rows of their distances, where these
// are not beyond its edges. The tile is zero beside what is seen.
static void relative_values_amx(const Skew& skew, const Range& seen, const HalfLeft& tile, const HalfPairs& table,
                                const Result& result) {
  const Range touched = skew.touched(seen);
  const int64_t lowest = touched.first / 2 * 2;  // whole pairs
  if (lowest < touched.last)
    amx_multiply<true>((int)skew.rows, result.row / kPanel, {tile.data + lowest + skew.shift, tile.row + 1},
                       table.from(lowest), (touched.last - 1 - lowest) / kTileDepth + 1, result);
}

// A tile's rows, `stride` elements apart with kWideSlack zeros on both sides, and pairs of them (null: not needed), the
// second taken one column further right.
struct SkewedRows {
  Half* rows;
  uint32_t* pairs;
  int64_t stride;

  static SkewedRows carve(Carver& carver, int64_t rows, int64_t columns, bool pairs) {
    const int64_t stride = columns + 2 * kWideSlack;
    return {carver.halves((rows + kGroupRows) * stride),
            pairs ? (uint32_t*)carver.floats((rows / 2 + kTileRows) * stride) : nullptr, stride};
  }
  Half* row(int64_t index) const { return rows + index * stride + kWideSlack; }
  uint32_t* pair(int64_t index) const { return pairs + index * stride + kWideSlack; }

  // Columns [first, last) of a row, of a pair.
  void zero_row(int64_t index, int64_t first, int64_t last) const { zero_halves(row(index) + first, last - first); }
  void zero_pair(int64_t index, int64_t first, int64_t last) const {
    zero_halves((Half*)(pair(index) + first), 2 * (last - first));
  }

  // A pair of rows that are zero outside of these columns.
  void skew_pair(int64_t index, const Range& columns) const {
    const Half *first_row = row(2 * index), *second_row = row(2 * index + 1);
    // The second row's first column stands one column before the first row's.
    const int64_t begin = columns.first - kPanel;
    for (int64_t column = begin; column < columns.last; column += kPanel) {
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first_row + column)));
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second_row + column + 1)));
      _mm512_storeu_si512(pair(index) + column, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
    zero_pair(index, -kWideSlack, begin);
    zero_pair(index, columns.last, stride - kWideSlack);
  }
};

// What a table's gradient is a product of: rows transposed, `stride` apart, and tiles of `rows` whole groups, of which
// there are as many as it takes to hold what they stand for.
struct TableProduct {
  const Half* rows_t;
  int64_t stride, size;
  const SkewedRows* tiles;
  int count;
  Range rows, columns;
};

// gradient (size, table rows), transposed, += rows^T x skewed pairs.
static void table_gradient_amx(const Skew& skew, const TableProduct& of, const Result& gradient) {
  const int64_t shift = skew.shift;
  const int64_t lowest = most<int64_t>(of.columns.first - shift - (of.rows.last - 1), 0),
                highest = least(of.columns.last - 1 - shift - of.rows.first, skew.table.rows - 1);
  for (int64_t r = lowest / kPanel * kPanel; r <= highest; r += 2 * kPanel) {
    // Groups of rows with some column in these two panels.
    int64_t begin = of.rows.first, end = of.rows.last;
    while (begin < end && r + 2 * kPanel - 1 + shift + begin + kGroupRows - 1 < of.columns.first) begin += kGroupRows;
    while (begin < end && r + shift + end - kGroupRows >= of.columns.last) end -= kGroupRows;
    if (begin == end) continue;
    const int64_t panels = least<int64_t>(2, panels_of(highest + 1 - r));
    for (int part = 0; part < of.count; ++part) {
      const SkewedRows& tile = of.tiles[part];
      const HalfRight right = {(const Half*)(tile.pair(begin / 2) + r + shift + begin), 2 * kPanel,
                               2 * (tile.stride + 2), 2 * kTileRows * (tile.stride + 2)};
      for (int64_t d = 0; d < of.size; d += kGroupRows)
        amx_multiply<true>((int)least(kGroupRows, of.size - d), panels, {of.rows_t + d * of.stride + begin, of.stride},
                           right, (end - begin) / kTileDepth, {gradient.data + d * gradient.row + r, gradient.row});
    }
  }
}

// What adds to the edges' gradients: rows, of which each has a sum of what lies beyond.
struct EdgeShare {
  HalfLeft rows;
  int64_t count;
  Edges beyond;
  Result own;  // the rows' own gradients (null: they have their share)
};

INLINE void clear_edges(const Edges& edges, int64_t count) {
  fill(edges.left, 0.0f, count);
  fill(edges.right, 0.0f, count);
}

// `edge`: a row of floats for a moment.
static void add_edges_amx(const HalfSource& table, const EdgeShare& of, const Edges& gradients, float* edge) {
  for (int side = 0; side < 2; ++side) {
    const float* beyond = side == 0 ? of.beyond.left : of.beyond.right;
    float* gradient = side == 0 ? gradients.left : gradients.right;
    read_row(table.first_to_last(), side == 0 ? 0 : table.rows - 1, table.size, edge);
    for (int64_t row = 0; row < of.count; ++row) {
      if (beyond[row] == 0.0f) continue;  // whatever it would be multiplied with
      const Half* factors = of.rows.data + row * of.rows.row;
      for (int64_t column = 0; gradient && column < table.size; ++column)
        gradient[column] += beyond[row] * from_bfloat16(factors[column]);
      if (of.own.data) add_scaled(of.own.data + row * of.own.row, edge, beyond[row], table.size);
    }
  }
}

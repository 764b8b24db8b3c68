// The relative terms: products of rows with a table's rows, one per distance, moved to and from one per key for free.
// kernels/README.md explains the trick; here is where a table's rows meet a tile's columns.
//
// The rel_q term is the same with keys for rows and queries for columns, and the table reversed.

// Floats on both sides of a tile's rows, which panels that begin or end outside may write to: a panel and a group's
// rows.
#if defined(__AMX_BF16__)
constexpr int64_t kSlack = 48;
#else
constexpr int64_t kSlack = 32;
#endif

// A table's rows in the two forms that products read. Row r is distance r - left.
struct Table {
  const float* panels;   // as B of products over the head size: (panel, depth, 16)
  const float* natural;  // as B of products over the rows: (row, natural_stride)
  int64_t natural_stride;
  int64_t depth, rows, left;
  bool nonfinite;  // the natural form has zeros for some numbers that are not finite
};

// A table laid over rows at consecutive positions (a group's, or a tile's): in row m, the table's row r belongs to
// column r + m + shift. Columns beyond the table belong to its edge rows.
struct Skew {
  const Table& table;
  int64_t rows, shift;

  // Panels of the table's rows that products with these columns need; none where all columns lie beyond an edge.
  Range panels(const Range& columns) const {
    const int64_t lowest = columns.first - shift - (rows - 1), highest = columns.last - 1 - shift;
    if (highest < 0 || lowest >= table.rows) return {0, 0};
    return {most<int64_t>(lowest, 0) / kPanel, least(highest, table.rows - 1) / kPanel + 1};
  }
  // The table's rows that these columns touch.
  Range touched(const Range& columns) const {
    return {most<int64_t>(columns.first - shift - (rows - 1), 0), least(columns.last - shift, table.rows)};
  }
  // Row m's columns that have a row of the table of their own. Those before belong to its left edge, those after to its
  // right one.
  Range within(int64_t m, const Range& columns) const {
    const int64_t first = clamp(shift + m, columns.first, columns.last);
    return {first, clamp(table.rows + shift + m, first, columns.last)};
  }
  bool beyond_left(const Range& columns) const { return columns.first < shift + rows - 1; }
  bool beyond_right(const Range& columns) const { return columns.last > shift + table.rows; }
};

// `rows` rows from `position` on, and columns of which column 0 is key `first_key`.
INLINE Skew lay_over(const Table& table, int64_t rows, int64_t position, int64_t first_key) {
  return {table, rows, position - table.left - first_key};
}

// Something for each of the table's two edges: mostly, the products of a block's rows with the edge row.
struct Edges {
  float *left, *right;

  Edges from(int64_t row) const { return {left + row, right + row}; }
};

// A times one row of the table, for each of `rows` rows. `scratch` holds 6 x 16 floats.
static void edge_products(const Table& table, int64_t table_row, int64_t rows, const Left& a, float* edge,
                          float* scratch) {
  const float* panel = table.panels + table_row / kPanel * kPanel * table.depth;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int count = (int)least<int64_t>(kRows, rows - row);
    multiply<false>(count, 1, a.from(row), {panel, kPanel, 0}, table.depth, {scratch, kPanel});
    for (int r = 0; r < count; ++r) edge[row + r] = scratch[r * kPanel + table_row % kPanel];
  }
}

// The edges that some distance of these columns lies beyond.
static void edge_products(const Skew& skew, const Range& columns, const Left& a, const Edges& edges, float* scratch) {
  if (skew.beyond_left(columns)) edge_products(skew.table, 0, skew.rows, a, edges.left, scratch);
  if (skew.beyond_right(columns)) edge_products(skew.table, skew.table.rows - 1, skew.rows, a, edges.right, scratch);
}

// Some panels of a group's products with the table: stored one column further right in each row.
INLINE void relative_product(const Skew& skew, const Range& panels, const Left& a, const Result& scores) {
  const int64_t panel = kPanel * skew.table.depth;
  multiply<false>((int)skew.rows, panels.last - panels.first, a,
                  {skew.table.panels + panels.first * panel, kPanel, panel}, skew.table.depth,
                  {scores.data + panels.first * kPanel + skew.shift, scores.row + 1});
}

// The columns of a group that its panels leave out: products with the table's edges, given for each row.
static void relative_edges(const Skew& skew, const Range& columns, const Range& panels, const Edges& edges,
                           const Result& scores) {
  for (int64_t row = 0; row < skew.rows; ++row) {
    float* to = scores.data + row * scores.row;
    const int64_t left_stop = clamp(skew.shift + row, columns.first, columns.last);
    // Not where the table ends: beyond its last row the last panel holds copies of it.
    const int64_t right_start = clamp(panels.last * kPanel + skew.shift + row, columns.first, columns.last);
    if (left_stop > columns.first) fill(to + columns.first, edges.left[row], left_stop - columns.first);
    if (right_start < columns.last) fill(to + right_start, edges.right[row], columns.last - right_start);
  }
}

// One group's result += the tile times some rows of the table: sum over the columns of tile[m][column] * table[row of
// (m, column)]. The tile's columns are zero for 5 elements beyond what is seen.
INLINE void relative_values(const Skew& skew, const Range& table_rows, const Result& tile, int64_t size,
                            const Result& result) {
  const Table& table = skew.table;
  if (!table_rows.empty())
    multiply<true>((int)skew.rows, size / kPanel, {tile.data + table_rows.first + skew.shift, tile.row + 1, 1},
                   {table.natural + table_rows.first * table.natural_stride, table.natural_stride, kPanel},
                   table_rows.last - table_rows.first, result);
}

// The same for the columns beyond the table's edges.
static void edge_values(const Skew& skew, const Range& columns, const Result& tile, int64_t size,
                        const Result& result) {
  const Table& table = skew.table;
  const float* last_row = table.natural + (table.rows - 1) * table.natural_stride;
  for (int64_t row = 0; row < skew.rows; ++row) {
    const Range within = skew.within(row, columns);
    const float* weights = tile.data + row * tile.row;
    float* to = result.data + row * result.row;
    if (columns.first < within.first)
      add_scaled(to, table.natural, sum_row(weights + columns.first, within.first - columns.first), size);
    if (within.last < columns.last)
      add_scaled(to, last_row, sum_row(weights + within.last, columns.last - within.last), size);
  }
}

// Columns that each row of a tile sees; no bound falls from row to row.
struct Seen {
  const int32_t *first, *last;
  const int32_t*
      lowest;  // the least first[row] - row of this row and those before; null: its own, bounds grow by at most 1
};

// The table's gradient += sum over the tile's rows of tile[m][column of (m, r)] * right[m], for all rows r of the
// table. The tile is zero where nothing is seen.
static void relative_table_gradient(const Skew& skew, const Seen& seen, const Result& tile, const Right& right,
                                    int64_t size, const Result& gradient) {
  const int64_t rows = skew.rows, shift = skew.shift, table_rows = skew.table.rows;
  int64_t lowest = table_rows, highest = -1;  // table rows that any of the tile's rows touches
  for (int64_t row = 0; row < rows; ++row) {
    const Range columns = {seen.first[row], seen.last[row]};
    if (columns.empty()) continue;
    lowest = least(lowest, columns.first - shift - row);
    highest = most(highest, columns.last - 1 - shift - row);
    const Range within = skew.within(row, columns);
    const float* weights = tile.data + row * tile.row;
    const float* added = right.data + row * right.k;
    if (columns.first < within.first)
      add_scaled(gradient.data, added, sum_row(weights + columns.first, within.first - columns.first), size);
    if (within.last < columns.last)
      add_scaled(gradient.data + (table_rows - 1) * gradient.row, added,
                 sum_row(weights + within.last, columns.last - within.last), size);
  }
  lowest = most<int64_t>(lowest, 0);
  highest = least(highest, table_rows - 1);
  // The tile's rows [begin, end) that a group of table rows touches move down as the distance grows.
  int64_t begin = rows, end = rows;
  for (int64_t r = lowest; r <= highest; r += kRows) {
    const int count = (int)least<int64_t>(kRows, highest + 1 - r);
    while (begin > 0 &&
           r + count - 1 + shift >= (seen.lowest ? seen.lowest[begin - 1] : seen.first[begin - 1] - (begin - 1)))
      --begin;
    while (end > 0 && r + shift + end - 1 >= seen.last[end - 1]) --end;
    if (begin < end)
      multiply<true>(count, size / kPanel, {tile.data + begin * (tile.row + 1) + r + shift, 1, tile.row + 1},
                     right.from(begin), end - begin, gradient.from(r));
  }
}

// The relative terms: products of rows with a table's rows, one per distance, moved to and from one per key for free.
//
// A tile has `rows` rows, of which row m stands at position + m, and columns of which column 0 is key `first_key`. In row m, row r of a
// table (distance r - left) belongs to column r - left + position + m - first_key. Rows of tables beyond either edge are the edge's.
//
// The rel_q term is the same with keys for rows and queries for columns, and the table reversed.

// Floats on both sides of a tile's rows, which panels that begin or end outside may write to: a panel and a group's rows.
#if defined(__AMX_BF16__)
constexpr int64_t kSlack = 48;
#else
constexpr int64_t kSlack = 32;
#endif

struct Table {
  const float* panels;   // as B of products over the head size: (panel, depth, 16)
  const float* natural;  // as B of products over the rows: (row, natural_stride)
  int64_t natural_stride;
  int64_t depth, rows, left;
};

// One group's part of a table's product: panels [first_panel, last_panel), and whether the whole group lies beyond an edge.
struct Span {
  int64_t first_panel, last_panel;
  int beyond;  // -1: to the left of the table, 1: to the right
};

INLINE Span table_span(int rows, int64_t position, int64_t first_key, const Range& columns, const Table& table) {
  const int64_t shift = position - table.left - first_key;  // column of the table's row 0 in the group's row 0
  const int64_t lowest = columns.first - shift - (rows - 1), highest = columns.last - 1 - shift;
  if (highest < 0) return {0, 0, -1};
  if (lowest >= table.rows) return {0, 0, 1};
  return {most<int64_t>(lowest, 0) / kPanel, least(highest, table.rows - 1) / kPanel + 1, 0};
}

// Panels [first, last) of a span: A times the table, stored one column further right in each row.
INLINE void relative_product(int rows, int64_t position, int64_t first_key, int64_t first, int64_t last, const Left& a, const Table& table,
                             const Result& scores) {
  const int64_t panel = kPanel * table.depth;
  multiply<false>(rows, last - first, a, {table.panels + first * panel, kPanel, panel}, table.depth,
                  {scores.data + first * kPanel + position - table.left - first_key, scores.row + 1});
}

// The columns of a group that its span leaves out: scores of the table's edges, given for each row.
static void relative_edges(int rows, int64_t position, int64_t first_key, const Range& columns, const Span& span, const Table& table,
                           const float* left_edge, const float* right_edge, const Result& scores) {
  const int64_t shift = position - table.left - first_key;
  for (int row = 0; row < rows; ++row) {
    float* to = scores.data + row * scores.row;
    const int64_t left_stop = span.beyond == 0  ? clamp(shift + row, columns.first, columns.last)
                              : span.beyond < 0 ? columns.last
                                                : columns.first;
    const int64_t right_start = span.beyond == 0 ? clamp(span.last_panel * kPanel + shift + row, columns.first, columns.last) : left_stop;
    if (left_stop > columns.first) fill(to + columns.first, left_edge[row], left_stop - columns.first);
    if (right_start < columns.last) fill(to + right_start, right_edge[row], columns.last - right_start);
  }
}

// Whether some distance of the rows [position, position + rows) to the keys lies beyond an edge of the table.
INLINE bool beyond_left(const Table& table, int64_t position, int64_t rows, const Range& keys) {
  return keys.first - (position + rows - 1) < -table.left;
}
INLINE bool beyond_right(const Table& table, int64_t position, const Range& keys) {
  return keys.last - 1 - position > table.rows - 1 - table.left;
}

// A times one row of the table, for each row of a block. `scratch` holds 6 x 16 floats.
static void edge_scores(int64_t rows, const Left& a, const Table& table, int64_t table_row, float* edge, float* scratch) {
  const float* panel = table.panels + table_row / kPanel * kPanel * table.depth;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int count = (int)least<int64_t>(kRows, rows - row);
    multiply<false>(count, 1, {a.data + row * a.row, a.row, a.k}, {panel, kPanel, 0}, table.depth, {scratch, kPanel});
    for (int r = 0; r < count; ++r) edge[row + r] = scratch[r * kPanel + table_row % kPanel];
  }
}

// Rows of the table that a group's columns touch.
INLINE Range touched_rows(int rows, int64_t position, int64_t first_key, const Range& columns, const Table& table) {
  const int64_t shift = position - table.left - first_key;
  return {most<int64_t>(columns.first - shift - (rows - 1), 0), least(columns.last - shift, table.rows)};
}

// One group's result += the tile times some rows of the table: sum over the columns of tile[m][column] * table[row of (m, column)],
// `panels` wide. The tile's columns are zero for 5 elements beyond what is seen.
INLINE void relative_values(int rows, int64_t position, int64_t first_key, const Range& table_rows, const Result& tile, const Table& table,
                            int64_t panels, const Result& result) {
  const int64_t shift = position - table.left - first_key;
  if (!table_rows.empty())
    multiply<true>(rows, panels, {tile.data + table_rows.first + shift, tile.row + 1, 1},
                   {table.natural + table_rows.first * table.natural_stride, table.natural_stride, kPanel},
                   table_rows.last - table_rows.first, result);
}

// The same for the columns beyond the table's edges.
static void edge_values(int rows, int64_t position, int64_t first_key, const Range& columns, const Result& tile, const Table& table,
                        int64_t size, const Result& result) {
  const int64_t shift = position - table.left - first_key;
  for (int row = 0; row < rows; ++row) {
    const int64_t left_stop = least(shift + row, columns.last), right_start = most(table.rows + shift + row, columns.first);
    const float* weights = tile.data + row * tile.row;
    if (left_stop > columns.first)
      add_scaled(result.data + row * result.row, table.natural, sum_row(weights + columns.first, left_stop - columns.first), size);
    if (right_start < columns.last)
      add_scaled(result.data + row * result.row, table.natural + (table.rows - 1) * table.natural_stride,
                 sum_row(weights + right_start, columns.last - right_start), size);
  }
}

// The table's gradient += sum over the tile's rows of tile[m][column of (m, r)] * right[m], for all rows r of the table.
// The tile is zero outside columns [first[m], last[m]) of row m, both of which grow by at most 1 from row to row.
static void relative_table_gradient(int64_t rows, int64_t position, int64_t first_key, const int32_t* first, const int32_t* last,
                                    const Result& tile, const Right& right, const Table& table, int64_t panels, int64_t size,
                                    const Result& gradient) {
  const int64_t shift = position - table.left - first_key;
  int64_t lowest = table.rows, highest = -1;  // table rows that any of the tile's rows touches
  for (int64_t row = 0; row < rows; ++row) {
    if (first[row] >= last[row]) continue;
    lowest = least(lowest, first[row] - shift - row);
    highest = most(highest, last[row] - 1 - shift - row);
    const int64_t left_stop = least<int64_t>(shift + row, last[row]), right_start = most<int64_t>(table.rows + shift + row, first[row]);
    const float* weights = tile.data + row * tile.row;
    const float* added = right.data + row * right.k;
    if (left_stop > first[row]) add_scaled(gradient.data, added, sum_row(weights + first[row], left_stop - first[row]), size);
    if (right_start < last[row])
      add_scaled(gradient.data + (table.rows - 1) * gradient.row, added, sum_row(weights + right_start, last[row] - right_start), size);
  }
  lowest = most<int64_t>(lowest, 0);
  highest = least(highest, table.rows - 1);
  // The tile's rows [begin, end) that a group of table rows touches move down as the distance grows.
  int64_t begin = rows, end = rows;
  for (int64_t r = lowest; r <= highest; r += kRows) {
    const int count = (int)least<int64_t>(kRows, highest + 1 - r);
    while (begin > 0 && r + count - 1 + shift + begin - 1 >= first[begin - 1]) --begin;
    while (end > 0 && r + shift + end - 1 >= last[end - 1]) --end;
    if (begin < end)
      multiply<true>(count, panels, {tile.data + begin * (tile.row + 1) + r + shift, 1, tile.row + 1},
                     {right.data + begin * right.k, right.k, right.panel}, end - begin, {gradient.data + r * gradient.row, gradient.row});
  }
}

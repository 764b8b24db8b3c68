// A call's sizes, one head's operands, one block of queries, and the scores of a group of its rows: what forward and
// backward share.

constexpr int64_t kBlockRows = 192;         // queries of a block, at most
constexpr int64_t kBlockRowsBackward = 96;  // of which tiles of scores and of their gradients are held
constexpr int64_t kBlockKeysBackward = 256;

// The three tables of a call. rel_bias travels with rel_k: it is one more element of its rows, met by a 1 in the
// queries.
enum TableName { kRelK, kRelQ, kRelV };
constexpr TableName kTables[] = {kRelK, kRelQ, kRelV};

// A call and its sizes. Scores are in units of ln 2 (weights are then powers of two).
struct Problem {
  const Call& call;
  Dropout dropout;
  int64_t size, padded_size;  // of heads, and rounded up to whole panels
  int64_t value_size, padded_value_size;
  int64_t depth, padded_depth;              // of the position product: the head size, and one more for rel_bias
  int64_t ratio;                            // query heads that share a key head
  int64_t block_rows, block_keys, leading;  // of a tile of scores; its rows are `leading` floats apart
  bool position, per_head;                  // there is a rel_k or rel_bias; some table differs by head

  Problem(const Call& c, int64_t rows_of_block, int64_t keys_of_block) : call(c), dropout(make_dropout(c)) {
    size = c.size;
    padded_size = round_up(size, kPanel);
    value_size = c.value_size;
    padded_value_size = round_up(value_size, kPanel);
    depth = (c.rel_k.data ? size : 0) + (c.rel_bias.data ? 1 : 0);
    padded_depth = round_up(depth, kPanel);
    ratio = c.heads / c.key_heads;
    block_rows = least(c.block_queries > 0 ? least(c.block_queries, rows_of_block) : rows_of_block, c.queries);
    block_keys = least(c.block_keys > 0 ? round_up(least(c.block_keys, keys_of_block), kPanel) : keys_of_block,
                       round_up(c.keys, kPanel));
    leading = block_keys + 2 * kSlack;
    if (leading % (2 * kPanel) == 0)
      leading += kPanel;  // an odd number of cache lines: columns are spread over all sets
    position = depth > 0;
    per_head = false;
    for (TableName name : kTables) per_head |= table_per_head(name);
  }

  // Whether the gradient of the position product's queries is summed apart from the content product's: only the biases'
  // gradients differ.
  bool position_apart() const { return call.rel_k.data && (call.grad_pos_bias_u.data || call.grad_pos_bias_v.data); }
  // Whether the position product's rows are the content product's.
  bool position_is_content() const {
    return !position || !(call.rel_bias.data || call.pos_bias_u.data || call.pos_bias_v.data);
  }
  double absolute_scale() const { return call.scale < 0 ? -call.scale : call.scale; }
  int64_t query_blocks() const { return (call.queries + block_rows - 1) / block_rows; }

  bool table_per_head(TableName name) const {
    return differs_by_head(table(name)) || (name == kRelK && differs_by_head(call.rel_bias));
  }
  const Tensor& table(TableName name) const {
    return name == kRelK ? call.rel_k : name == kRelQ ? call.rel_q : call.rel_v;
  }

  PanelSource key_source(int64_t batch, int64_t key_head) const {
    return {matrix(call.key, batch, key_head), call.keys, size};
  }
  PanelSource value_source(int64_t batch, int64_t key_head) const {
    return {matrix(call.value, batch, key_head), call.keys, value_size};
  }
  PanelSource table_source(TableName name, int64_t head) const {
    PanelSource source = {matrix(table(name), 0, head), call.rows, name == kRelV ? value_size : size};
    source.repeat_last = true;  // the columns that the last panel has beyond the table are the right edge's
    if (name == kRelK) {
      source.bias = matrix(call.rel_bias, 0, head);
      source.bias_factor = (float)kLog2E;
    }
    if (name == kRelQ) {
      source.factor = (float)(call.scale * kLog2E);
      source.reversed = true;  // as keys see it, distances run the other way
    }
    return source;
  }
};

// What a query head of a batch element is multiplied with.
struct Head {
  int64_t batch, head;
  Keys keys;
  const float* key_panels;  // (panel of 16 keys, D, 16), from key `first_key` on
  int64_t first_key;
  Right key, value;  // rows of keys and of values; of values from `first_value` on
  int64_t first_value;
  const float* value_panels;
  Table rel_k, rel_q, rel_v;
  const bool* nonfinite;  // backward: of each task of packing (see operands.h), whether some of its keys are
};

// Memory of one thread. Null where a call does not need it.
struct Workspace {
  float *content, *position;  // (q + u), (q + v) of the block's rows, scaled; rows padded to whole panels, zeros
  Edges edges;                // the block's position scores at the edges of the table
  float* scores;              // a block's tile
  // Forward: a tile's keys in panels and rows of values, where each is used only once. Where a tile holds numbers that
  // are not finite: its values, or backward its rows of keys, without these.
  float *keys, *values;
  float* result;           // forward: the block's output, not yet divided
  float *highest, *total;  // per row
  // backward
  float* weights_gradient;  // a block's tile
  float* upstream;          // gradients of the block's output, rows padded
  // Per row, see row_statistics; delta is sum_j w_ij dw_ij less the gradient of the log-sum-exp.
  float *base, *inverse, *delta;
  float* apart;  // 0, or what stands for the base of a row that is kept apart, see find_rows_apart
  float *content_gradient, *position_gradient;
  Edges value_edges;
  float* row;      // one row of a tile: masks
  float* keep;     // one row of a tile: dropout
  float* scratch;  // 16 rows of the widest operand; also one small tile
  // rel_q: keys for rows, queries for columns
  float *key_rows, *by_key, *by_query;
  Edges key_edges;
};

static void carve_scores(const Problem& p, Carver& carver, Workspace& w) {
  w.content = carver.floats(p.block_rows * p.padded_size);
  w.position = p.position_is_content() ? w.content : carver.floats(p.block_rows * p.padded_depth);
  w.edges = {carver.floats(p.block_rows), carver.floats(p.block_rows)};
  w.row = p.call.attn_mask.data ? carver.floats(p.block_keys) : nullptr;
  w.keep = p.dropout.used() ? carver.floats_after(kKeepBefore, p.block_keys + kKeepAfter) : nullptr;
  w.scratch = carver.floats(kPanel * most(p.padded_size, p.padded_value_size) + kRows * kPanel);
  if (p.call.rel_q.data) {
    const int64_t leading = round_up(p.block_rows, kPanel) + 2 * kSlack;
    w.key_rows = carver.floats(p.block_keys * p.padded_size);
    w.key_edges = {carver.floats(p.block_keys), carver.floats(p.block_keys)};
    w.by_key = carver.floats((p.block_keys + kPanel) * leading);
    w.by_query = carver.floats(round_up(p.block_rows, kPanel) * p.leading);
  }
}

// A block of queries: rows [first, first + rows), and the keys that some of them see.
struct Block {
  int64_t first, rows;
  Range keys;
  int64_t position;  // of its first row, for the tables
};

static Block block_of(const Problem& p, const Keys& keys, int64_t index) {
  const int64_t first = index * p.block_rows, rows = least(p.block_rows, p.call.queries - first);
  return {first, rows, window_of(p.call, keys, first, first + rows), table_position(keys, first)};
}

// The block's rows of both products: (q + u) and (q + v), scaled.
static void read_block(const Problem& p, const Head& head, const Block& block, Workspace& w) {
  const Matrix query = matrix(p.call.query, head.batch, head.head);
  const float unit = (float)(p.call.scale * kLog2E);
  const Matrix u = matrix(p.call.pos_bias_u, 0, head.head), v = matrix(p.call.pos_bias_v, 0, head.head);
  float *content_bias = w.scratch, *position_bias = w.scratch + p.padded_size;
  if (u.data) read_row(u, 0, p.size, content_bias);
  if (v.data) read_row(v, 0, p.size, position_bias);
  for (int64_t row = 0; row < block.rows; ++row) {
    float* content = w.content + row * p.padded_size;
    read_padded(query, block.first + row, p.size, p.padded_size, content);
    if (w.position != w.content) {
      float* position = w.position + row * p.padded_depth;
      fill(position, 0.0f, p.padded_depth);
      if (p.call.rel_k.data) {
        copy(position, content, p.size);
        if (v.data) add_scaled(position, position_bias, 1.0f, p.size);
        scale_row(position, unit, p.size);
      }
      if (p.call.rel_bias.data) position[p.depth - 1] = 1.0f;
    }
    if (u.data) add_scaled(content, content_bias, 1.0f, p.size);
    scale_row(content, unit, p.size);
  }
}

// The block's products with the table's edges, where they are needed.
static void find_edges(const Problem& p, const Head& head, const Block& block, const Workspace& w) {
  if (p.position)
    edge_products(lay_over(head.rel_k, block.rows, block.position, 0), block.keys, {w.position, p.padded_depth, 1},
                  w.edges, w.scratch);
}

// The rel_q term of a block of queries and the keys `keys`, whose columns begin at first_key: by_query[row][column].
static void key_scores(const Problem& p, const Head& head, const Block& block, int64_t first_key, Range keys,
                       Workspace& w) {
  const int64_t columns = round_up(block.rows, kPanel), leading = columns + 2 * kSlack, count = keys.last - keys.first;
  const Matrix source = matrix(p.call.key, head.batch, head.head / p.ratio);
  for (int64_t key = 0; key < count; ++key)
    read_padded(source, keys.first + key, p.size, p.padded_size, w.key_rows + key * p.padded_size);
  const Left a = {w.key_rows, p.padded_size, 1};
  edge_products(lay_over(head.rel_q, count, keys.first, block.position), {0, block.rows}, a, w.key_edges, w.scratch);
  float* tile = w.by_key + kSlack;
  for (int64_t key = 0; key < count; key += kRows) {
    const Skew skew = lay_over(head.rel_q, least<int64_t>(kRows, count - key), keys.first + key, block.position);
    const Range panels = skew.panels({0, columns});
    const Result scores = {tile + key * leading, leading};
    relative_product(skew, panels, a.from(key), scores);
    relative_edges(skew, {0, columns}, panels, w.key_edges.from(key), scores);
  }
  // The last panel may reach beyond `count`: rows and columns that nobody reads.
  for (int64_t key = 0; key < count; key += kPanel)
    for (int64_t column = 0; column < columns; column += kWidth)
      transpose(tile + key * leading + column, leading, w.by_query + column * p.leading + keys.first - first_key + key,
                p.leading);
}

// The rows [row, row + rows) of a block against the keys of one tile.
struct Group {
  int64_t row;
  int rows;
  Range seen;     // columns that some row sees
  Range columns;  // the same in whole panels: these are computed
};

// A tile of a block's scores, in groups of rows; those that see none of its keys are left out.
struct Tile {
  int64_t first_key;
  Range keys;  // that are seen by some row
  int count;
  Group groups[(kBlockRows + kRows - 1) / kRows];
  // Columns that each row of the block sees.
  int32_t first[kBlockRows], last[kBlockRows];
  int32_t lowest[kBlockRows];  // where there are chunks, whose bounds jump: see Seen
};

INLINE Skew lay_over(const Table& table, const Block& block, const Tile& tile, const Group& group) {
  return lay_over(table, group.rows, block.position + group.row, tile.first_key);
}

static void cut_tile(const Problem& p, const Head& head, const Block& block, int64_t first_key, int64_t group_rows,
                     Tile& tile) {
  const int64_t last_key = first_key + p.block_keys;
  tile.first_key = first_key;
  tile.keys = {most(first_key, block.keys.first), least(last_key, block.keys.last)};
  tile.count = 0;
  for (int64_t row = 0; row < block.rows; row += group_rows) {
    Group& group = tile.groups[tile.count];
    group.row = row;
    group.rows = (int)least<int64_t>(group_rows, block.rows - row);
    for (int r = 0; r < group.rows; ++r) {
      const Range window = window_of(p.call, head.keys, block.first + row + r);
      tile.first[row + r] = (int32_t)(clamp(window.first, tile.keys.first, tile.keys.last) - first_key);
      tile.last[row + r] = (int32_t)(clamp(window.last, tile.keys.first, tile.keys.last) - first_key);
    }
    for (int r = 0; r < group.rows && p.call.chunk_size; ++r) {
      const int32_t own = tile.first[row + r] - (int32_t)(row + r);
      tile.lowest[row + r] = row + r > 0 ? least(own, tile.lowest[row + r - 1]) : own;
    }
    group.seen = {tile.first[row], tile.last[row + group.rows - 1]};
    if (group.seen.empty()) continue;
    group.columns = {group.seen.first / kPanel * kPanel, round_up(group.seen.last, kPanel)};
    ++tile.count;
  }
}

// Add attn_mask to the scores of one row of a tile, in these columns, and set to -inf what the row does not see.
INLINE void hide(const Problem& p, const Head& head, const Block& block, const Tile& tile, int64_t row,
                 const Range& columns, const Workspace& w, float* scores) {
  const int64_t first = clamp<int64_t>(tile.first[row], columns.first, columns.last),
                last = clamp<int64_t>(tile.last[row], first, columns.last);
  if (first < last) {
    if (p.call.attn_mask.data)
      apply_attn_mask(matrix(p.call.attn_mask, head.batch, head.head), block.first + row,
                      {tile.first_key + first, tile.first_key + last}, scores + first, w.row);
    if (head.keys.holes) {  // not by addition: a hidden NaN stays hidden
      const float* hole = head.keys.holes + tile.first_key;
      for (int64_t column = first; column < last; ++column)
        scores[column] = hole[column] == 0.0f ? scores[column] : -kInfinity;
    }
  }
  fill(scores + columns.first, -kInfinity, first - columns.first);
  fill(scores + last, -kInfinity, columns.last - last);
}

// result[row] = a[row] times the table's row of each column's distance, for a tile; a few panels at a time, for all
// groups: they stay in the first cache.
static void times_distances(const Block& block, const Tile& tile, const Left& a, const Table& table, const Edges& edges,
                            const Result& result) {
  int64_t longest = 0;
  for (int g = 0; g < tile.count; ++g) {
    const Range panels = lay_over(table, block, tile, tile.groups[g]).panels(tile.groups[g].columns);
    longest = most(longest, panels.last - panels.first);
  }
  for (int64_t step = 0; step < longest; step += 4)
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const Skew skew = lay_over(table, block, tile, group);
      const Range panels = skew.panels(group.columns);
      relative_product(skew, {panels.first + step, least(panels.first + step + 4, panels.last)}, a.from(group.row),
                       result.from(group.row));
    }
  for (int g = 0; g < tile.count; ++g) {
    const Group& group = tile.groups[g];
    const Skew skew = lay_over(table, block, tile, group);
    relative_edges(skew, group.columns, skew.panels(group.columns), edges.from(group.row), result.from(group.row));
  }
}

// result[row] = or += a[row] (k elements) times each column of a tile, where the panels of `columns` begin at the
// tile's first key.
template <bool Accumulate>
static void times_columns(const Tile& tile, const Left& a, const float* columns, int64_t k, const Result& result) {
  const int64_t last_panel = panels_of(tile.keys.last - tile.first_key);
  for (int64_t panel = (tile.keys.first - tile.first_key) / kPanel; panel < last_panel; panel += 4)
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t first = most(panel, group.columns.first / kPanel),
                    last = least(panel + 4, group.columns.last / kPanel);
      multiply<Accumulate>(group.rows, last - first, a.from(group.row),
                           {columns + first * kPanel * k, kPanel, kPanel * k}, k,
                           {result.data + group.row * result.row + first * kPanel, result.row});
    }
}

// Scores of a tile, -inf where hidden, at scores[row of the block][column].
static void tile_scores(const Problem& p, const Head& head, const Block& block, const Tile& tile, Workspace& w,
                        const Result& scores) {
  const Call& call = p.call;
  if (call.rel_q.data) key_scores(p, head, block, tile.first_key, tile.keys, w);
  const Left content = {w.content, p.padded_size, 1};
  const float* keys = head.key_panels + (tile.first_key - head.first_key) * p.size;
  if (p.position) {
    times_distances(block, tile, {w.position, p.padded_depth, 1}, head.rel_k, w.edges, scores);
    times_columns<true>(tile, content, keys, p.size, scores);
  } else {
    times_columns<false>(tile, content, keys, p.size, scores);
  }
  for (int g = 0; g < tile.count; ++g) {
    const Group& group = tile.groups[g];
    const int64_t begin = group.columns.first, end = group.columns.last;
    for (int64_t row = group.row; row < group.row + group.rows; ++row) {
      float* of_row = scores.data + row * scores.row;
      if (call.rel_q.data) add_scaled(of_row + begin, w.by_query + row * p.leading + begin, 1.0f, end - begin);
      hide(p, head, block, tile, row, group.columns, w, of_row);
    }
  }
}

// Whether nothing of a tile is seen by anyone, so that it needs no products.
static bool tile_hidden(const Problem& p, const Head& head, const Block& block, Range keys) {
  if (head.keys.holes) {
    int64_t key = keys.first;
    while (key < keys.last && head.keys.holes[key] != 0.0f) ++key;
    if (key == keys.last) return true;
  }
  return p.call.attn_mask.data && attn_mask_hides(matrix(p.call.attn_mask, head.batch, head.head),
                                                  {block.first, block.first + block.rows}, keys);
}

// Of what products over columns read in one step, for all groups: it stays in the first cache.
constexpr int64_t kStepFloats = 8192;

// result[row] += sum over the tile's columns of a[row][column] * right[column]; right begins at the tile's first key.
static void add_over_columns(const Tile& tile, const Result& a, const Right& right, int64_t size,
                             const Result& result) {
  const int64_t step = most<int64_t>(kStepFloats / size, kPanel), last_column = tile.keys.last - tile.first_key;
  for (int64_t column = tile.keys.first - tile.first_key; column < last_column; column += step)
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t first = most(column, group.seen.first), last = least(column + step, group.seen.last);
      if (first < last)
        multiply<true>(group.rows, size / kPanel, {a.data + group.row * a.row + first, a.row, 1}, right.from(first),
                       last - first, result.from(group.row));
    }
}

// result[row] += sum over the tile's columns of a[row][column] * table[row of the distance].
static void add_over_distances(const Block& block, const Tile& tile, const Result& a, const Table& table, int64_t size,
                               const Result& result) {
  const int64_t step = most<int64_t>(kStepFloats / size, kPanel);
  Range all = {table.rows, 0};
  for (int g = 0; g < tile.count; ++g) {
    const Range touched = lay_over(table, block, tile, tile.groups[g]).touched(tile.groups[g].seen);
    all = {least(all.first, touched.first), most(all.last, touched.last)};
  }
  for (int64_t row = all.first; row < all.last; row += step)
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const Skew skew = lay_over(table, block, tile, group);
      const Range touched = skew.touched(group.seen);
      relative_values(skew, {most(row, touched.first), least(row + step, touched.last)}, a.from(group.row), size,
                      result.from(group.row));
    }
  for (int g = 0; g < tile.count; ++g) {
    const Group& group = tile.groups[g];
    edge_values(lay_over(table, block, tile, group), group.seen, a.from(group.row), size, result.from(group.row));
  }
}

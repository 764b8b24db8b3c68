// A call's sizes, one head's operands, one block of queries, and the scores of a group of its rows: what forward and backward share.

constexpr int64_t kBlockRows = 192;         // queries of a block, at most
constexpr int64_t kBlockRowsBackward = 96;  // of which tiles of scores and of their gradients are held
constexpr int64_t kBlockKeysBackward = 256;

// Scores are in units of ln 2 (weights are then powers of two).
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
    block_keys = least(c.block_keys > 0 ? round_up(least(c.block_keys, keys_of_block), kPanel) : keys_of_block, round_up(c.keys, kPanel));
    leading = block_keys + 2 * kSlack;
    if (leading % (2 * kPanel) == 0) leading += kPanel;  // an odd number of cache lines: columns are spread over all sets
    position = depth > 0;
    per_head = false;
    const Tensor* tables[] = {&c.rel_k, &c.rel_q, &c.rel_v, &c.rel_bias};
    for (const Tensor* table : tables) per_head |= table->data && table->stride[1] != 0;
  }

  // Whether the gradient of the position product's queries is summed apart from the content product's: only the biases' gradients differ.
  bool position_apart() const { return call.rel_k.data && (call.grad_pos_bias_u.data || call.grad_pos_bias_v.data); }
  double absolute_scale() const { return call.scale < 0 ? -call.scale : call.scale; }
  int64_t query_blocks() const { return (call.queries + block_rows - 1) / block_rows; }
  PanelSource key_source(int64_t batch, int64_t head) const {
    return {matrix(call.key, batch, head), call.keys, size, 1.0f, false, false, {}, 0.0f};
  }
  PanelSource value_source(int64_t batch, int64_t head) const {
    return {matrix(call.value, batch, head), call.keys, value_size, 1.0f, false, false, {}, 0.0f};
  }
  PanelSource rel_k_source(int64_t head) const {
    return {matrix(call.rel_k, 0, head), call.rows, size, 1.0f, false, true, matrix(call.rel_bias, 0, head), (float)kLog2E};
  }
  PanelSource rel_q_source(int64_t head) const {
    return {matrix(call.rel_q, 0, head), call.rows, size, (float)(call.scale * kLog2E), true, true, {}, 0.0f};
  }
  PanelSource rel_v_source(int64_t head) const { return {matrix(call.rel_v, 0, head), call.rows, value_size, 1.0f, false, true, {}, 0.0f}; }
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
};

// Memory of one thread. Null where a call does not need it.
struct Workspace {
  float *content, *position;      // (q + u), (q + v) of the block's rows, scaled; rows padded to whole panels, zeros
  float *left_edge, *right_edge;  // the block's position scores at the two edges of the table
  float* scores;                  // a block's tile
  float *keys, *values;           // forward: a tile's keys in panels, and rows of values, where each is used only once
  float* result;                  // forward: the block's output, not yet divided
  float *highest, *total;         // per row
  // backward
  float* weights_gradient;        // a block's tile
  float* upstream;                // gradients of the block's output, rows padded
  float *base, *inverse, *delta;  // per row, see row_statistics; delta is sum_j w_ij dw_ij less the gradient of the log-sum-exp
  float *content_gradient, *position_gradient;
  float *value_left_edge, *value_right_edge;
  float* row;      // one row of a tile: masks
  float* keep;     // one row of a tile: dropout
  float* scratch;  // 16 rows of the widest operand; also one small tile
  // rel_q: keys for rows, queries for columns
  float *key_rows, *key_left_edge, *key_right_edge, *by_key, *by_query;
};

// Memory is handed out in 64-byte steps, from a null pointer on to learn how much is needed.
struct Carver {
  char* base;
  int64_t used;

  float* floats(int64_t count) {
    float* result = (float*)(base + used);
    used += round_up(count * 4, 64);
#if defined(__SANITIZE_ADDRESS__)
    if (base) ASAN_POISON_MEMORY_REGION(base + used, 64);
    used += 64;
#endif
    return base ? result : nullptr;
  }
};

// Whether the position product's rows are the content product's.
INLINE bool position_is_content(const Problem& p) {
  return !p.position || !(p.call.rel_bias.data || p.call.pos_bias_u.data || p.call.pos_bias_v.data);
}

static void carve_scores(const Problem& p, Carver& carver, Workspace& w) {
  w.content = carver.floats(p.block_rows * p.padded_size);
  w.position = position_is_content(p) ? w.content : carver.floats(p.block_rows * p.padded_depth);
  w.left_edge = carver.floats(p.block_rows);
  w.right_edge = carver.floats(p.block_rows);
  w.row = p.call.attn_mask.data ? carver.floats(p.block_keys) : nullptr;
  w.keep = p.dropout.used() ? carver.floats(p.block_keys + kKeepBefore + kKeepAfter) + kKeepBefore : nullptr;
  w.scratch = carver.floats(kPanel * most(p.padded_size, p.padded_value_size) + kRows * kPanel);
  if (p.call.rel_q.data) {
    const int64_t leading = round_up(p.block_rows, kPanel) + 2 * kSlack;
    w.key_rows = carver.floats(p.block_keys * p.padded_size);
    w.key_left_edge = carver.floats(p.block_keys);
    w.key_right_edge = carver.floats(p.block_keys);
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

// The block's rows of both products: (q + u) and (q + v), scaled.
static void read_block(const Problem& p, const Head& head, const Block& block, Workspace& w) {
  const Matrix query = matrix(p.call.query, head.batch, head.head);
  const float unit = (float)(p.call.scale * kLog2E);
  const Tensor *u = &p.call.pos_bias_u, *v = &p.call.pos_bias_v;
  float *content_bias = w.scratch, *position_bias = w.scratch + p.padded_size;
  if (u->data) read_row(u->data, u->dtype, head.head * u->stride[1], u->stride[3], p.size, content_bias);
  if (v->data) read_row(v->data, v->dtype, head.head * v->stride[1], v->stride[3], p.size, position_bias);
  for (int64_t row = 0; row < block.rows; ++row) {
    float* content = w.content + row * p.padded_size;
    read_padded(query, block.first + row, p.size, p.padded_size, content);
    if (w.position != w.content) {
      float* position = w.position + row * p.padded_depth;
      fill(position, 0.0f, p.padded_depth);
      if (p.call.rel_k.data) {
        copy(position, content, p.size);
        if (v->data) add_scaled(position, position_bias, 1.0f, p.size);
        scale_row(position, unit, p.size);
      }
      if (p.call.rel_bias.data) position[p.depth - 1] = 1.0f;
    }
    if (u->data) add_scaled(content, content_bias, 1.0f, p.size);
    scale_row(content, unit, p.size);
  }
}

static Block prepare_block(const Problem& p, const Head& head, Workspace& w, int64_t index) {
  Block block;
  block.first = index * p.block_rows;
  block.rows = least(p.block_rows, p.call.queries - block.first);
  block.keys = window_of(p.call, head.keys, block.first, block.first + block.rows);
  block.position = table_position(head.keys, block.first);
  if (block.keys.empty()) return block;
  read_block(p, head, block, w);
  if (p.position) {
    const Left a = {w.position, p.padded_depth, 1};
    if (beyond_left(head.rel_k, block.position, block.rows, block.keys)) edge_scores(block.rows, a, head.rel_k, 0, w.left_edge, w.scratch);
    if (beyond_right(head.rel_k, block.position, block.keys))
      edge_scores(block.rows, a, head.rel_k, head.rel_k.rows - 1, w.right_edge, w.scratch);
  }
  return block;
}

// The rel_q term of a block of queries and the keys [keys.first, keys.last), whose columns begin at first_key: by_query[row][column].
static void key_scores(const Problem& p, const Head& head, const Block& block, int64_t first_key, Range keys, Workspace& w) {
  const int64_t columns = round_up(block.rows, kPanel), leading = columns + 2 * kSlack, count = keys.last - keys.first;
  const Matrix source = matrix(p.call.key, head.batch, head.head / p.ratio);
  for (int64_t key = 0; key < count; ++key) read_padded(source, keys.first + key, p.size, p.padded_size, w.key_rows + key * p.padded_size);
  const Left a = {w.key_rows, p.padded_size, 1};
  const Range queries = {block.position, block.position + block.rows};
  if (beyond_left(head.rel_q, keys.first, count, queries)) edge_scores(count, a, head.rel_q, 0, w.key_left_edge, w.scratch);
  if (beyond_right(head.rel_q, keys.first, queries)) edge_scores(count, a, head.rel_q, head.rel_q.rows - 1, w.key_right_edge, w.scratch);
  float* tile = w.by_key + kSlack;
  for (int64_t key = 0; key < count; key += kRows) {
    const int rows = (int)least<int64_t>(kRows, count - key);
    const Result scores = {tile + key * leading, leading};
    const Span span = table_span(rows, keys.first + key, block.position, {0, columns}, head.rel_q);
    relative_product(rows, keys.first + key, block.position, span.first_panel, span.last_panel, {a.data + key * a.row, a.row, 1},
                     head.rel_q, scores);
    relative_edges(rows, keys.first + key, block.position, {0, columns}, span, head.rel_q, w.key_left_edge + key, w.key_right_edge + key,
                   scores);
  }
  for (int64_t key = 0; key < count; key += kPanel)  // the last panel may reach beyond `count`: rows and columns that nobody reads
    for (int64_t column = 0; column < columns; column += kWidth)
      transpose(tile + key * leading + column, leading, w.by_query + column * p.leading + keys.first - first_key + key, p.leading);
}

// The rows [row, row + rows) of a block against the keys of one tile.
struct Group {
  int64_t row;
  int rows;
  Range seen;     // columns that some row sees
  Range columns;  // the same in whole panels: these are computed
  Span span;      // of the position product
};

// A tile of a block's scores, in groups of rows; those that see none of its keys are left out.
struct Tile {
  int64_t first_key;
  Range keys;  // that are seen by some row
  int count;
  Group groups[(kBlockRows + kRows - 1) / kRows];
  // Columns that each row of the block sees.
  int32_t first[kBlockRows], last[kBlockRows];
};

static void cut_tile(const Problem& p, const Head& head, const Block& block, int64_t first_key, int64_t group_rows, Tile& tile) {
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
    group.seen = {tile.first[row], tile.last[row + group.rows - 1]};
    if (group.seen.empty()) continue;
    group.columns = {group.seen.first / kPanel * kPanel, round_up(group.seen.last, kPanel)};
    if (p.position) group.span = table_span(group.rows, block.position + row, first_key, group.columns, head.rel_k);
    ++tile.count;
  }
}

// Add attn_mask to the scores of one row of a tile, columns [begin, end), and set to -inf what the row does not see.
INLINE void hide(const Problem& p, const Head& head, int64_t query, const Tile& tile, int64_t row, int64_t begin, int64_t end,
                 const Workspace& w, float* scores) {
  const int64_t first = clamp<int64_t>(tile.first[row], begin, end), last = clamp<int64_t>(tile.last[row], first, end);
  if (first < last) {
    if (p.call.attn_mask.data)
      apply_attn_mask(p.call, head.batch, head.head, query, tile.first_key + first, tile.first_key + last, (float)kLog2E, scores + first,
                      w.row);
    if (head.keys.holes) {  // not by addition: a hidden NaN stays hidden
      const float* hole = head.keys.holes + tile.first_key;
      for (int64_t column = first; column < last; ++column) scores[column] = hole[column] == 0.0f ? scores[column] : -kInfinity;
    }
  }
  fill(scores + begin, -kInfinity, first - begin);
  fill(scores + last, -kInfinity, end - last);
}

// Scores of a tile, -inf where hidden, at scores[row of the block][column].
static void tile_scores(const Problem& p, const Head& head, const Block& block, const Tile& tile, Workspace& w, const Result& scores) {
  const Call& call = p.call;
  if (call.rel_q.data) key_scores(p, head, block, tile.first_key, tile.keys, w);
  // A few panels at a time, for all groups: they stay in the first cache.
  if (p.position) {
    int64_t longest = 0;
    for (int g = 0; g < tile.count; ++g) longest = most(longest, tile.groups[g].span.last_panel - tile.groups[g].span.first_panel);
    for (int64_t step = 0; step < longest; step += 4)
      for (int g = 0; g < tile.count; ++g) {
        const Group& group = tile.groups[g];
        const int64_t panel = group.span.first_panel + step;
        relative_product(group.rows, block.position + group.row, tile.first_key, panel, least(panel + 4, group.span.last_panel),
                         {w.position + group.row * p.padded_depth, p.padded_depth, 1}, head.rel_k,
                         {scores.data + group.row * scores.row, scores.row});
      }
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      relative_edges(group.rows, block.position + group.row, tile.first_key, group.columns, group.span, head.rel_k, w.left_edge + group.row,
                     w.right_edge + group.row, {scores.data + group.row * scores.row, scores.row});
    }
  }
  const Range panels = {(tile.keys.first - tile.first_key) / kPanel, panels_of(tile.keys.last - tile.first_key)};
  for (int64_t panel = panels.first; panel < panels.last; panel += 4)
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t first = most(panel, group.columns.first / kPanel), last = least(panel + 4, group.columns.last / kPanel);
      const Left content = {w.content + group.row * p.padded_size, p.padded_size, 1};
      const Right key = {head.key_panels + (tile.first_key - head.first_key + first * kPanel) * p.size, kPanel, kPanel * p.size};
      const Result target = {scores.data + group.row * scores.row + first * kPanel, scores.row};
      if (p.position) {
        multiply<true>(group.rows, last - first, content, key, p.size, target);
      } else {
        multiply<false>(group.rows, last - first, content, key, p.size, target);
      }
    }
  for (int g = 0; g < tile.count; ++g) {
    const Group& group = tile.groups[g];
    const int64_t begin = group.columns.first, end = group.columns.last;
    for (int64_t row = group.row; row < group.row + group.rows; ++row) {
      float* of_row = scores.data + row * scores.row;
      if (call.rel_q.data) add_scaled(of_row + begin, w.by_query + row * p.leading + begin, 1.0f, end - begin);
      hide(p, head, block.first + row, tile, row, begin, end, w, of_row);
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
  return p.call.attn_mask.data && attn_mask_hides(p.call, head.batch, head.head, {block.first, block.first + block.rows}, keys);
}

constexpr int64_t kStepFloats = 8192;  // of what products over columns read in one step, for all groups: it stays in the first cache

// result[row] += sum over the tile's columns of a[row][column] * right[column], where right begins at the tile's first key.
static void add_over_columns(const Tile& tile, const Result& a, const Right& right, int64_t size, const Result& result) {
  const int64_t step = most<int64_t>(kStepFloats / size, kPanel), last_column = tile.keys.last - tile.first_key;
  for (int64_t column = tile.keys.first - tile.first_key; column < last_column; column += step)
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t first = most(column, group.seen.first), last = least(column + step, group.seen.last);
      if (first < last)
        multiply<true>(group.rows, size / kPanel, {a.data + group.row * a.row + first, a.row, 1},
                       {right.data + first * right.k, right.k, right.panel}, last - first,
                       {result.data + group.row * result.row, result.row});
    }
}

// result[row] += sum over the tile's columns of a[row][column] * table[row of the distance].
static void add_over_distances(const Tile& tile, const Block& block, const Result& a, const Table& table, int64_t size,
                               const Result& result) {
  const int64_t step = most<int64_t>(kStepFloats / size, kPanel);
  Range all = {table.rows, 0};
  for (int g = 0; g < tile.count; ++g) {
    const Group& group = tile.groups[g];
    const Range touched = touched_rows(group.rows, block.position + group.row, tile.first_key, group.seen, table);
    all = {least(all.first, touched.first), most(all.last, touched.last)};
  }
  for (int64_t row = all.first; row < all.last; row += step)
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const Range touched = touched_rows(group.rows, block.position + group.row, tile.first_key, group.seen, table);
      relative_values(group.rows, block.position + group.row, tile.first_key, {most(row, touched.first), least(row + step, touched.last)},
                      {a.data + group.row * a.row, a.row}, table, size / kPanel, {result.data + group.row * result.row, result.row});
    }
  for (int g = 0; g < tile.count; ++g) {
    const Group& group = tile.groups[g];
    edge_values(group.rows, block.position + group.row, tile.first_key, group.seen, {a.data + group.row * a.row, a.row}, table, size,
                {result.data + group.row * result.row, result.row});
  }
}

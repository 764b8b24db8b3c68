// The forward pass in bfloat16 on AMX: forward.h's algorithm with tiles of 32 rows, which hold raw products; scale and units of ln 2 come
// with the softmax. rel_q and rel_v have no such form: their calls take the float32 kernel.

constexpr int64_t kBlockKeysAmx = 256;

struct AmxSizes {
  int64_t size, value_size;  // of heads, rounded up to whole instructions; of values, to whole panels
  int64_t keys;              // rounded up to whole instructions
  int64_t weights_row;       // stride of a row of bfloat16 weights

  explicit AmxSizes(const Problem& p) {
    size = round_up(p.size, kTileDepth);
    value_size = p.padded_value_size;
    keys = round_up(p.call.keys, kTileDepth);
    weights_row = p.block_keys + 2 * kTileDepth;
  }
};

struct AmxHead {
  Head head;
  const Half *key_panels, *value_pairs, *table_panels;
  int64_t first_key, value_rows;  // the key where key_panels and value_pairs begin; rows of a panel of value_pairs
  const Half* value_panels;       // backward
  const float* bias;              // rel_bias in units of ln 2, null: none
};

struct AmxWorkspace {
  Workspace base;
  Half *keys, *values;  // a tile's, where each is used only once
  Half *content, *position, *weights, *scratch;
  float* row_scratch;
};

static bool takes_amx(const Call& call) { return call.query.dtype == kBFloat16 && !call.rel_q.data && !call.rel_v.data; }

// (q + bias) of a block's rows times the sign of the scale, in bfloat16.
static void read_queries(const Problem& p, const Head& head, const Block& block, const Tensor& bias, int64_t padded, Half* to,
                         float* scratch) {
  const Matrix query = matrix(p.call.query, head.batch, head.head);
  float* added = scratch + p.padded_size;
  if (bias.data) read_row(bias.data, bias.dtype, head.head * bias.stride[1], bias.stride[3], p.size, added);
  for (int64_t row = 0; row < block.rows; ++row) {
    Half* target = to + row * padded;
    if (!bias.data && p.call.scale >= 0) {
      read_halves(query, block.first + row, p.size, padded, target, scratch);
      continue;
    }
    read_padded(query, block.first + row, p.size, p.padded_size, scratch);
    if (bias.data) add_scaled(scratch, added, 1.0f, p.size);
    if (p.call.scale < 0) scale_row(scratch, -1.0f, p.size);
    for (int64_t column = 0; column < p.size; ++column) target[column] = to_bfloat16(scratch[column]);
    __builtin_memset(target + p.size, 0, (size_t)(padded - p.size) * 2);
  }
  __builtin_memset(to + block.rows * padded, 0, (size_t)((round_up(block.rows, kGroupRows) - block.rows) * padded) * 2);
}

// The block's rows times one row of rel_k.
static void edge_products(const Problem& p, const AmxSizes& sizes, const Half* rows, int64_t count, const Tensor& table, int64_t head,
                          int64_t table_row, float* edge, float* scratch) {
  float* other = scratch;
  read_row(table.data, table.dtype, head * table.stride[1] + table_row * table.stride[2], table.stride[3], p.size, other);
  for (int64_t row = 0; row < count; ++row) {
    float sum = 0;
    for (int64_t column = 0; column < p.size; ++column)
      sum += from_bfloat16(rows[row * sizes.size + column]) * from_bfloat16(to_bfloat16(other[column]));
    edge[row] = sum;
  }
}

// One row's scores [0, columns) times `unit` become weights in bfloat16.
INLINE void softmax_row_half(const float* scores, int64_t columns, float unit, float& highest, float& total, float* result,
                             int64_t result_size, const float* keep, Half* weights) {
  const float next = most(highest, max_row(scores, columns) * unit);
  const float base = next == -kInfinity ? 0.0f : next;
  Vec sum[2] = {};
  const Vec factor = splat(unit), subtracted = splat(base);
  auto step = [&](int64_t column, Vec& total_of) {
    const Vec weight = exp2_nonpositive(load(scores + column) * factor - subtracted);
    total_of += weight;
    store_half(weights + column, keep ? weight * load(keep + column) : weight);
  };
  int64_t column = 0;
  for (; column + 2 * kWidth <= columns; column += 2 * kWidth) {
    step(column, sum[0]);
    step(column + kWidth, sum[1]);
  }
  if (column < columns) step(column, sum[0]);
  if (next != highest) {
    const float shrink = exp2_nonpositive(highest - base);
    total *= shrink;
    scale_row(result, shrink, result_size);
    highest = next;
  }
  total += sum_lanes(sum[0] + sum[1]);
}

// to[column] += bias of the distance of (row, column), for the columns [first, last).
static void add_bias(const Table& table, const float* bias, int64_t position, int64_t first_key, int64_t first, int64_t last, float* to) {
  const int64_t shift = position - table.left - first_key;  // column of the table's row 0
  const int64_t inner_first = clamp(shift, first, last), inner_last = clamp(table.rows + shift, inner_first, last);
  for (int64_t column = first; column < inner_first; ++column) to[column] += bias[0];
  if (inner_first < inner_last) add_scaled(to + inner_first, bias + inner_first - shift, 1.0f, inner_last - inner_first);
  for (int64_t column = inner_last; column < last; ++column) to[column] += bias[table.rows - 1];
}

// The raw products of a group of rows with its columns of a tile: scores[row of the group][column].
static void group_products(const Problem& p, const AmxSizes& sizes, const AmxHead& operands, const Block& block, const Group& group,
                           int64_t first_key, const AmxWorkspace& w, const Result& scores) {
  const Head& head = operands.head;
  const int64_t begin = group.columns.first, panels = (group.columns.last - begin) / kPanel, position = block.position + group.row;
  const int64_t steps = sizes.size / kTileDepth, panel = kPanel * sizes.size;
  const HalfRight key = {operands.key_panels + (first_key - operands.first_key + begin) * sizes.size, panel};
  const HalfLeft content = {w.content + group.row * sizes.size, sizes.size};
  const Result target = {scores.data + begin, scores.row};
  if (!p.call.rel_k.data) return amx_multiply<false>(group.rows, panels, content, key, steps, target);
  const Span& span = group.span;
  amx_multiply<false>(group.rows, span.last_panel - span.first_panel, {w.position + group.row * sizes.size, sizes.size},
                      {operands.table_panels + span.first_panel * panel, panel}, steps,
                      {scores.data + span.first_panel * kPanel + position - head.rel_k.left - first_key, scores.row + 1});
  relative_edges(group.rows, position, first_key, group.columns, span, head.rel_k, w.base.left_edge + group.row,
                 w.base.right_edge + group.row, scores);
  amx_multiply<true>(group.rows, panels, content, key, steps, target);
}

// Queries of a block, and their products with the table's edges where they are needed.
static Block prepare_block_amx(const Problem& p, const AmxSizes& sizes, const AmxHead& operands, AmxWorkspace& w, int64_t index) {
  const Call& call = p.call;
  const Head& head = operands.head;
  Block block;
  block.first = index * p.block_rows;
  block.rows = least(p.block_rows, call.queries - block.first);
  block.keys = window_of(call, head.keys, block.first, block.first + block.rows);
  block.position = table_position(head.keys, block.first);
  if (block.keys.empty()) return block;
  read_queries(p, head, block, call.pos_bias_u, sizes.size, w.content, w.base.scratch);
  if (w.position != w.content) read_queries(p, head, block, call.pos_bias_v, sizes.size, w.position, w.base.scratch);
  if (call.rel_k.data && beyond_left(head.rel_k, block.position, block.rows, block.keys))
    edge_products(p, sizes, w.position, block.rows, call.rel_k, head.head, 0, w.base.left_edge, w.base.scratch);
  if (call.rel_k.data && beyond_right(head.rel_k, block.position, block.keys))
    edge_products(p, sizes, w.position, block.rows, call.rel_k, head.head, call.rows - 1, w.base.right_edge, w.base.scratch);
  return block;
}

// Pack a tile's keys and values for this one use.
static void pack_tile_amx(const Problem& p, const AmxSizes& sizes, const Tile& tile, AmxHead& operands, const AmxWorkspace& w) {
  const Matrix key = matrix(p.call.key, operands.head.batch, operands.head.head),
               value = matrix(p.call.value, operands.head.batch, operands.head.head);
  const int64_t first = tile.keys.first / kTileDepth * kTileDepth, last = round_up(tile.keys.last, kTileDepth);
  for (int64_t panel = first / kPanel; panel < panels_of(tile.keys.last); ++panel)
    pack_half_panel(key, p.call.keys, p.size, sizes.size, false, panel, w.keys + (panel * kPanel - tile.first_key) * sizes.size, w.scratch,
                    w.row_scratch);
  pack_half_pairs(value, p.call.keys, p.value_size, sizes.value_size, first, last, p.block_keys, w.values, tile.first_key, w.scratch,
                  w.row_scratch);
  operands.key_panels = w.keys;
  operands.value_pairs = w.values;
  operands.first_key = tile.first_key;
  operands.value_rows = p.block_keys;
}

static void forward_block_amx(const Problem& p, const AmxSizes& sizes, AmxHead operands, AmxWorkspace& w, int64_t index) {
  const Call& call = p.call;
  const Head& head = operands.head;
  Workspace& base = w.base;
  const Block block = prepare_block_amx(p, sizes, operands, w, index);
  fill(base.result, 0.0f, round_up(block.rows, kGroupRows) * p.padded_value_size);
  fill(base.highest, -kInfinity, block.rows);
  fill(base.total, 0.0f, block.rows);
  const float unit = (float)(p.absolute_scale() * kLog2E);
  const bool adjusted = operands.bias || call.attn_mask.data || unit == 0.0f;  // hidden scores are -inf: not to be multiplied by 0
  const Result scores = {base.scores + kSlack, p.leading};
  Tile tile;
  TileRegisters registers;
  for (int64_t first_key = block.keys.first / kTileDepth * kTileDepth; first_key < block.keys.last; first_key += p.block_keys) {
    cut_tile(p, head, block, first_key, kGroupRows, tile);
    if (tile_hidden(p, head, block, tile.keys)) continue;
    if (w.keys) pack_tile_amx(p, sizes, tile, operands, w);
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t begin = group.columns.first, end = group.columns.last, position = block.position + group.row;
      group_products(p, sizes, operands, block, group, first_key, w, scores);
      const int64_t first_depth = begin / kTileDepth * kTileDepth, last_depth = round_up(end, kTileDepth);
      for (int r = 0; r < group.rows; ++r) {
        const int64_t row = group.row + r, query = block.first + row;
        float* of_row = scores.data + r * scores.row;
        Half* weights = w.weights + r * sizes.weights_row;
        if (adjusted) scale_row(of_row + begin, unit, end - begin);
        if (operands.bias) add_bias(head.rel_k, operands.bias, position + r, first_key, begin, end, of_row);
        hide(p, head, query, tile, row, begin, end, base, of_row);
        if (p.dropout.used()) dropout_keep(p.dropout, head.batch, head.head, query, first_key + begin, first_key + end, base.keep);
        softmax_row_half(of_row + begin, end - begin, adjusted ? 1.0f : unit, base.highest[row], base.total[row],
                         base.result + row * p.padded_value_size, p.padded_value_size, p.dropout.used() ? base.keep : nullptr,
                         weights + begin);
        __builtin_memset(weights + first_depth, 0, (size_t)(begin - first_depth) * 2);
        __builtin_memset(weights + end, 0, (size_t)(last_depth - end) * 2);
      }
      for (int64_t row = group.rows; row < kGroupRows; ++row)
        __builtin_memset(w.weights + row * sizes.weights_row + first_depth, 0, (size_t)(last_depth - first_depth) * 2);
      amx_multiply<true>(group.rows, p.padded_value_size / kPanel, {w.weights + first_depth, sizes.weights_row},
                         {operands.value_pairs + (first_key - operands.first_key + first_depth) * kPanel, operands.value_rows * kPanel},
                         (last_depth - first_depth) / kTileDepth, {base.result + group.row * p.padded_value_size, p.padded_value_size});
    }
  }
  write_block(p, head, block, base);
}

static int64_t carve_amx(const Problem& p, const AmxSizes& sizes, bool once, char* memory, AmxWorkspace& w) {
  Carver carver = {memory, 0};
  w = {};
  const int64_t rows = round_up(p.block_rows, kGroupRows);
  auto halves = [&](int64_t count) { return (Half*)carver.floats((count + 1) / 2); };
  w.content = halves(rows * sizes.size);
  w.position = p.call.pos_bias_u.data || p.call.pos_bias_v.data ? halves(rows * sizes.size) : w.content;
  w.weights = halves(kGroupRows * sizes.weights_row);
  if (once) {
    w.keys = halves(p.block_keys * sizes.size);
    w.values = halves(p.block_keys * sizes.value_size);
  }
  w.scratch =
      halves(kPanel * most(sizes.size, round_up(p.value_size, kTileDepth)));  // the backward pass packs values in whole instructions
  w.row_scratch = carver.floats(most(sizes.size, round_up(p.value_size, kTileDepth)));
  w.base.scratch = carver.floats(2 * p.padded_size);
  w.base.left_edge = carver.floats(rows);
  w.base.right_edge = carver.floats(rows);
  w.base.row = p.call.attn_mask.data ? carver.floats(p.block_keys) : nullptr;
  w.base.keep = p.dropout.used() ? carver.floats(p.block_keys + kKeepBefore + kKeepAfter) + kKeepBefore : nullptr;
  w.base.scores = carver.floats(kGroupRows * p.leading + 2 * kGroupRows);
  w.base.result = carver.floats(rows * p.padded_value_size);
  w.base.highest = carver.floats(rows);
  w.base.total = carver.floats(rows);
  return carver.used;
}

// One head's rel_bias in units of ln 2.
static void read_bias(const Call& call, int64_t head, float* to) {
  read_row(call.rel_bias.data, call.rel_bias.dtype, head * call.rel_bias.stride[1], call.rel_bias.stride[2], call.rows, to);
  scale_row(to, (float)kLog2E, call.rows);
}

static int forward_amx(const Call& call, const Team& team) {
  Problem p(call, kBlockRowsBackward, kBlockKeysAmx);
  p.block_keys = round_up(p.block_keys, kTileDepth);
  p.leading = p.block_keys + 2 * kSlack;
  const AmxSizes sizes(p);
  const int64_t threads = team.threads, batch = call.batch, key_heads = call.key_heads;
  const bool once = used_once(p);
  AmxWorkspace probe;
  const int64_t workspace_floats = carve_amx(p, sizes, once, nullptr, probe) / 4;
  AmxWorkspace* workspaces = (AmxWorkspace*)allocate(team, threads * (int64_t)sizeof(AmxWorkspace) / 4);
  Keys* keys = (Keys*)allocate(team, batch * (int64_t)sizeof(Keys) / 4);
  float* holes = call.key_mask.data ? allocate(team, batch * call.keys) : nullptr;
  const bool per_head = call.rel_k.data && call.rel_k.stride[1] != 0, bias_per_head = call.rel_bias.data && call.rel_bias.stride[1] != 0;
  const int64_t table_halves = panels_of(call.rows) * kPanel * sizes.size;
  Half* tables = call.rel_k.data ? (Half*)allocate(team, (per_head ? call.heads : 1) * table_halves / 2) : nullptr;
  float* biases = call.rel_bias.data ? allocate(team, (bias_per_head ? call.heads : 1) * call.rows) : nullptr;
  const int64_t panel_halves = panels_of(call.keys) * kPanel * sizes.size, pair_halves = sizes.keys * sizes.value_size;
  const int64_t units = batch * key_heads, unit_floats = once ? 0 : (panel_halves + pair_halves) / 2;
  const int64_t chunk = clamp<int64_t>(kPackedBytes / 4 / most<int64_t>(unit_floats, 1), 1, units);
  float* packed = allocate(team, chunk * unit_floats);
  if (!workspaces || !keys || (call.key_mask.data && !holes) || (call.rel_k.data && !tables) || (call.rel_bias.data && !biases) || !packed)
    return 1;
  for (int64_t thread = 0; thread < threads; ++thread) {
    float* memory = allocate(team, workspace_floats);
    if (!memory) return 1;
    carve_amx(p, sizes, once, (char*)memory, workspaces[thread]);
  }
  for (int64_t b = 0; b < batch; ++b) keys[b] = visible_keys(call, b, holes ? holes + b * call.keys : nullptr);
  for (int64_t h = 0; biases && h < (bias_per_head ? call.heads : 1); ++h) read_bias(call, h, biases + h * call.rows);
  if (tables) {
    const int64_t panels = panels_of(call.rows), tasks = (panels + kPanelsOfTask - 1) / kPanelsOfTask;
    parallel(team, (per_head ? call.heads : 1) * tasks, [&](int64_t index, int64_t thread) {
      const int64_t h = index / tasks;
      for (int64_t panel = index % tasks * kPanelsOfTask; panel < least((index % tasks + 1) * kPanelsOfTask, panels); ++panel)
        pack_half_panel(matrix(call.rel_k, 0, h), call.rows, p.size, sizes.size, true, panel,
                        tables + h * table_halves + panel * kPanel * sizes.size, workspaces[thread].scratch,
                        workspaces[thread].row_scratch);
    });
  }
  const int64_t blocks = p.query_blocks(), tasks = once ? 0 : pack_tasks(p);
  for (int64_t start = 0; start < units; start += chunk) {
    const int64_t count = least(chunk, units - start);
    parallel(team, count * tasks, [&](int64_t index, int64_t thread) {
      const int64_t unit = start + index / tasks, first = index % tasks * kPanelsOfTask,
                    last = least(first + kPanelsOfTask, panels_of(call.keys));
      Half* panels = (Half*)(packed + index / tasks * unit_floats);
      AmxWorkspace& w = workspaces[thread];
      for (int64_t panel = first; panel < last; ++panel)
        pack_half_panel(matrix(call.key, unit / key_heads, unit % key_heads), call.keys, p.size, sizes.size, false, panel,
                        panels + panel * kPanel * sizes.size, w.scratch, w.row_scratch);
      pack_half_pairs(matrix(call.value, unit / key_heads, unit % key_heads), call.keys, p.value_size, sizes.value_size, first * kPanel,
                      least((first + kPanelsOfTask) * kPanel, sizes.keys), sizes.keys, panels + panel_halves, 0, w.scratch, w.row_scratch);
    });
    parallel(team, count * p.ratio * blocks, [&](int64_t index, int64_t thread) {
      const int64_t block = blocks - 1 - index % blocks, local = index / blocks / p.ratio, unit = start + local;
      AmxHead operands = {};
      Head& head = operands.head;
      head.batch = unit / key_heads;
      head.head = unit % key_heads * p.ratio + index / blocks % p.ratio;
      head.keys = keys[head.batch];
      head.rel_k.rows = call.rows;
      head.rel_k.left = call.left;
      operands.key_panels = (const Half*)(packed + local * unit_floats);
      operands.value_pairs = operands.key_panels + panel_halves;
      operands.value_rows = sizes.keys;
      operands.table_panels = tables ? tables + (per_head ? head.head * table_halves : 0) : nullptr;
      operands.bias = biases ? biases + (bias_per_head ? head.head * call.rows : 0) : nullptr;
      forward_block_amx(p, sizes, operands, workspaces[thread], block);
    });
  }
  return 0;
}

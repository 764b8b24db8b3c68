// The forward pass in bfloat16 on AMX: forward.h's algorithm with tiles of 32 rows, which hold raw products; scale and
// units of ln 2 come with the softmax.

constexpr int64_t kBlockKeysAmx = 256;

struct AmxWorkspace {
  Workspace base;
  AmxKeys keys;  // a tile's, where each is used only once
  Half *content, *position;
  Half* weights;  // a group's, rows `weights_row` apart, with kWideSlack on both sides
  int64_t weights_row;
  HalfScratch scratch;
  Half* key_rows;  // rel_q: a tile's
};

static bool takes_amx(const Call& call) { return call.query.dtype == kBFloat16; }

// (q + bias) of a block's rows times the sign of the scale, in bfloat16.
static void read_queries(const AmxProblem& p, const Head& head, const Block& block, const Tensor& bias, Half* to,
                         float* scratch) {
  const HalfSource query = {matrix(p.call.query, head.batch, head.head), p.call.queries, p.size, p.deep_size};
  float* added = scratch + p.padded_size;
  if (bias.data) read_row(matrix(bias, 0, head.head), 0, p.size, added);
  for (int64_t row = 0; row < block.rows; ++row) {
    Half* target = to + row * p.deep_size;
    if (!bias.data && p.call.scale >= 0) {
      read_halves(query, block.first + row, target, scratch);
      continue;
    }
    read_row(query.matrix, block.first + row, p.size, scratch);
    if (bias.data) add_scaled(scratch, added, 1.0f, p.size);
    if (p.call.scale < 0) scale_row(scratch, -1.0f, p.size);
    for (int64_t column = 0; column < p.size; ++column) target[column] = to_bfloat16(scratch[column]);
    zero_halves(target + p.size, p.deep_size - p.size);
  }
  zero_halves(to + block.rows * p.deep_size, (round_up(block.rows, kGroupRows) - block.rows) * p.deep_size);
}

// One row's scores [0, columns) times `unit` become weights in bfloat16. `keep`: dropout's 1 or 0 for each, or null.
INLINE void softmax_row_half(const float* scores, int64_t columns, float unit, const float* keep, RunningRow running,
                             Half* weights) {
  const float next = most(running.highest, max_row(scores, columns) * unit);
  Vec sum[2] = {};
  const Vec factor = splat(unit), subtracted = splat(RunningRow::base_of(next));
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
  running.add(next, sum_lanes(sum[0] + sum[1]));
}

// to[column] += bias of the distance of row m and the column, for these columns.
static void add_bias(const Skew& skew, int64_t m, const Range& columns, const float* bias, float* to) {
  const Range within = skew.within(m, columns);
  for (int64_t column = columns.first; column < within.first; ++column) to[column] += bias[0];
  if (!within.empty())
    add_scaled(to + within.first, bias + within.first - m - skew.shift, 1.0f, within.last - within.first);
  for (int64_t column = within.last; column < columns.last; ++column) to[column] += bias[skew.table.rows - 1];
}

// As key_scores: raw products.
static void key_scores_amx(const AmxProblem& p, const AmxHead& operands, const Block& block, const Tile& tile,
                           const AmxWorkspace& w) {
  const Head& head = operands.head;
  const Workspace& base = w.base;
  const int64_t columns = round_up(block.rows, kPanel), leading = columns + 2 * kSlack,
                count = tile.keys.last - tile.keys.first, panel = kPanel * p.deep_size;
  const HalfSource source = p.keys(head.batch, head.head / p.ratio, p.deep_size);
  for (int64_t key = 0; key < count; ++key)
    read_halves(source, tile.keys.first + key, w.key_rows + key * p.deep_size, w.scratch.row);
  zero_halves(w.key_rows + count * p.deep_size, (round_up(count, kGroupRows) - count) * p.deep_size);
  edge_products_amx(lay_over(head.rel_q, count, tile.keys.first, block.position), {0, columns},
                    p.source(kRelQ, head.head), {w.key_rows, p.deep_size}, base.key_edges, w.scratch);
  float* by_key = base.by_key + kSlack;
  for (int64_t key = 0; key < count; key += kGroupRows) {
    const Skew skew = lay_over(head.rel_q, least(kGroupRows, count - key), tile.keys.first + key, block.position);
    const Range panels = skew.panels({0, columns});
    const Result scores = {by_key + key * leading, leading};
    amx_multiply<false>((int)skew.rows, panels.last - panels.first, {w.key_rows + key * p.deep_size, p.deep_size},
                        {operands.panels[kRelQ] + panels.first * panel, panel}, p.deep_size / kTileDepth,
                        {scores.data + panels.first * kPanel + skew.shift, leading + 1});
    relative_edges(skew, {0, columns}, panels, base.key_edges.from(key), scores);
  }
  for (int64_t key = 0; key < count; key += kPanel)
    for (int64_t column = 0; column < columns; column += kWidth)
      transpose(by_key + key * leading + column, leading,
                base.by_query + column * p.leading + tile.keys.first - tile.first_key + key, p.leading);
}

// The weights of a group's rows, in bfloat16, times rel_v's rows of their distances.
static void add_distances_amx(const AmxProblem& p, const AmxHead& operands, const Block& block, const Tile& tile,
                              const Group& group, const AmxWorkspace& w) {
  const Skew skew = lay_over(operands.head.rel_v, block, tile, group);
  float* result = w.base.result + group.row * p.padded_value_size;
  relative_values_amx(skew, group.seen, {w.weights, w.weights_row}, operands.pairs[kRelV],
                      {result, p.padded_value_size});
  const Matrix table = p.source(kRelV, operands.head.head).matrix;
  auto add_edge = [&](int64_t table_row, int64_t row, int64_t first, int64_t last) {
    float share = 0.0f;
    for (int64_t column = first; column < last; ++column)
      share += from_bfloat16(w.weights[row * w.weights_row + column]);
    if (share == 0.0f) return;
    read_row(table, table_row, p.value_size, w.base.scratch);
    add_scaled(result + row * p.padded_value_size, w.base.scratch, share, p.value_size);
  };
  for (int64_t row = 0; row < group.rows; ++row) {
    const Range within = skew.within(row, group.seen);
    add_edge(0, row, group.seen.first, within.first);
    add_edge(p.call.rows - 1, row, within.last, group.seen.last);
  }
}

// A group's raw scores. rel_q's part comes from key_scores_amx.
static void group_scores_amx(const AmxProblem& p, const AmxHead& operands, const Block& block, const Tile& tile,
                             const Group& group, const AmxWorkspace& w) {
  const Range& columns = group.columns;
  const Result scores = {w.base.scores + kSlack, p.leading};
  group_products(lay_over(operands.head.rel_k, block, tile, group), columns,
                 {{w.content + group.row * p.deep_size, p.deep_size},
                  {w.position + group.row * p.deep_size, p.deep_size},
                  operands.keys.key_panels + (tile.first_key - operands.first_key) * p.deep_size,
                  operands.panels[kRelK],
                  p.deep_size,
                  w.base.edges.from(group.row)},
                 scores);
  const float sign = p.call.scale < 0 ? -1.0f : 1.0f;  // which is that of the queries here
  for (int r = 0; p.call.rel_q.data && r < group.rows; ++r)
    add_scaled(scores.data + r * scores.row + columns.first,
               w.base.by_query + (group.row + r) * p.leading + columns.first, sign, columns.last - columns.first);
}

static void read_block_amx(const AmxProblem& p, const Head& head, const Block& block, const AmxWorkspace& w) {
  read_queries(p, head, block, p.call.pos_bias_u, w.content, w.base.scratch);
  if (w.position != w.content) read_queries(p, head, block, p.call.pos_bias_v, w.position, w.base.scratch);
}

// The block's products with the table's edges, where they are needed.
static void find_edges_amx(const AmxProblem& p, const Head& head, const Block& block, const AmxWorkspace& w) {
  if (p.call.rel_k.data)
    edge_products_amx(lay_over(head.rel_k, block.rows, block.position, 0), block.keys, p.source(kRelK, head.head),
                      {w.position, p.deep_size}, w.base.edges, w.scratch);
}

// Keys of a tile in whole steps of products over them.
INLINE Range deep_keys(const Tile& tile) {
  return {tile.keys.first / kTileDepth * kTileDepth, round_up(tile.keys.last, kTileDepth)};
}

// Pack a tile's keys for this one use.
static void pack_tile_keys_amx(const AmxProblem& p, const Tile& tile, AmxHead& operands, const AmxWorkspace& w) {
  const HalfSource key = p.keys(operands.head.batch, operands.head.head / p.ratio, p.deep_size);
  for (int64_t panel = deep_keys(tile).first / kPanel; panel < panels_of(tile.keys.last); ++panel)
    pack_half_panel(key, panel, w.keys.key_panels + (panel * kPanel - tile.first_key) * p.deep_size, w.scratch);
  operands.keys.key_panels = w.keys.key_panels;
  operands.first_key = tile.first_key;
}

// The same of its values. `finite`: with zeros for what is not; returns whether there was such.
static bool pack_tile_values_amx(const AmxProblem& p, const Tile& tile, bool finite, AmxHead& operands,
                                 const AmxWorkspace& w) {
  HalfSource value = p.values(operands.head.batch, operands.head.head / p.ratio, p.padded_value_size);
  value.finite = finite;
  operands.keys.value_pairs = w.keys.value_pairs;
  operands.first_value = tile.first_key;
  return pack_half_pairs(value, deep_keys(tile), tile.first_key, w.keys.value_pairs, w.scratch);
}

// As attend in forward.h.
static void attend_amx(const AmxProblem& p, AmxHead operands, const Block& block, bool apart, AmxWorkspace& w) {
  const Call& call = p.call;
  const Head& head = operands.head;
  Workspace& base = w.base;
  fill(base.result, 0.0f, round_up(block.rows, kGroupRows) * p.padded_value_size);
  fill(base.highest, -kInfinity, block.rows);
  fill(base.total, 0.0f, block.rows);
  const float unit = (float)(p.absolute_scale() * kLog2E);
  // (unit == 0: hidden scores are -inf, not to be multiplied by it.)
  const bool adjusted = operands.bias || call.attn_mask.data || unit == 0.0f;
  const Result scores = {base.scores + kSlack, p.leading};
  Tile tile;
  TileRegisters registers;
  for (int64_t first_key = block.keys.first / kTileDepth * kTileDepth; first_key < block.keys.last;
       first_key += p.block_keys) {
    cut_tile(p, head, block, first_key, kGroupRows, tile);
    if (tile_hidden(p, head, block, tile.keys)) continue;
    if (w.keys.key_panels) pack_tile_keys_amx(p, tile, operands, w);
    bool dropped = false;
    if (apart || w.keys.key_panels) dropped = pack_tile_values_amx(p, tile, apart, operands, w);
    if (call.rel_q.data) key_scores_amx(p, operands, block, tile, w);
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const Range& columns = group.columns;
      const Skew skew = lay_over(head.rel_k, block, tile, group);
      group_scores_amx(p, operands, block, tile, group, w);
      const int64_t first_depth = columns.first / kTileDepth * kTileDepth,
                    last_depth = round_up(columns.last, kTileDepth);
      // rel_v's product reads around them, too.
      const int64_t first_zero = call.rel_v.data ? -kWideSlack : first_depth,
                    last_zero = call.rel_v.data ? p.block_keys + kWideSlack : last_depth;
      for (int r = 0; r < group.rows; ++r) {
        const int64_t row = group.row + r, count = columns.last - columns.first;
        float *of_row = scores.data + r * scores.row, *keep = p.dropout.used() ? base.keep : nullptr;
        Half* weights = w.weights + r * w.weights_row;
        if (adjusted) scale_row(of_row + columns.first, unit, count);
        if (operands.bias) add_bias(skew, r, columns, operands.bias, of_row);
        hide(p, head, block, tile, row, columns, base, of_row);
        if (keep)
          dropout_keep(p.dropout, head.batch, head.head, block.first + row, first_key + columns.first,
                       first_key + columns.last, keep);
        softmax_row_half(
            of_row + columns.first, count, adjusted ? 1.0f : unit, keep,
            {base.highest[row], base.total[row], base.result + row * p.padded_value_size, p.padded_value_size},
            weights + columns.first);
        zero_halves(weights + first_zero, columns.first - first_zero);
        zero_halves(weights + columns.last, last_zero - columns.last);
      }
      for (int64_t row = group.rows; row < kGroupRows; ++row)
        zero_halves(w.weights + row * w.weights_row + first_zero, last_zero - first_zero);
      amx_multiply<true>(group.rows, p.padded_value_size / kPanel, {w.weights + first_depth, w.weights_row},
                         operands.keys.value_pairs.from(first_key - operands.first_value + first_depth),
                         (last_depth - first_depth) / kTileDepth,
                         {base.result + group.row * p.padded_value_size, p.padded_value_size});
      if (call.rel_v.data) add_distances_amx(p, operands, block, tile, group, w);
      if (!dropped && !head.rel_v.nonfinite) continue;
      auto weight = [&](int64_t row, int64_t column) {
        const bool computed = column >= columns.first && column < columns.last;
        return computed ? from_bfloat16(w.weights[(row - group.row) * w.weights_row + column]) : 0.0f;
      };
      if (dropped) add_nonfinite_values(p, head, tile, {group.row, group.row + group.rows}, weight, base);
      if (head.rel_v.nonfinite) add_nonfinite_distances(p, head, block, tile, group, weight, base);
    }
  }
}

static void forward_block_amx(const AmxProblem& p, const AmxHead& operands, AmxWorkspace& w, int64_t index) {
  const Head& head = operands.head;
  const Block block = block_of(p, head.keys, index);
  if (!block.keys.empty()) {
    read_block_amx(p, head, block, w);
    find_edges_amx(p, head, block, w);
  }
  attend_amx(p, operands, block, false, w);
  if (!all_finite(w.base.result, block.rows * p.padded_value_size)) attend_amx(p, operands, block, true, w);
  write_block(p, head, block, w.base);
}

static int64_t carve_amx(const AmxProblem& p, bool once, char* memory, AmxWorkspace& w) {
  Carver carver = {memory, 0};
  w = {};
  const int64_t rows = round_up(p.block_rows, kGroupRows);
  w.content = carver.halves(rows * p.deep_size);
  w.position = p.position_is_content() ? w.content : carver.halves(rows * p.deep_size);
  w.weights_row = p.block_keys + 2 * kWideSlack;
  w.weights = carver.halves(kGroupRows * (w.weights_row + 1)) + kWideSlack;
  if (once) w.keys.key_panels = carver.halves(p.block_keys * p.deep_size);
  w.keys.value_pairs = {carver.halves(p.block_keys * p.padded_value_size), p.block_keys};
  const int64_t widest = most(p.deep_size, p.deep_value_size);
  w.scratch = {carver.halves(kPanel * widest), carver.floats(widest)};
  w.base.scratch = carver.floats(most(2 * p.padded_size, p.padded_value_size));
  w.base.edges = {carver.floats(rows), carver.floats(rows)};
  w.base.row = p.call.attn_mask.data ? carver.floats(p.block_keys) : nullptr;
  w.base.keep = p.dropout.used() ? carver.floats_after(kKeepBefore, p.block_keys + kKeepAfter) : nullptr;
  w.base.scores = carver.floats(kGroupRows * p.leading + 2 * kGroupRows);
  w.base.result = carver.floats(rows * p.padded_value_size);
  w.base.highest = carver.floats(rows);
  w.base.total = carver.floats(rows);
  if (p.call.rel_q.data) {
    const int64_t keys = round_up(p.block_keys, kGroupRows) + kGroupRows, columns = round_up(p.block_rows, kPanel);
    w.key_rows = carver.halves(keys * p.deep_size);
    w.base.key_edges = {carver.floats(keys), carver.floats(keys)};
    w.base.by_key = carver.floats(keys * (columns + 2 * kSlack + 1));
    w.base.by_query = carver.floats(columns * p.leading);
  }
  return carver.used;
}

static int forward_amx(const Call& call, const Team& team) {
  AmxProblem p(call, kBlockRowsBackward, kBlockKeysAmx);
  p.block_keys = round_up(p.block_keys, kTileDepth);
  p.leading = p.block_keys + 2 * kSlack;
  const bool once = used_once(p);
  Memory memory = {team};
  AmxWorkspace* workspaces =
      carve_for_threads<AmxWorkspace>(memory, [&](char* base, AmxWorkspace& w) { return carve_amx(p, once, base, w); });
  const Keys* keys = find_keys(call, memory);
  AmxTables tables = {};
  tables.plan(p, memory, kRelK, kPanelsForm);
  tables.plan(p, memory, kRelQ, kPanelsForm);
  tables.plan(p, memory, kRelV, kNaturalForm);
  tables.plan_bias(p, memory);
  const int64_t panel_halves = panels_of(call.keys) * kPanel * p.deep_size,
                pair_halves = p.deep_keys * p.padded_value_size;
  const int64_t unit_floats = once ? 0 : (panel_halves + pair_halves) / 2, chunk = units_of_chunk(call, unit_floats);
  float* packed = memory.floats(true, chunk * unit_floats);
  if (!memory.enough) return 1;

  tables.pack(p, team, [&](int64_t thread) { return workspaces[thread].scratch; });
  auto keys_of = [&](int64_t place) {
    Half* space = (Half*)(packed + place * unit_floats);
    AmxKeys result = {};
    result.key_panels = space;
    result.value_pairs = {space + panel_halves, p.deep_keys};
    return result;
  };
  in_chunks(
      p, team, chunk, once ? 0 : pack_tasks(p),
      [&](int64_t batch, int64_t key_head, int64_t place, int64_t task, int64_t thread) {
        pack_keys_amx(p, batch, key_head, keys_of(place), task, workspaces[thread].scratch);
      },
      [&](int64_t batch, int64_t index, int64_t place, int64_t block, int64_t thread) {
        forward_block_amx(p, amx_head(p, tables, keys_of(place), batch, index, keys[batch]), workspaces[thread], block);
      });
  return 0;
}

// The forward pass: for each block of queries a running softmax over tiles of keys (Milakov and Gimelshein 2018; Dao et al. 2022), a group
// of rows at a time so that scores never leave the first cache.

// One row's scores [0, columns) become weights; its running maximum, sum and result follow.
INLINE void softmax_row(float* scores, int64_t columns, float& highest, float& total, float* result, int64_t result_size) {
  const float next = most(highest, max_row(scores, columns));
  const float base = next == -kInfinity ? 0.0f : next;  // nothing seen so far: every weight is 0
  Vec sum[4] = {};
  int64_t column = 0;
  const Vec subtracted = splat(base);
  for (; column + 4 * kWidth <= columns; column += 4 * kWidth)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec weight = exp2_nonpositive(load(scores + column + v * kWidth) - subtracted);
      store(scores + column + v * kWidth, weight);
      sum[v] += weight;
    }
  for (; column < columns; column += kWidth) {
    const Vec weight = exp2_nonpositive(load(scores + column) - subtracted);
    store(scores + column, weight);
    sum[0] += weight;
  }
  if (next != highest) {
    const float shrink = exp2_nonpositive(highest - base);
    total *= shrink;
    scale_row(result, shrink, result_size);
    highest = next;
  }
  total += sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]);
}

// Multiply a row's weights by dropout's 1 or 0.
INLINE void drop_row(const Dropout& dropout, const Head& head, int64_t query, int64_t first_key, int64_t columns, float* weights,
                     float* keep) {
  dropout_keep(dropout, head.batch, head.head, query, first_key, first_key + columns, keep);
  for (int64_t column = 0; column < columns; column += kWidth) store(weights + column, load(weights + column) * load(keep + column));
}

// The block's output and log-sum-exp.
static void write_block(const Problem& p, const Head& head, const Block& block, const Workspace& w) {
  const Tensor &output = p.call.output, &lse = p.call.lse;
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t query = block.first + row;
    const float total = w.total[row];
    const float factor = total == 0.0f ? 0.0f : 1.0f / (total * p.dropout.kept_share);
    write_row(output.data, output.dtype, head.batch * output.stride[0] + head.head * output.stride[1] + query * output.stride[2],
              output.stride[3], p.value_size, w.result + row * p.padded_value_size, factor);
    float* logarithm = (float*)lse.data + head.batch * lse.stride[0] + head.head * lse.stride[1] + query * lse.stride[2];
    *logarithm = total == 0.0f ? -kInfinity : (float)(w.highest[row] * kLn2) + __builtin_logf(total);
  }
}

// Pack a tile's keys, and its values if need be, for this one use.
static void pack_tile(const Problem& p, const Tile& tile, Head& head, const Workspace& w) {
  const int64_t key_head = head.head / p.ratio;
  const PanelSource key = p.key_source(head.batch, key_head), value = p.value_source(head.batch, key_head);
  const int64_t first = tile.keys.first / kPanel, last = panels_of(tile.keys.last);
  for (int64_t panel = first; panel < last; ++panel) pack_panel(key, panel, w.keys + (panel * kPanel - tile.first_key) * p.size, w.scratch);
  head.key_panels = w.keys;
  head.first_key = tile.first_key;
  if (!w.values) return;
  for (int64_t row = tile.keys.first; row < tile.keys.last; ++row)
    read_padded(value.matrix, row, p.value_size, p.padded_value_size, w.values + (row - tile.first_key) * p.padded_value_size);
  head.value = {w.values, p.padded_value_size, kPanel};
  head.first_value = tile.first_key;
}

static void forward_block(const Problem& p, Head head, Workspace& w, int64_t index) {
  const Call& call = p.call;
  const Block block = prepare_block(p, head, w, index);
  fill(w.result, 0.0f, block.rows * p.padded_value_size);
  fill(w.highest, -kInfinity, block.rows);
  fill(w.total, 0.0f, block.rows);
  const Result scores = {w.scores + kSlack, p.leading};
  Tile tile;
  for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last; first_key += p.block_keys) {
    cut_tile(p, head, block, first_key, kRows, tile);
    if (tile_hidden(p, head, block, tile.keys)) continue;
    if (w.keys) pack_tile(p, tile, head, w);
    tile_scores(p, head, block, tile, w, scores);
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t begin = group.columns.first, columns = group.columns.last - begin;
      for (int64_t row = group.row; row < group.row + group.rows; ++row) {
        float* weights = scores.data + row * scores.row + begin;
        softmax_row(weights, columns, w.highest[row], w.total[row], w.result + row * p.padded_value_size, p.padded_value_size);
        if (p.dropout.used()) drop_row(p.dropout, head, block.first + row, first_key + begin, columns, weights, w.keep);
        if (call.rel_v.data) {
          fill(weights - kPanel, 0.0f, kPanel);
          fill(weights + columns, 0.0f, kPanel);
        }
      }
    }
    const Result result = {w.result, p.padded_value_size};
    const Right value = {head.value.data + (first_key - head.first_value) * head.value.k, head.value.k, head.value.panel};
    add_over_columns(tile, scores, value, p.padded_value_size, result);
    if (call.rel_v.data) add_over_distances(tile, block, scores, head.rel_v, p.padded_value_size, result);
  }
  write_block(p, head, block, w);
}

// One block of queries per head of keys, as in decoding: keys and values are packed a tile at a time where they are used.
static bool used_once(const Problem& p) { return p.query_blocks() == 1 && p.ratio == 1; }
static bool values_in_place(const Problem& p) { return readable_in_place(matrix(p.call.value, 0, 0), p.call.keys, p.value_size); }

static int64_t carve_forward(const Problem& p, char* base, Workspace& w) {
  Carver carver = {base, 0};
  w = {};
  carve_scores(p, carver, w);
  w.scores = carver.floats(p.block_rows * p.leading);
  if (used_once(p)) {
    w.keys = carver.floats(p.block_keys * p.size);
    w.values = values_in_place(p) ? nullptr : carver.floats(p.block_keys * p.padded_value_size);
  }
  w.result = carver.floats(p.block_rows * p.padded_value_size);
  w.highest = carver.floats(p.block_rows);
  w.total = carver.floats(p.block_rows);
  return carver.used;
}

// Bytes of packed keys and values that are held at once; one head's at least.
constexpr int64_t kPackedBytes = (int64_t)16 << 20;

// A tile of scores, and the keys, values and table rows it meets, should stay in the second cache.
constexpr int64_t kLargeCache = (int64_t)3 << 19, kBlockKeysLarge = 768, kBlockKeysSmall = 256;

// Large blocks read the keys less often; few of them would leave threads without work. (Not a question of how many threads there are: a
// result should not depend on that.)
static int64_t rows_of_block(const Call& call) {
  int64_t rows = kBlockRows;
  while (rows > 48 && call.batch * call.heads * ((call.queries + rows - 1) / rows) < 64) rows /= 2;
  return rows;
}

static int forward(const Call& call, const Team& team) {
  const Problem p(call, rows_of_block(call), team.cache_bytes >= kLargeCache ? kBlockKeysLarge : kBlockKeysSmall);
  const int64_t threads = team.threads, batch = call.batch, key_heads = call.key_heads;
  Workspace probe;
  const int64_t workspace_floats = carve_forward(p, nullptr, probe) / 4;
  Workspace* workspaces = (Workspace*)allocate(team, threads * (int64_t)sizeof(Workspace) / 4);
  float** scratch = (float**)allocate(team, threads * (int64_t)sizeof(float*) / 4);
  Keys* keys = (Keys*)allocate(team, batch * (int64_t)sizeof(Keys) / 4);
  float* holes = call.key_mask.data ? allocate(team, batch * call.keys) : nullptr;
  if (!workspaces || !scratch || !keys || (call.key_mask.data && !holes)) return 1;
  for (int64_t thread = 0; thread < threads; ++thread) {
    float* memory = allocate(team, workspace_floats);
    if (!memory) return 1;
    carve_forward(p, (char*)memory, workspaces[thread]);
    scratch[thread] = workspaces[thread].scratch;
  }
  for (int64_t b = 0; b < batch; ++b) keys[b] = visible_keys(call, b, holes ? holes + b * call.keys : nullptr);

  Tables tables;
  if (!plan_table(p, team, call.rel_k, call.rel_bias, p.rel_k_source(0), call.left, true, false, tables.rel_k) ||
      !plan_table(p, team, call.rel_q, Tensor{}, p.rel_q_source(0), call.right, true, false, tables.rel_q) ||
      !plan_table(p, team, call.rel_v, Tensor{}, p.rel_v_source(0), call.left, false, true, tables.rel_v))
    return 1;
  pack_tables(p, team, keys, tables, scratch);

  const int64_t units = batch * key_heads, panel_floats = panels_of(call.keys) * kPanel * p.size,
                row_floats = call.keys * p.padded_value_size;
  const bool once = used_once(p), in_place = values_in_place(p);
  const int64_t unit_floats = once ? 0 : panel_floats + (in_place ? 0 : row_floats);
  const int64_t chunk = clamp<int64_t>(kPackedBytes / 4 / most<int64_t>(unit_floats, 1), 1, units);
  float* packed = allocate(team, chunk * unit_floats);
  if (!packed) return 1;
  const int64_t blocks = p.query_blocks();
  for (int64_t start = 0; start < units; start += chunk) {
    const int64_t count = least(chunk, units - start);
    auto pack_of = [&](int64_t index) {
      float* memory = packed + index * unit_floats;
      return KeyPack{memory, nullptr, nullptr, in_place ? nullptr : memory + panel_floats};
    };
    const int64_t tasks = once ? 0 : pack_tasks(p);
    parallel(team, count * tasks, [&](int64_t index, int64_t thread) {
      const int64_t unit = start + index / tasks;
      pack_keys(p, unit / key_heads, unit % key_heads, pack_of(index / tasks), index % tasks, scratch[thread]);
    });
    // The last blocks of a causal call take longest: they come first.
    parallel(team, count * p.ratio * blocks, [&](int64_t index, int64_t thread) {
      const int64_t block = blocks - 1 - index % blocks, local = index / blocks / p.ratio, unit = start + local;
      const int64_t b = unit / key_heads, key_head = unit % key_heads, h = key_head * p.ratio + index / blocks % p.ratio;
      const KeyPack pack = pack_of(local);
      Head head = {};
      head.batch = b;
      head.head = h;
      head.keys = keys[b];
      head.key_panels = pack.key_panels;
      head.value = rows_of(matrix(call.value, b, key_head), once ? nullptr : pack.value_rows, p.padded_value_size);
      head.rel_k = tables.rel_k.table(p.rel_k_source(h), h);
      head.rel_q = tables.rel_q.table(p.rel_q_source(h), h);
      head.rel_v = tables.rel_v.table(p.rel_v_source(h), h);
      forward_block(p, head, workspaces[thread], block);
    });
  }
  return 0;
}

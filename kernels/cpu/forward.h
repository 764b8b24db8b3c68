// The forward pass: for each block of queries a running softmax over tiles of keys (Milakov and Gimelshein 2018; Dao et
// al. 2022), a group of rows at a time so that scores never leave the first cache.

// A row's softmax so far: its highest score, the sum of 2^(score - highest), and what is summed with these weights.
struct RunningRow {
  float &highest, &total;
  float* result;
  int64_t size;

  // What is subtracted from a score when some have `highest` for their maximum: every weight is 0 if nothing was seen.
  static float base_of(float highest) { return highest == -kInfinity ? 0.0f : highest; }

  // Weights with a new maximum, whose sum is `added`, come to those so far.
  void add(float next, float added) {
    if (next != highest) {
      const float shrink = exp2_nonpositive(highest - base_of(next));
      total *= shrink;
      scale_row(result, shrink, size);
      highest = next;
    }
    total += added;
  }
};

// One row's scores [0, columns) become weights.
INLINE void softmax_row(float* scores, int64_t columns, RunningRow running) {
  const float next = most(running.highest, max_row(scores, columns));
  Vec sum[4] = {};
  int64_t column = 0;
  const Vec subtracted = splat(RunningRow::base_of(next));
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
  running.add(next, sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]));
}

// Multiply a row's weights by dropout's 1 or 0.
INLINE void drop_row(const Dropout& dropout, const Head& head, int64_t query, int64_t first_key, int64_t columns,
                     float* weights, float* keep) {
  dropout_keep(dropout, head.batch, head.head, query, first_key, first_key + columns, keep);
  for (int64_t column = 0; column < columns; column += kWidth)
    store(weights + column, load(weights + column) * load(keep + column));
}

// The block's output and log-sum-exp.
static void write_block(const Problem& p, const Head& head, const Block& block, const Workspace& w) {
  const Matrix output = matrix(p.call.output, head.batch, head.head);
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t query = block.first + row;
    const float total = w.total[row];
    const float factor = total == 0.0f ? 0.0f : 1.0f / (total * p.dropout.kept_share);
    write_row(output, query, p.value_size, w.result + row * p.padded_value_size, factor);
    element(p.call.lse, head.batch, head.head, query) =
        total == 0.0f ? -kInfinity : (float)(w.highest[row] * kLn2) + __builtin_logf(total);
  }
}

// Pack a tile's keys for this one use.
static void pack_tile_keys(const Problem& p, const Tile& tile, Head& head, const Workspace& w) {
  const PanelSource key = p.key_source(head.batch, head.head / p.ratio);
  const int64_t first = tile.keys.first / kPanel, last = panels_of(tile.keys.last);
  for (int64_t panel = first; panel < last; ++panel)
    pack_panel(key, panel, w.keys + (panel * kPanel - tile.first_key) * p.size, w.scratch);
  head.key_panels = w.keys;
  head.first_key = tile.first_key;
}

// The same of its values. `finite`: with zeros for what is not; returns whether there was such.
static bool pack_tile_values(const Problem& p, const Tile& tile, bool finite, Head& head, const Workspace& w) {
  const PanelSource value = p.value_source(head.batch, head.head / p.ratio);
  bool dropped = false;
  for (int64_t row = tile.keys.first; row < tile.keys.last; ++row) {
    float* to = w.values + (row - tile.first_key) * p.padded_value_size;
    read_padded(value.matrix, row, p.value_size, p.padded_value_size, to);
    if (!finite || all_finite(to, p.value_size)) continue;
    drop_nonfinite(to, p.value_size);
    dropped = true;
  }
  head.value = {w.values, p.padded_value_size, kPanel};
  head.first_value = tile.first_key;
  return dropped;
}

// What pack_tile_values dropped comes to those of these rows that give it weight. weight(row, column): of a tile.
template <class Weight>
static void add_nonfinite_values(const Problem& p, const Head& head, const Tile& tile, const Range& rows,
                                 const Weight& weight, const Workspace& w) {
  const Matrix values = p.value_source(head.batch, head.head / p.ratio).matrix;
  for (int64_t key = tile.keys.first; key < tile.keys.last; ++key)
    for (int64_t d = 0; d < p.value_size; ++d) {
      const float value = read_element(values.data, values.dtype, values.first + key * values.row + d * values.column);
      if (value * 0.0f == 0.0f) continue;
      for (int64_t row = rows.first; row < rows.last; ++row) {
        const float share = weight(row, key - tile.first_key);
        if (share != 0.0f) w.result[row * p.padded_value_size + d] += share * value;
      }
    }
}

// One block of queries per head of keys, as in decoding: keys and values are packed a tile at a time, where used.
static bool used_once(const Problem& p) { return p.query_blocks() == 1 && p.ratio == 1; }
static bool values_in_place(const Problem& p) {
  return readable_in_place(matrix(p.call.value, 0, 0), p.call.keys, p.value_size);
}

// What rel_v's natural form leaves out comes to those rows of a group that give it weight. weight(row, column): of a
// tile.
template <class Weight>
static void add_nonfinite_distances(const Problem& p, const Head& head, const Block& block, const Tile& tile,
                                    const Group& group, const Weight& weight, const Workspace& w) {
  const Matrix table = p.table_source(kRelV, head.head).matrix;
  const int64_t shift = lay_over(head.rel_v, block.rows, block.position, tile.first_key).shift;
  for (int64_t table_row = 0; table_row < p.call.rows; ++table_row) {
    read_row(table, table_row, p.value_size, w.scratch);
    if (all_finite(w.scratch, p.value_size)) continue;
    for (int64_t row = group.row; row < group.row + group.rows; ++row)
      for (int64_t column = group.seen.first; column < group.seen.last; ++column) {
        const float share = weight(row, column);
        if (share == 0.0f || clamp<int64_t>(column - row - shift, 0, p.call.rows - 1) != table_row) continue;
        for (int64_t d = 0; d < p.value_size; ++d)
          if (w.scratch[d] * 0.0f != 0.0f) w.result[row * p.padded_value_size + d] += share * w.scratch[d];
      }
  }
}

// The block's result, maximum and sum. `apart`: numbers of the values that are not finite are added by themselves,
// where they have weight: a product would multiply them by the zeros of those who do not see them.
static void attend(const Problem& p, Head head, const Block& block, bool apart, Workspace& w) {
  const Call& call = p.call;
  fill(w.result, 0.0f, block.rows * p.padded_value_size);
  fill(w.highest, -kInfinity, block.rows);
  fill(w.total, 0.0f, block.rows);
  const Result scores = {w.scores + kSlack, p.leading};
  Tile tile;
  for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last; first_key += p.block_keys) {
    cut_tile(p, head, block, first_key, kRows, tile);
    if (tile_hidden(p, head, block, tile.keys)) continue;
    if (w.keys) pack_tile_keys(p, tile, head, w);
    bool dropped = false;
    if (apart || (w.keys && !values_in_place(p))) dropped = pack_tile_values(p, tile, apart, head, w);
    tile_scores(p, head, block, tile, w, scores);
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t begin = group.columns.first, columns = group.columns.last - begin;
      for (int64_t row = group.row; row < group.row + group.rows; ++row) {
        float* weights = scores.data + row * scores.row + begin;
        softmax_row(weights, columns,
                    {w.highest[row], w.total[row], w.result + row * p.padded_value_size, p.padded_value_size});
        if (p.dropout.used()) drop_row(p.dropout, head, block.first + row, first_key + begin, columns, weights, w.keep);
        if (call.rel_v.data) {
          fill(weights - kPanel, 0.0f, kPanel);
          fill(weights + columns, 0.0f, kPanel);
        }
      }
    }
    const Result result = {w.result, p.padded_value_size};
    add_over_columns(tile, scores, head.value.from(first_key - head.first_value), p.padded_value_size, result);
    if (call.rel_v.data) add_over_distances(block, tile, scores, head.rel_v, p.padded_value_size, result);
    for (int g = 0; g < tile.count && (dropped || head.rel_v.nonfinite); ++g) {
      const Group& group = tile.groups[g];
      auto weight = [&](int64_t row, int64_t column) {
        const bool computed = column >= group.columns.first && column < group.columns.last;
        return computed ? scores.data[row * scores.row + column] : 0.0f;
      };
      if (dropped) add_nonfinite_values(p, head, tile, {group.row, group.row + group.rows}, weight, w);
      if (head.rel_v.nonfinite) add_nonfinite_distances(p, head, block, tile, group, weight, w);
    }
  }
}

static void forward_block(const Problem& p, const Head& head, Workspace& w, int64_t index) {
  const Block block = block_of(p, head.keys, index);
  if (!block.keys.empty()) {
    read_block(p, head, block, w);
    find_edges(p, head, block, w);
  }
  attend(p, head, block, false, w);
  if (!all_finite(w.result, block.rows * p.padded_value_size)) attend(p, head, block, true, w);
  write_block(p, head, block, w);
}

static int64_t carve_forward(const Problem& p, char* base, Workspace& w) {
  Carver carver = {base, 0};
  w = {};
  carve_scores(p, carver, w);
  w.scores = carver.floats(p.block_rows * p.leading);
  w.keys = used_once(p) ? carver.floats(p.block_keys * p.size) : nullptr;
  w.values = carver.floats(p.block_keys * p.padded_value_size);
  w.result = carver.floats(p.block_rows * p.padded_value_size);
  w.highest = carver.floats(p.block_rows);
  w.total = carver.floats(p.block_rows);
  return carver.used;
}

// Bytes of packed keys and values that are held at once; one head's at least.
constexpr int64_t kPackedBytes = (int64_t)16 << 20;

// A tile of scores, and the keys, values and table rows it meets, should stay in the second cache.
constexpr int64_t kLargeCache = (int64_t)3 << 19, kBlockKeysLarge = 768, kBlockKeysSmall = 256;

// Large blocks read the keys less often; few of them would leave threads without work. (Not a question of how many
// threads there are: a result should not depend on that.)
static int64_t rows_of_block(const Call& call) {
  int64_t rows = kBlockRows;
  while (rows > 48 && call.batch * call.heads * ((call.queries + rows - 1) / rows) < 64) rows /= 2;
  return rows;
}

// Units are the key heads of all batch elements. Those whose packed keys and values are held at once make a chunk:
// pack(batch, key_head, place in the chunk, task, thread) packs, then work(batch, head, place, block, thread) uses it.
template <class Pack, class Work>
static void in_chunks(const Problem& p, const Team& team, int64_t chunk, int64_t tasks, const Pack& pack,
                      const Work& work) {
  const int64_t key_heads = p.call.key_heads, units = p.call.batch * key_heads, blocks = p.query_blocks();
  for (int64_t start = 0; start < units; start += chunk) {
    const int64_t count = least(chunk, units - start);
    parallel(team, count * tasks, [&](int64_t index, int64_t thread) {
      const int64_t place = index / tasks, unit = start + place;
      pack(unit / key_heads, unit % key_heads, place, index % tasks, thread);
    });
    // The last blocks of a causal call take longest: they come first.
    parallel(team, count * p.ratio * blocks, [&](int64_t index, int64_t thread) {
      const int64_t block = blocks - 1 - index % blocks, place = index / blocks / p.ratio, unit = start + place;
      work(unit / key_heads, unit % key_heads * p.ratio + index / blocks % p.ratio, place, block, thread);
    });
  }
}

// How many units, of this many floats when packed, make a chunk.
INLINE int64_t units_of_chunk(const Call& call, int64_t unit_floats) {
  return clamp<int64_t>(kPackedBytes / 4 / most<int64_t>(unit_floats, 1), 1, call.batch * call.key_heads);
}

static int forward(const Call& call, const Team& team) {
  const Problem p(call, rows_of_block(call), team.cache_bytes >= kLargeCache ? kBlockKeysLarge : kBlockKeysSmall);
  Memory memory = {team};
  Workspace* workspaces =
      carve_for_threads<Workspace>(memory, [&](char* base, Workspace& w) { return carve_forward(p, base, w); });
  const Keys* keys = find_keys(call, memory);
  Tables tables;
  tables.plan(p, memory, kRelK, kPanelsForm);
  tables.plan(p, memory, kRelQ, kPanelsForm);
  tables.plan(p, memory, kRelV, kNaturalForm);
  const int64_t panel_floats = panels_of(call.keys) * kPanel * p.size, row_floats = call.keys * p.padded_value_size;
  const bool once = used_once(p), in_place = values_in_place(p);
  const int64_t unit_floats = once ? 0 : panel_floats + (in_place ? 0 : row_floats);
  const int64_t chunk = units_of_chunk(call, unit_floats);
  float* packed = memory.floats(true, chunk * unit_floats);
  if (!memory.enough) return 1;

  pack_tables(p, team, keys, tables, workspaces);
  auto pack_of = [&](int64_t place) {
    float* space = packed + place * unit_floats;
    return KeyPack{space, nullptr, nullptr, in_place ? nullptr : space + panel_floats};
  };
  in_chunks(
      p, team, chunk, once ? 0 : pack_tasks(p),
      [&](int64_t batch, int64_t key_head, int64_t place, int64_t task, int64_t thread) {
        pack_keys(p, batch, key_head, pack_of(place), task, workspaces[thread].scratch);
      },
      [&](int64_t batch, int64_t index, int64_t place, int64_t block, int64_t thread) {
        const KeyPack pack = pack_of(place);
        Head head = tables.head(p, batch, index, keys[batch]);
        head.key_panels = pack.key_panels;
        head.value =
            rows_of(matrix(call.value, batch, index / p.ratio), once ? nullptr : pack.value_rows, p.padded_value_size);
        forward_block(p, head, workspaces[thread], block);
      });
  return 0;
}

// Packing the operands that blocks of queries share: tables once for a call, keys and values once for each of their heads.

// task(index, thread) for index 0 ... count - 1, in parallel.
template <class Task>
static void parallel(const Team& team, int64_t count, const Task& task) {
  if (count <= 1 || team.threads == 1) {
    for (int64_t index = 0; index < count; ++index) task(index, 0);
    return;
  }
  auto call = [](void* context, int64_t index, int64_t thread) { (*(const Task*)context)(index, thread); };
  team.run(team, count, call, (void*)&task);
}

INLINE float* allocate(const Team& team, int64_t floats) { return (float*)team.allocate(team, round_up(most<int64_t>(floats, 1) * 4, 64)); }

constexpr int64_t kPanelsOfTask = 32;

// One of rel_k (with rel_bias), rel_q and rel_v, packed for all the heads that differ.
struct PackedTable {
  bool used, per_head, natural_in_place;
  int64_t rows, left, depth, padded;  // depth of the panels; stride of the natural rows
  int64_t panel_floats;               // of one head
  float *panels, *natural;

  Table table(const PanelSource& source, int64_t head) const {
    if (!used) return {};
    const int64_t index = per_head ? head : 0;
    Table result = {panels + index * panel_floats, nullptr, padded, depth, rows, left};
    if (natural_in_place) {
      result.natural = (const float*)source.matrix.data + source.matrix.first;
      result.natural_stride = source.matrix.row;
    } else if (natural) {
      result.natural = natural + index * rows * padded;
    }
    return result;
  }
};

struct Tables {
  PackedTable rel_k, rel_q, rel_v;
};

// `panels` and `natural`: which forms are needed. False: out of memory.
static bool plan_table(const Problem& p, const Team& team, const Tensor& table, const Tensor& bias, const PanelSource& source, int64_t left,
                       bool panels, bool natural, PackedTable& packed) {
  packed = {};
  packed.used = source.depth() > 0;
  if (!packed.used) return true;
  packed.per_head = (table.data && table.stride[1] != 0) || (bias.data && bias.stride[1] != 0);
  packed.rows = p.call.rows;
  packed.left = left;
  packed.depth = source.depth();
  packed.padded = round_up(packed.depth, kPanel);
  packed.panel_floats = source.floats();
  const int64_t heads = packed.per_head ? p.call.heads : 1;
  if (panels && !(packed.panels = allocate(team, heads * packed.panel_floats))) return false;
  packed.natural_in_place = natural && !bias.data && !source.reversed && readable_in_place(source.matrix, packed.rows, source.size);
  if (natural && !packed.natural_in_place && !(packed.natural = allocate(team, heads * packed.rows * packed.padded))) return false;
  return true;
}

// Rows [first, last) of the natural form; the bias stands in the column after the table's.
static void pack_natural(const PanelSource& source, int64_t first, int64_t last, int64_t padded, float* to) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t from = source.reversed ? source.rows - 1 - row : row;
    float* target = to + row * padded;
    const int64_t size = source.matrix.data ? source.size : 0;
    if (size > 0) {
      read_padded(source.matrix, from, size, padded, target);
      if (source.factor != 1.0f) scale_row(target, source.factor, size);
    }
    fill(target + size, 0.0f, padded - size);  // a bias is no part of the products with natural rows
  }
}

// The table's rows that distances of the call can reach, in whole panels: one query against many keys needs half of a table at most.
static Range reached_panels(const Problem& p, const Keys* keys, bool reversed) {
  int64_t lowest = p.call.rows - 1, highest = 0;
  for (int64_t b = 0; b < p.call.batch; ++b) {
    const int64_t first = table_position(keys[b], 0), last = table_position(keys[b], p.call.queries - 1);
    lowest = least(lowest, clamp<int64_t>(keys[b].range.first - last + p.call.left, 0, p.call.rows - 1));
    highest = most(highest, clamp<int64_t>(keys[b].range.last - 1 - first + p.call.left, 0, p.call.rows - 1));
  }
  if (reversed) {
    const int64_t swapped = p.call.rows - 1 - highest;
    highest = p.call.rows - 1 - lowest;
    lowest = swapped;
  }
  // Products cover whole panels of columns, so that they read up to 15 rows more on either side.
  return {most<int64_t>(lowest / kPanel - 1, 0), least(highest / kPanel + 2, panels_of(p.call.rows))};
}

// Pack all tables that are in use, in parallel. The forms were planned.
static void pack_tables(const Problem& p, const Team& team, const Keys* keys, const Tables& tables, float* const* scratch) {
  struct Job {
    const PackedTable* packed;
    int kind;
    int64_t heads, chunks;
    Range panels;
  };
  Job jobs[3];
  int64_t total = 0;
  int used = 0;
  const PackedTable* all[3] = {&tables.rel_k, &tables.rel_q, &tables.rel_v};
  for (int kind = 0; kind < 3; ++kind) {
    if (!all[kind]->used) continue;
    const Range panels = reached_panels(p, keys, kind == 1);
    jobs[used++] = {all[kind], kind, all[kind]->per_head ? p.call.heads : 1,
                    (panels.last - panels.first + kPanelsOfTask - 1) / kPanelsOfTask, panels};
    total += jobs[used - 1].heads * jobs[used - 1].chunks;
  }
  parallel(team, total, [&](int64_t index, int64_t thread) {
    int job = 0;
    while (index >= jobs[job].heads * jobs[job].chunks) index -= jobs[job].heads * jobs[job].chunks, ++job;
    const PackedTable& packed = *jobs[job].packed;
    const int64_t head = index / jobs[job].chunks, first = jobs[job].panels.first + index % jobs[job].chunks * kPanelsOfTask;
    const int64_t last = least(first + kPanelsOfTask, jobs[job].panels.last);
    const PanelSource source = jobs[job].kind == 0   ? p.rel_k_source(head)
                               : jobs[job].kind == 1 ? p.rel_q_source(head)
                                                     : p.rel_v_source(head);
    if (packed.panels)
      for (int64_t panel = first; panel < last; ++panel)
        pack_panel(source, panel, packed.panels + head * packed.panel_floats + panel * kPanel * packed.depth, scratch[thread]);
    if (packed.natural)
      pack_natural(source, first * kPanel, least(last * kPanel, packed.rows), packed.padded,
                   packed.natural + head * packed.rows * packed.padded);
  });
}

// Keys and values of one key head of one batch element, in the forms that are planned (null: not needed).
struct KeyPack {
  float *key_panels, *key_rows, *value_panels, *value_rows;
};

INLINE int64_t pack_tasks(const Problem& p) { return (panels_of(p.call.keys) + kPanelsOfTask - 1) / kPanelsOfTask; }

INLINE Range keys_of_task(const Problem& p, int64_t task) {
  return {task * kPanelsOfTask * kPanel, least((task + 1) * kPanelsOfTask * kPanel, p.call.keys)};
}

static void pack_keys(const Problem& p, int64_t batch, int64_t key_head, const KeyPack& pack, int64_t task, float* scratch) {
  const PanelSource key = p.key_source(batch, key_head), value = p.value_source(batch, key_head);
  const int64_t first = task * kPanelsOfTask, last = least(first + kPanelsOfTask, panels_of(p.call.keys));
  const int64_t first_row = first * kPanel, last_row = least(last * kPanel, p.call.keys);
  for (int64_t panel = first; panel < last; ++panel) {
    if (pack.key_panels) pack_panel(key, panel, pack.key_panels + panel * kPanel * p.size, scratch);
    if (pack.value_panels) pack_panel(value, panel, pack.value_panels + panel * kPanel * p.value_size, scratch);
  }
  if (pack.key_rows) pack_natural(key, first_row, last_row, p.padded_size, pack.key_rows);
  if (pack.value_rows) pack_natural(value, first_row, last_row, p.padded_value_size, pack.value_rows);
}

// How products over the keys read a head's rows: where they are, or packed.
INLINE Right rows_of(const Matrix& m, const float* packed, int64_t padded) {
  if (packed) return {packed, padded, kPanel};
  return {(const float*)m.data + m.first, m.row, kPanel};
}

// Packing the operands that blocks of queries share: tables once a call, keys and values once for each of their heads.

constexpr int64_t kPanelsOfTask = 32;

INLINE int64_t tasks_of(int64_t panels) { return (panels + kPanelsOfTask - 1) / kPanelsOfTask; }

// The forms of a table (see Table) for each head, or once for all heads that share it.
struct PackedTable {
  bool used, per_head, natural_in_place;
  int64_t depth, padded;  // of a row: with rel_bias, and rounded up to whole panels
  PerHead<float> panels, natural;
  bool* nonfinite;  // whether some row is; then the natural form is packed, with zeros for what is not
};

enum Forms { kPanelsForm = 1, kNaturalForm = 2 };

struct Tables {
  PackedTable packed[3];

  const PackedTable& operator[](TableName name) const { return packed[name]; }

  // How a table's rows are laid out, and memory for the forms that are needed.
  void plan(const Problem& p, Memory& memory, TableName name, int forms) {
    PackedTable& table = packed[name];
    const PanelSource source = p.table_source(name, 0);
    table = {};
    table.used = source.depth() > 0;
    if (!table.used) return;
    table.per_head = p.table_per_head(name);
    table.depth = source.depth();
    table.padded = round_up(table.depth, kPanel);
    table.natural_in_place = (forms & kNaturalForm) && !source.bias.data && !source.reversed &&
                             readable_in_place(source.matrix, source.rows, source.size);
    const int64_t heads = table.per_head ? p.call.heads : 1, natural = source.rows * table.padded;
    table.panels.data = memory.floats(forms & kPanelsForm, heads * source.floats());
    table.natural.data = memory.floats(forms & kNaturalForm, heads * natural);
    table.nonfinite = memory.array<bool>(1);
    if (table.nonfinite) *table.nonfinite = false;
    if (table.per_head) table.panels.stride = source.floats(), table.natural.stride = natural;
  }

  Table table(const Problem& p, TableName name, int64_t head) const {
    const PackedTable& of = packed[name];
    if (!of.used) return {};
    const int64_t left = name == kRelQ ? p.call.right : p.call.left;  // rel_q is packed reversed
    Table result = {of.panels.of(head), of.natural.of(head), of.padded, of.depth, p.call.rows, left, *of.nonfinite};
    if (of.natural_in_place && !*of.nonfinite) {
      const Matrix rows = p.table_source(name, head).matrix;
      result.natural = (const float*)rows.data + rows.first;
      result.natural_stride = rows.row;
    }
    return result;
  }

  // A query head of a batch element with its tables.
  Head head(const Problem& p, int64_t batch, int64_t index, const Keys& keys) const {
    Head result = {};
    result.batch = batch;
    result.head = index;
    result.keys = keys;
    result.rel_k = table(p, kRelK, index);
    result.rel_q = table(p, kRelQ, index);
    result.rel_v = table(p, kRelV, index);
    return result;
  }
};

// Whether rows [first, last) of what is read in place are finite.
static bool rows_finite(const Matrix& m, int64_t first, int64_t last, int64_t size) {
  bool finite = true;
  for (int64_t row = first; row < last; ++row) finite &= all_finite((const float*)m.data + m.first + row * m.row, size);
  return finite;
}

// The same of what is packed, where infinities and NaN become zeros.
static bool drop_nonfinite_rows(float* rows, int64_t count, int64_t padded) {
  if (all_finite(rows, count * padded)) return true;
  drop_nonfinite(rows, count * padded);
  return false;
}

// Rows [first, last) of the natural form. A bias is no part of the products with it: zeros stand in its column.
static void pack_natural(const PanelSource& source, int64_t first, int64_t last, int64_t padded, float* to) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t from = source.reversed ? source.rows - 1 - row : row;
    float* target = to + row * padded;
    const int64_t size = source.matrix.data ? source.size : 0;
    if (size > 0) {
      read_padded(source.matrix, from, size, padded, target);
      if (source.factor != 1.0f) scale_row(target, source.factor, size);
    }
    fill(target + size, 0.0f, padded - size);
  }
}

// The table's rows that distances of the call can reach, in whole panels: one query against many keys needs half of a
// table at most.
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

// In parallel. `again`: also what was to be read in place, but cannot.
static void pack_tables(const Problem& p, const Team& team, const Keys* keys, const Tables& tables,
                        const Workspace* workspaces, bool again) {
  struct Job {
    TableName name;
    int64_t heads, tasks;
    Range panels;
  };
  Job jobs[3];
  int64_t total = 0;
  int used = 0;
  for (TableName name : kTables) {
    if (!tables[name].used) continue;
    const Range panels = reached_panels(p, keys, name == kRelQ);
    const Job job = {name, tables[name].per_head ? p.call.heads : 1, tasks_of(panels.last - panels.first), panels};
    jobs[used++] = job;
    total += job.heads * job.tasks;
  }
  parallel(team, total, [&](int64_t index, int64_t thread) {
    const Job* job = jobs;
    while (index >= job->heads * job->tasks) index -= job->heads * job->tasks, ++job;
    const PackedTable& packed = tables[job->name];
    const int64_t head = index / job->tasks, first = job->panels.first + index % job->tasks * kPanelsOfTask;
    const int64_t last = least(first + kPanelsOfTask, job->panels.last);
    const PanelSource source = p.table_source(job->name, head);
    if (packed.panels.data)
      for (int64_t panel = first; panel < last; ++panel)
        pack_panel(source, panel, packed.panels.of(head) + panel * kPanel * packed.depth, workspaces[thread].scratch);
    const int64_t first_row = first * kPanel, last_row = least(last * kPanel, source.rows);
    bool finite = true;
    if (packed.natural_in_place && !again) {
      finite = rows_finite(source.matrix, first_row, last_row, source.size);
    } else if (packed.natural.data) {
      pack_natural(source, first_row, last_row, packed.padded, packed.natural.of(head));
      finite =
          drop_nonfinite_rows(packed.natural.of(head) + first_row * packed.padded, last_row - first_row, packed.padded);
    }
    if (!finite) __atomic_store_n(packed.nonfinite, true, __ATOMIC_RELAXED);
  });
}

// Pack all tables that are in use. The forms were planned.
static void pack_tables(const Problem& p, const Team& team, const Keys* keys, const Tables& tables,
                        const Workspace* workspaces) {
  pack_tables(p, team, keys, tables, workspaces, false);
  bool again = false;
  for (TableName name : kTables) again |= tables[name].used && tables[name].natural_in_place && *tables[name].nonfinite;
  if (again) pack_tables(p, team, keys, tables, workspaces, true);
}

// Keys and values of one key head of one batch element, in the forms that are planned (null: not needed).
struct KeyPack {
  float *key_panels, *key_rows, *value_panels, *value_rows;
};

INLINE int64_t pack_tasks(const Problem& p) { return tasks_of(panels_of(p.call.keys)); }

INLINE Range keys_of_task(const Problem& p, int64_t task) {
  return {task * kPanelsOfTask * kPanel, least((task + 1) * kPanelsOfTask * kPanel, p.call.keys)};
}

static void pack_keys(const Problem& p, int64_t batch, int64_t key_head, const KeyPack& pack, int64_t task,
                      float* scratch) {
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

// Whether some of these keys are not finite; they are a tile's, and so of two tasks at most.
INLINE bool some_nonfinite(const Head& head, const Range& keys) {
  return head.nonfinite[keys.first / kPanel / kPanelsOfTask] ||
         head.nonfinite[(keys.last - 1) / kPanel / kPanelsOfTask];
}

// How products over the keys read a head's rows: where they are, or packed.
INLINE Right rows_of(const Matrix& m, const float* packed, int64_t padded) {
  if (packed) return {packed, padded, kPanel};
  return {(const float*)m.data + m.first, m.row, kPanel};
}

// Which keys each batch element's queries may see.
static const Keys* find_keys(const Call& call, Memory& memory) {
  Keys* keys = memory.array<Keys>(call.batch);
  float* holes = memory.floats(call.key_mask.data, call.batch * call.keys);
  for (int64_t b = 0; memory.enough && b < call.batch; ++b)
    keys[b] = visible_keys(call, b, holes ? holes + b * call.keys : nullptr);
  return keys;
}

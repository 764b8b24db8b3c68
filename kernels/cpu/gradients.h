// Who computes which gradients, so that every sum has one owner and the result depends on the number of threads only.
//
// A unit is a key head of a batch element with its query heads; where tables differ by head, of all batch elements (a head's table gradient
// then has one owner too). Units are dealt out one to a thread, as long as there are enough. The last ones are each shared by a team: member
// m has its own queries all the time, and in step s the keys of part (m + s) mod team, so that no two members ever add to the same keys. To
// even out causal masks both are cut in 2 x team pieces, and piece i goes with piece 2 x team - 1 - i.

// Sums of one member. Tables with one gradient per head are flushed when their unit is done, the others at the end of the call.
struct Sums {
  float *rel_k, *rel_q, *rel_v;         // ratio heads where they differ by head, else 1
  float *rel_k_shared;                  // rel_k and rel_bias where only one of them differs by head: what the other sums over heads
  float *pos_bias_u, *pos_bias_v;       // (Hq, D)
};

// Memory of a unit while it is worked on.
struct Unit {
  KeyPack pack;
  float *key_gradient, *value_gradient;             // (Lk, padded), null if they are summed in place
  float *content_gradient, *position_gradient;      // of one query head, only for teams
};

// Two ranges that are worked on together.
struct Parts {
  Range ranges[2];
};

struct Backward {
  const Problem& p;
  const Team& team;
  Keys* keys;
  Tables tables;
  Workspace* workspaces;
  float** scratch;
  Sums* sums;
  Unit* units;
  bool key_in_place, value_in_place;  // gradients are summed in their tensors

  Head head(int64_t batch, int64_t index, const Unit& unit) const {
    const Call& call = p.call;
    const int64_t key_head = index / p.ratio;
    Head result = {};
    result.batch = batch;
    result.head = index;
    result.keys = keys[batch];
    result.key_panels = unit.pack.key_panels;
    result.first_key = 0;
    result.value_panels = unit.pack.value_panels;
    result.key = rows_of(matrix(call.key, batch, key_head), unit.pack.key_rows, p.padded_size);
    result.rel_k = tables.rel_k.table(p.rel_k_source(index), index);
    result.rel_q = tables.rel_q.table(p.rel_q_source(index), index);
    result.rel_v = tables.rel_v.table(p.rel_v_source(index), index);
    return result;
  }

  int64_t sums_heads(const PackedTable& table) const { return table.per_head ? p.ratio : 1; }

  Gradients gradients(const Head& head, const Unit& unit, const Sums& own, Workspace& w) const {
    const Call& call = p.call;
    const int64_t key_head = head.head / p.ratio, local = head.head % p.ratio;
    Gradients out = {};
    out.key = sum_of(call.grad_key, head.batch, key_head, key_in_place, unit.key_gradient, p.padded_size);
    out.value = sum_of(call.grad_value, head.batch, key_head, value_in_place, unit.value_gradient, p.padded_value_size);
    if (call.grad_query.data || call.grad_pos_bias_u.data || call.grad_pos_bias_v.data) {
      out.content = w.content_gradient;
      out.position = w.position_gradient;
    }
    if (own.rel_k) out.rel_k = own.rel_k + (tables.rel_k.per_head ? local : 0) * p.call.rows * p.padded_depth;
    if (own.rel_q) out.rel_q = own.rel_q + (tables.rel_q.per_head ? local : 0) * p.call.rows * p.padded_size;
    if (own.rel_v) out.rel_v = own.rel_v + (tables.rel_v.per_head ? local : 0) * p.call.rows * p.padded_value_size;
    if (own.pos_bias_u) out.pos_bias_u = own.pos_bias_u + head.head * p.size;
    if (own.pos_bias_v) out.pos_bias_v = own.pos_bias_v + head.head * p.size;
    return out;
  }

  static Result sum_of(const Tensor& grad, int64_t batch, int64_t head, bool in_place, float* sum, int64_t padded) {
    if (!grad.data) return {nullptr, 0};
    if (!in_place) return {sum, padded};
    return {(float*)grad.data + batch * grad.stride[0] + head * grad.stride[1], grad.stride[2]};
  }

  // One batch element of a unit, by one thread.
  void alone(int64_t batch, int64_t key_head, const Unit& unit, const Sums& own, Workspace& w) const {
    for (int64_t task = 0; task < pack_tasks(p); ++task) pack_keys(p, batch, key_head, unit.pack, task, w.scratch);
    begin_keys(batch, key_head, unit, {0, p.call.keys});
    for (int64_t index = key_head * p.ratio; index < (key_head + 1) * p.ratio; ++index) {
      const Head of = head(batch, index, unit);
      const Gradients out = gradients(of, unit, own, w);
      for (int64_t block = 0; block < p.query_blocks(); ++block) queries(of, block, {{{0, p.call.keys}, {0, 0}}}, true, true, out, w);
    }
    end_keys(batch, key_head, unit, {0, p.call.keys});
  }

  // A block of queries and some of the keys.
  void queries(const Head& of, int64_t index, const Parts& parts, bool first, bool last, const Gradients& out, Workspace& w) const {
    const Block block = prepare_block(p, of, w, index);
    if (first && out.content) {
      fill(out.content, 0.0f, block.rows * p.padded_size);
      if (p.position) fill(out.position, 0.0f, block.rows * p.padded_depth);
    }
    if (!block.keys.empty()) {
      prepare_backward(p, of, block, w);
      for (const Range& keys : parts.ranges) backward_keys(p, of, block, keys, w, out);
    }
    if (last) finish_block(p, of, block, out);
  }

  // Gradients of keys and values start from zero; afterwards they are scaled and written.
  void begin_keys(int64_t batch, int64_t key_head, const Unit& unit, Range keys) const {
    zero(sum_of(p.call.grad_key, batch, key_head, key_in_place, unit.key_gradient, p.padded_size), keys, p.padded_size);
    zero(sum_of(p.call.grad_value, batch, key_head, value_in_place, unit.value_gradient, p.padded_value_size), keys, p.padded_value_size);
  }

  static void zero(const Result& sum, Range rows, int64_t size) {
    for (int64_t row = rows.first; sum.data && row < rows.last; ++row) fill(sum.data + row * sum.row, 0.0f, size);
  }

  void end_keys(int64_t batch, int64_t key_head, const Unit& unit, Range keys) const {
    const Tensor &key = p.call.grad_key, &value = p.call.grad_value;
    for (int64_t row = keys.first; row < keys.last; ++row) {
      if (key.data && key_in_place) scale_row(sum_of(key, batch, key_head, true, nullptr, 0).data + row * key.stride[2], (float)kLn2, p.size);
      if (key.data && !key_in_place)
        write_row(key.data, key.dtype, batch * key.stride[0] + key_head * key.stride[1] + row * key.stride[2], key.stride[3], p.size, unit.key_gradient + row * p.padded_size, (float)kLn2);
      if (value.data && !value_in_place)
        write_row(value.data, value.dtype, batch * value.stride[0] + key_head * value.stride[1] + row * value.stride[2], value.stride[3], p.value_size,
                  unit.value_gradient + row * p.padded_value_size, 1.0f);
    }
  }

  // The pieces `part` and 2 * team - 1 - part of `count` things.
  static Parts pieces(int64_t part, int64_t members, int64_t count) {
    auto piece = [&](int64_t i) { return Range{count * i / (2 * members), count * (i + 1) / (2 * members)}; };
    return {{piece(part), piece(2 * members - 1 - part)}};
  }

  // `count` units from `first` on at the same time, each by `members` threads.
  void together(int64_t first, int64_t count, int64_t members, int64_t batches) const {
    const Call& call = p.call;
    const int64_t panels = panels_of(call.keys), tasks = pack_tasks(p);
    auto batch_of = [&](int64_t unit, int64_t b) { return p.per_head ? b : (first + unit) / call.key_heads; };
    auto head_of = [&](int64_t unit) { return p.per_head ? first + unit : (first + unit) % call.key_heads; };
    for (int64_t b = 0; b < batches; ++b) {
      parallel(team, count * tasks, [&](int64_t index, int64_t thread) {
        const int64_t unit = index / tasks, task = index % tasks, batch = batch_of(unit, b);
        pack_keys(p, batch, head_of(unit), units[unit].pack, task, scratch[thread]);
        begin_keys(batch, head_of(unit), units[unit], {task * kPanelsOfTask * kPanel, least((task + 1) * kPanelsOfTask * kPanel, call.keys)});
      });
      for (int64_t of_unit = 0; of_unit < p.ratio; ++of_unit)
        for (int64_t step = 0; step < members; ++step)
          parallel(team, count * members, [&](int64_t index, int64_t thread) {
            const int64_t unit = index / members, member = index % members, batch = batch_of(unit, b);
            const Head of = head(batch, head_of(unit) * p.ratio + of_unit, units[unit]);
            Parts parts = pieces((member + step) % members, members, panels);
            for (Range& range : parts.ranges) range = {range.first * kPanel, least(range.last * kPanel, call.keys)};
            Gradients out = gradients(of, units[unit], sums[index], workspaces[thread]);
            const Gradients block_out = out;
            for (const Range& blocks : pieces(member, members, p.query_blocks()).ranges)
              for (int64_t block = blocks.first; block < blocks.last; ++block) {
                if (block_out.content) {
                  out.content = units[unit].content_gradient + block * p.block_rows * p.padded_size;
                  out.position = units[unit].position_gradient + block * p.block_rows * p.padded_depth;
                }
                queries(of, block, parts, step == 0, step == members - 1, out, workspaces[thread]);
              }
          });
      parallel(team, count * tasks, [&](int64_t index, int64_t) {
        const int64_t unit = index / tasks, task = index % tasks;
        end_keys(batch_of(unit, b), head_of(unit), units[unit], {task * kPanelsOfTask * kPanel, least((task + 1) * kPanelsOfTask * kPanel, call.keys)});
      });
    }
  }

  // Add members' sums of tables that differ by head for the heads of one key head, write them, and clear the sums for the next.
  void flush(int64_t key_head, const Sums* of, int64_t members) const {
    const Call& call = p.call;
    for (int64_t local = 0; local < p.ratio; ++local) {
      const int64_t index = key_head * p.ratio + local;
      if (tables.rel_k.per_head && of->rel_k)
        for (int64_t row = 0; row < call.rows; ++row) {
          float* total = add_members(of, members, &Sums::rel_k, (local * call.rows + row) * p.padded_depth, p.padded_depth);
          if (call.rel_k.data && call.rel_k.stride[1] != 0) write_table_row(call.grad_rel_k, index, row, total, p.size, (float)kLn2);
          if (call.rel_bias.data && call.rel_bias.stride[1] != 0) write_table_row(call.grad_rel_bias, index, row, total + p.depth - 1, 1, 1.0f);
          if (of->rel_k_shared) add_scaled(of->rel_k_shared + row * p.padded_depth, total, 1.0f, p.padded_depth);
        }
      if (tables.rel_q.per_head && of->rel_q)
        for (int64_t row = 0; row < call.rows; ++row)
          write_table_row(call.grad_rel_q, index, call.rows - 1 - row, add_members(of, members, &Sums::rel_q, (local * call.rows + row) * p.padded_size, p.padded_size), p.size, (float)call.scale);
      if (tables.rel_v.per_head && of->rel_v)
        for (int64_t row = 0; row < call.rows; ++row)
          write_table_row(call.grad_rel_v, index, row, add_members(of, members, &Sums::rel_v, (local * call.rows + row) * p.padded_value_size, p.padded_value_size), p.value_size, 1.0f);
    }
    for (int64_t member = 0; member < members; ++member) {
      if (tables.rel_k.per_head && of[member].rel_k) fill(of[member].rel_k, 0.0f, p.ratio * call.rows * p.padded_depth);
      if (tables.rel_q.per_head && of[member].rel_q) fill(of[member].rel_q, 0.0f, p.ratio * call.rows * p.padded_size);
      if (tables.rel_v.per_head && of[member].rel_v) fill(of[member].rel_v, 0.0f, p.ratio * call.rows * p.padded_value_size);
    }
  }

  // The sum over members, in their order, left at the first one's place.
  static float* add_members(const Sums* of, int64_t members, float* Sums::*which, int64_t offset, int64_t size) {
    float* total = of->*which + offset;
    for (int64_t member = 1; member < members; ++member) add_scaled(total, of[member].*which + offset, 1.0f, size);
    return total;
  }

  static void write_table_row(const Tensor& grad, int64_t head, int64_t row, const float* from, int64_t size, float factor) {
    if (grad.data) write_row(grad.data, grad.dtype, head * grad.stride[1] + row * grad.stride[2], grad.stride[3], size, from, factor);
  }

  // What all members share: summed and written at the end.
  void finish(int64_t members) const {
    const Call& call = p.call;
    const Sums* all = sums;
    constexpr int64_t kRowsOfTask = 64;
    const bool mixed = all->rel_k_shared != nullptr;
    parallel(team, (call.rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task, int64_t) {
      for (int64_t row = task * kRowsOfTask; row < least((task + 1) * kRowsOfTask, call.rows); ++row) {
        if (all->rel_k && (!tables.rel_k.per_head || mixed)) {
          const float* total = add_members(all, members, mixed ? &Sums::rel_k_shared : &Sums::rel_k, row * p.padded_depth, p.padded_depth);
          if (call.rel_k.data && call.rel_k.stride[1] == 0) write_table_row(call.grad_rel_k, 0, row, total, p.size, (float)kLn2);
          if (call.rel_bias.data && call.rel_bias.stride[1] == 0) write_table_row(call.grad_rel_bias, 0, row, total + p.depth - 1, 1, 1.0f);
        }
        if (all->rel_q && !tables.rel_q.per_head)
          write_table_row(call.grad_rel_q, 0, call.rows - 1 - row, add_members(all, members, &Sums::rel_q, row * p.padded_size, p.padded_size), p.size, (float)call.scale);
        if (all->rel_v && !tables.rel_v.per_head)
          write_table_row(call.grad_rel_v, 0, row, add_members(all, members, &Sums::rel_v, row * p.padded_value_size, p.padded_value_size), p.value_size, 1.0f);
      }
    });
    for (int64_t index = 0; index < call.heads; ++index) {
      if (all->pos_bias_u) write_table_row(call.grad_pos_bias_u, index, 0, add_members(all, members, &Sums::pos_bias_u, index * p.size, p.size), p.size, 1.0f);
      if (all->pos_bias_v) write_table_row(call.grad_pos_bias_v, index, 0, add_members(all, members, &Sums::pos_bias_v, index * p.size, p.size), p.size, 1.0f);
    }
  }
};

static int backward(const Call& call, const Team& team) {
  const Problem p(call, kBlockKeysBackward);
  const int64_t threads = team.threads;
  Backward run = {p, team, nullptr, {}, nullptr, nullptr, nullptr, nullptr, false, false};

  const bool need_rel_k = call.grad_rel_k.data || call.grad_rel_bias.data;
  if (!plan_table(p, team, call.rel_k, call.rel_bias, p.rel_k_source(0), call.left, true, call.rel_k.data != nullptr, run.tables.rel_k) ||
      !plan_table(p, team, call.rel_q, Tensor{}, p.rel_q_source(0), call.right, true, true, run.tables.rel_q) ||
      !plan_table(p, team, call.rel_v, Tensor{}, p.rel_v_source(0), call.left, true, true, run.tables.rel_v))
    return 1;

  // Units, and how many of the last ones are shared by teams.
  const bool per_head = p.per_head;
  const int64_t batches = per_head ? call.batch : 1, units = per_head ? call.key_heads : call.batch * call.key_heads;
  int64_t shared = units % threads;
  const int64_t members = shared ? clamp<int64_t>(threads / shared, 1, most<int64_t>(1, p.query_blocks() / 2)) : 1;
  if (members == 1) shared = 0;
  const int64_t alone = units - shared;
  const int64_t sum_count = most(least(threads, alone), shared * members), unit_count = most(least(threads, alone), shared);

  run.keys = (Keys*)allocate(team, call.batch * (int64_t)sizeof(Keys) / 4);
  float* holes = call.key_mask.data ? allocate(team, call.batch * call.keys) : nullptr;
  run.workspaces = (Workspace*)allocate(team, threads * (int64_t)sizeof(Workspace) / 4);
  run.scratch = (float**)allocate(team, threads * (int64_t)sizeof(float*) / 4);
  run.sums = (Sums*)allocate(team, sum_count * (int64_t)sizeof(Sums) / 4);
  run.units = (Unit*)allocate(team, unit_count * (int64_t)sizeof(Unit) / 4);
  if (!run.keys || (call.key_mask.data && !holes) || !run.workspaces || !run.scratch || !run.sums || !run.units) return 1;
  for (int64_t b = 0; b < call.batch; ++b) run.keys[b] = visible_keys(call, b, holes ? holes + b * call.keys : nullptr);
  Workspace probe;
  const int64_t workspace_floats = carve_backward(p, nullptr, probe) / 4;
  for (int64_t thread = 0; thread < threads; ++thread) {
    float* memory = allocate(team, workspace_floats);
    if (!memory) return 1;
    carve_backward(p, (char*)memory, run.workspaces[thread]);
    run.scratch[thread] = run.workspaces[thread].scratch;
  }
  pack_tables(p, team, run.keys, run.tables, run.scratch);

  bool enough = true;
  auto zeros = [&](bool needed, int64_t floats) -> float* {
    if (!needed || !enough) return nullptr;
    float* memory = allocate(team, floats);
    enough = memory != nullptr;
    if (memory) fill(memory, 0.0f, floats);
    return memory;
  };
  auto room = [&](bool needed, int64_t floats) -> float* {
    if (!needed || !enough) return nullptr;
    float* memory = allocate(team, floats);
    enough = memory != nullptr;
    return memory;
  };
  const bool mixed = need_rel_k && call.rel_k.data && call.rel_bias.data && (call.rel_k.stride[1] != 0) != (call.rel_bias.stride[1] != 0);
  for (int64_t member = 0; member < sum_count; ++member) {
    Sums& sums = run.sums[member];
    sums.rel_k = zeros(need_rel_k, run.sums_heads(run.tables.rel_k) * call.rows * p.padded_depth);
    sums.rel_q = zeros(call.grad_rel_q.data, run.sums_heads(run.tables.rel_q) * call.rows * p.padded_size);
    sums.rel_v = zeros(call.grad_rel_v.data, run.sums_heads(run.tables.rel_v) * call.rows * p.padded_value_size);
    sums.rel_k_shared = zeros(mixed, call.rows * p.padded_depth);
    sums.pos_bias_u = zeros(call.grad_pos_bias_u.data, call.heads * p.size);
    sums.pos_bias_v = zeros(call.grad_pos_bias_v.data, call.heads * p.size);
  }
  auto sums_in_place = [&](const Tensor& grad, int64_t size) { return grad.data && grad.dtype == kFloat32 && grad.stride[3] == 1 && size % kPanel == 0 && grad.stride[2] >= size; };
  run.key_in_place = sums_in_place(call.grad_key, p.size);
  run.value_in_place = sums_in_place(call.grad_value, p.value_size);
  const bool key_readable = readable_in_place(matrix(call.key, 0, 0), call.keys, p.size);
  const int64_t padded_keys = panels_of(call.keys) * kPanel;
  for (int64_t unit = 0; unit < unit_count; ++unit) {
    Unit& memory = run.units[unit];
    memory.pack = {room(true, padded_keys * p.size), room(!key_readable, call.keys * p.padded_size), room(true, padded_keys * p.value_size), nullptr};
    memory.key_gradient = room(call.grad_key.data && !run.key_in_place, call.keys * p.padded_size);
    memory.value_gradient = room(call.grad_value.data && !run.value_in_place, call.keys * p.padded_value_size);
    memory.content_gradient = room(shared > 0, call.queries * p.padded_size);
    memory.position_gradient = room(shared > 0, call.queries * p.padded_depth);
  }
  if (!enough) return 1;

  const int64_t takers = least(threads, alone);
  parallel(team, takers, [&](int64_t taker, int64_t thread) {
    for (int64_t unit = taker; unit < alone; unit += takers) {
      if (per_head) {
        for (int64_t b = 0; b < batches; ++b) run.alone(b, unit, run.units[taker], run.sums[taker], run.workspaces[thread]);
        run.flush(unit, run.sums + taker, 1);
      } else {
        run.alone(unit / call.key_heads, unit % call.key_heads, run.units[taker], run.sums[taker], run.workspaces[thread]);
      }
    }
  });
  if (shared > 0) {
    run.together(alone, shared, members, batches);
    if (per_head)
      for (int64_t unit = 0; unit < shared; ++unit) run.flush(alone + unit, run.sums + unit * members, members);
  }
  run.finish(sum_count);
  return 0;
}

// Who computes which gradients, so that every sum has one owner and the result depends on the number of threads only.
//
// A unit is a key head of a batch element with its query heads; where tables differ by head, of all batch elements (a head's table gradient
// then has one owner too). Units are dealt out one to a thread, as long as there are enough. The last ones are each shared by a team:
// member m has its own queries all the time, and in step s the keys of part (m + s) mod team, so that no two members ever add to the same
// keys. To even out causal masks both are cut in 2 x team pieces, and piece i goes with piece 2 x team - 1 - i.

// Sums of one member. Tables with one gradient per head are flushed when their unit is done, the others at the end of the call.
struct Sums {
  float *rel_k, *rel_q, *rel_v;    // (R, padded) for each query head of a unit where they differ by head, else once
  float* rel_k_shared;             // rel_k and rel_bias where only one of them differs by head: what the other sums over heads
  float *pos_bias_u, *pos_bias_v;  // (Hq, D)
};

// Two ranges that are worked on together.
struct Parts {
  Range ranges[2];
};

// Which part of the work a kernel is asked for: a member of a unit's team, on some thread. (A unit that one thread does alone: a team
// of 1.)
struct Job {
  int64_t batch, key_head, unit, member, thread;
};

INLINE Result in_tensor(const Tensor& grad, int64_t batch, int64_t head) {
  return {(float*)grad.data + batch * grad.stride[0] + head * grad.stride[1], grad.stride[2]};
}

// What a call's memory is taken from; remembers whether some was refused.
struct Memory {
  const Team& team;
  bool enough = true;

  float* floats(bool needed, int64_t count) {
    if (!needed || !enough) return nullptr;
    float* memory = allocate(team, count);
    enough = memory != nullptr;
    return memory;
  }
  float* zeros(bool needed, int64_t count) {
    float* memory = floats(needed, count);
    if (memory) fill(memory, 0.0f, count);
    return memory;
  }
  template <class T>
  T* array(int64_t count) {
    return (T*)floats(true, (count * (int64_t)sizeof(T) + 3) / 4);
  }
};

// Keys, tables and sums that both kernels work with.
struct Shared {
  Keys* keys;
  Tables tables;
  Sums* sums;
};

// The float32 kernel: backward.h.
struct FloatKernel {
  const Problem& p;
  const Shared& shared;
  bool key_in_place, value_in_place, key_readable;  // gradients are summed in their tensors; keys are read where they are

  // Memory of a unit while it is worked on.
  struct Unit {
    KeyPack pack;
    float *key_gradient, *value_gradient;         // (Lk, padded), null if they are summed in place
    float *content_gradient, *position_gradient;  // of one query head, only for teams
  };
  Unit* units;
  Workspace* workspaces;

  FloatKernel(const Problem& problem, const Shared& of_call) : p(problem), shared(of_call), units(nullptr), workspaces(nullptr) {
    auto in_place = [](const Tensor& grad, int64_t size) {
      return grad.data && grad.dtype == kFloat32 && grad.stride[3] == 1 && size % kPanel == 0 && grad.stride[2] >= size;
    };
    key_in_place = in_place(p.call.grad_key, p.size);
    value_in_place = in_place(p.call.grad_value, p.value_size);
    key_readable = readable_in_place(matrix(p.call.key, 0, 0), p.call.keys, p.size);
  }

  void take_memory(Memory& memory, int64_t threads, int64_t unit_count, int64_t, bool teams) {
    const Call& call = p.call;
    workspaces = memory.array<Workspace>(threads);
    units = memory.array<Unit>(unit_count);
    Workspace probe;
    const int64_t floats = carve_backward(p, nullptr, probe) / 4, padded_keys = panels_of(call.keys) * kPanel;
    for (int64_t thread = 0; memory.enough && thread < threads; ++thread)
      if (float* space = memory.floats(true, floats)) carve_backward(p, (char*)space, workspaces[thread]);
    for (int64_t index = 0; memory.enough && index < unit_count; ++index) {
      Unit& unit = units[index];
      unit.pack = {memory.floats(true, padded_keys * p.size), memory.floats(!key_readable, call.keys * p.padded_size),
                   memory.floats(true, padded_keys * p.value_size), nullptr};
      unit.key_gradient = memory.floats(call.grad_key.data && !key_in_place, call.keys * p.padded_size);
      unit.value_gradient = memory.floats(call.grad_value.data && !value_in_place, call.keys * p.padded_value_size);
      unit.content_gradient = memory.floats(teams, call.queries * p.padded_size);
      unit.position_gradient = memory.floats(teams && p.position_apart(), call.queries * p.padded_size);
    }
  }

  void pack_tables(const Team& team, Memory& memory) const {
    float** scratch = memory.array<float*>(team.threads);
    if (!memory.enough) return;
    for (int64_t thread = 0; thread < team.threads; ++thread) scratch[thread] = workspaces[thread].scratch;
    relattn::RELATTN_VARIANT::pack_tables(p, team, shared.keys, shared.tables, scratch);
  }

  Result key_sum(const Job& job) const {
    if (!p.call.grad_key.data) return {nullptr, 0};
    return key_in_place ? in_tensor(p.call.grad_key, job.batch, job.key_head) : Result{units[job.unit].key_gradient, p.padded_size};
  }
  Result value_sum(const Job& job) const {
    if (!p.call.grad_value.data) return {nullptr, 0};
    return value_in_place ? in_tensor(p.call.grad_value, job.batch, job.key_head)
                          : Result{units[job.unit].value_gradient, p.padded_value_size};
  }

  // Pack some of the unit's keys and values, whose gradients start from zero.
  void begin(const Job& job, int64_t task) const {
    pack_keys(p, job.batch, job.key_head, units[job.unit].pack, task, workspaces[job.thread].scratch);
    const Result key = key_sum(job), value = value_sum(job);
    const Range keys = keys_of_task(p, task);
    for (int64_t row = keys.first; row < keys.last; ++row) {
      if (key.data) fill(key.data + row * key.row, 0.0f, p.padded_size);
      if (value.data) fill(value.data + row * value.row, 0.0f, p.padded_value_size);
    }
  }

  // Scale and write the gradients of some of the unit's keys and values.
  void end(const Job& job, int64_t task) const {
    const Tensor &key = p.call.grad_key, &value = p.call.grad_value;
    const Result key_total = key_sum(job), value_total = value_sum(job);
    const Range keys = keys_of_task(p, task);
    for (int64_t row = keys.first; row < keys.last; ++row) {
      if (key.data) {
        float* total = key_total.data + row * key_total.row;
        if (key_in_place)
          scale_row(total, (float)kLn2, p.size);
        else
          write_row(key.data, key.dtype, job.batch * key.stride[0] + job.key_head * key.stride[1] + row * key.stride[2], key.stride[3],
                    p.size, total, (float)kLn2);
      }
      if (value.data && !value_in_place)
        write_row(value.data, value.dtype, job.batch * value.stride[0] + job.key_head * value.stride[1] + row * value.stride[2],
                  value.stride[3], p.value_size, value_total.data + row * value_total.row, 1.0f);
    }
  }

  // A block of queries of one head, and some of the keys. `first`, `last`: of the parts of the keys that the block meets.
  void queries(const Job& job, int64_t index, int64_t block_index, const Parts& parts, bool team, bool first, bool last) const {
    const Call& call = p.call;
    const Unit& unit = units[job.unit];
    const Sums& own = shared.sums[job.member];
    Workspace& w = workspaces[job.thread];
    const int64_t local = index % p.ratio;
    Head head = {};
    head.batch = job.batch;
    head.head = index;
    head.keys = shared.keys[job.batch];
    head.key_panels = unit.pack.key_panels;
    head.value_panels = unit.pack.value_panels;
    head.key = rows_of(matrix(call.key, job.batch, job.key_head), unit.pack.key_rows, p.padded_size);
    head.rel_k = shared.tables.rel_k.table(p.rel_k_source(index), index);
    head.rel_q = shared.tables.rel_q.table(p.rel_q_source(index), index);
    head.rel_v = shared.tables.rel_v.table(p.rel_v_source(index), index);
    Gradients out = {};
    out.key = key_sum(job);
    out.value = value_sum(job);
    if (own.rel_k) out.rel_k = own.rel_k + (shared.tables.rel_k.per_head ? local : 0) * call.rows * p.padded_depth;
    if (own.rel_q) out.rel_q = own.rel_q + (shared.tables.rel_q.per_head ? local : 0) * call.rows * p.padded_size;
    if (own.rel_v) out.rel_v = own.rel_v + (shared.tables.rel_v.per_head ? local : 0) * call.rows * p.padded_value_size;
    query_sums(p, own, index, block_index, team ? unit.content_gradient : nullptr, unit.position_gradient, w, out);

    const Block block = prepare_block(p, head, w, block_index);
    if (first && out.content) {
      fill(out.content, 0.0f, block.rows * p.padded_size);
      if (p.position_apart()) fill(out.position, 0.0f, block.rows * p.padded_size);
    }
    if (!block.keys.empty()) {
      prepare_backward(p, head, block, w);
      for (const Range& keys : parts.ranges) backward_keys(p, head, block, keys, w, out);
    }
    if (last) finish_block(p, head, block, out);
  }

  static void query_sums(const Problem& p, const Sums& own, int64_t index, int64_t block, float* content_of_team, float* position_of_team,
                         const Workspace& w, Gradients& out) {
    const Call& call = p.call;
    if (own.pos_bias_u) out.pos_bias_u = own.pos_bias_u + index * p.size;
    if (own.pos_bias_v) out.pos_bias_v = own.pos_bias_v + index * p.size;
    if (!call.grad_query.data && !own.pos_bias_u && !own.pos_bias_v) return;
    out.content = content_of_team ? content_of_team + block * p.block_rows * p.padded_size : w.content_gradient;
    out.position = !p.position_apart() ? out.content
                   : content_of_team   ? position_of_team + block * p.block_rows * p.padded_size
                                       : w.position_gradient;
  }

  // Bring what the kernel sums in another form into the member's Sums.
  void collect(int64_t) const {}
};

// The schedule: any kernel's `begin`, `queries` and `end`, and the sums.
template <class Kernel>
struct Backward {
  const Problem& p;
  const Team& team;
  const Shared& shared;
  const Kernel& kernel;

  // One batch element of a unit, by one thread.
  void alone(const Job& job) const {
    for (int64_t task = 0; task < pack_tasks(p); ++task) kernel.begin(job, task);
    for (int64_t index = job.key_head * p.ratio; index < (job.key_head + 1) * p.ratio; ++index)
      for (int64_t block = 0; block < p.query_blocks(); ++block)
        kernel.queries(job, index, block, {{{0, p.call.keys}, {0, 0}}}, false, true, true);
    for (int64_t task = 0; task < pack_tasks(p); ++task) kernel.end(job, task);
  }

  // The pieces `part` and 2 * members - 1 - part of `count` things.
  static Parts pieces(int64_t part, int64_t members, int64_t count) {
    auto piece = [&](int64_t i) { return Range{count * i / (2 * members), count * (i + 1) / (2 * members)}; };
    return {{piece(part), piece(2 * members - 1 - part)}};
  }

  // `count` units from `first` on at the same time, each by `members` threads.
  void together(int64_t first, int64_t count, int64_t members) const {
    const Call& call = p.call;
    const int64_t panels = panels_of(call.keys), tasks = pack_tasks(p), batches = p.per_head ? call.batch : 1;
    for (int64_t b = 0; b < batches; ++b) {
      auto job_of = [&](int64_t unit, int64_t member, int64_t thread) {
        const int64_t index = first + unit;
        return Job{p.per_head ? b : index / call.key_heads, p.per_head ? index : index % call.key_heads, unit, unit * members + member,
                   thread};
      };
      parallel(team, count * tasks, [&](int64_t index, int64_t thread) { kernel.begin(job_of(index / tasks, 0, thread), index % tasks); });
      for (int64_t local = 0; local < p.ratio; ++local)
        for (int64_t step = 0; step < members; ++step)
          parallel(team, count * members, [&](int64_t index, int64_t thread) {
            const int64_t member = index % members;
            const Job job = job_of(index / members, member, thread);
            Parts parts = pieces((member + step) % members, members, panels);
            for (Range& range : parts.ranges) range = {range.first * kPanel, least(range.last * kPanel, call.keys)};
            for (const Range& blocks : pieces(member, members, p.query_blocks()).ranges)
              for (int64_t block = blocks.first; block < blocks.last; ++block)
                kernel.queries(job, job.key_head * p.ratio + local, block, parts, true, step == 0, step == members - 1);
          });
      parallel(team, count * tasks, [&](int64_t index, int64_t thread) { kernel.end(job_of(index / tasks, 0, thread), index % tasks); });
    }
  }

  // Add members' sums of tables that differ by head for the heads of one key head, write them, and clear the sums for the next.
  void flush(int64_t key_head, int64_t first_member, int64_t members) const {
    const Call& call = p.call;
    const Sums* of = shared.sums + first_member;
    for (int64_t member = 0; member < members; ++member) kernel.collect(first_member + member);
    for (int64_t local = 0; local < p.ratio; ++local) {
      const int64_t index = key_head * p.ratio + local;
      if (shared.tables.rel_k.per_head && of->rel_k)
        for (int64_t row = 0; row < call.rows; ++row) {
          float* total = add_members(of, members, &Sums::rel_k, (local * call.rows + row) * p.padded_depth, p.padded_depth);
          if (call.rel_k.data && call.rel_k.stride[1] != 0) write_table_row(call.grad_rel_k, index, row, total, p.size, (float)kLn2);
          if (call.rel_bias.data && call.rel_bias.stride[1] != 0)
            write_table_row(call.grad_rel_bias, index, row, total + p.depth - 1, 1, 1.0f);
          if (of->rel_k_shared) add_scaled(of->rel_k_shared + row * p.padded_depth, total, 1.0f, p.padded_depth);
        }
      if (shared.tables.rel_q.per_head && of->rel_q)
        for (int64_t row = 0; row < call.rows; ++row)
          write_table_row(call.grad_rel_q, index, call.rows - 1 - row,
                          add_members(of, members, &Sums::rel_q, (local * call.rows + row) * p.padded_size, p.padded_size), p.size,
                          (float)call.scale);
      if (shared.tables.rel_v.per_head && of->rel_v)
        for (int64_t row = 0; row < call.rows; ++row)
          write_table_row(call.grad_rel_v, index, row,
                          add_members(of, members, &Sums::rel_v, (local * call.rows + row) * p.padded_value_size, p.padded_value_size),
                          p.value_size, 1.0f);
    }
    for (int64_t member = 0; member < members; ++member) {
      if (shared.tables.rel_k.per_head && of[member].rel_k) fill(of[member].rel_k, 0.0f, p.ratio * call.rows * p.padded_depth);
      if (shared.tables.rel_q.per_head && of[member].rel_q) fill(of[member].rel_q, 0.0f, p.ratio * call.rows * p.padded_size);
      if (shared.tables.rel_v.per_head && of[member].rel_v) fill(of[member].rel_v, 0.0f, p.ratio * call.rows * p.padded_value_size);
    }
  }

  // The sum over members, in their order, left at the first one's place.
  static float* add_members(const Sums* of, int64_t members, float* Sums::* which, int64_t offset, int64_t size) {
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
    const Sums* all = shared.sums;
    if (!p.per_head) parallel(team, members, [&](int64_t member, int64_t) { kernel.collect(member); });
    constexpr int64_t kRowsOfTask = 64;
    const bool mixed = all->rel_k_shared != nullptr;
    parallel(team, (call.rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task, int64_t) {
      for (int64_t row = task * kRowsOfTask; row < least((task + 1) * kRowsOfTask, call.rows); ++row) {
        if (all->rel_k && (!shared.tables.rel_k.per_head || mixed)) {
          const float* total = add_members(all, members, mixed ? &Sums::rel_k_shared : &Sums::rel_k, row * p.padded_depth, p.padded_depth);
          if (call.rel_k.data && call.rel_k.stride[1] == 0) write_table_row(call.grad_rel_k, 0, row, total, p.size, (float)kLn2);
          if (call.rel_bias.data && call.rel_bias.stride[1] == 0) write_table_row(call.grad_rel_bias, 0, row, total + p.depth - 1, 1, 1.0f);
        }
        if (all->rel_q && !shared.tables.rel_q.per_head)
          write_table_row(call.grad_rel_q, 0, call.rows - 1 - row,
                          add_members(all, members, &Sums::rel_q, row * p.padded_size, p.padded_size), p.size, (float)call.scale);
        if (all->rel_v && !shared.tables.rel_v.per_head)
          write_table_row(call.grad_rel_v, 0, row, add_members(all, members, &Sums::rel_v, row * p.padded_value_size, p.padded_value_size),
                          p.value_size, 1.0f);
      }
    });
    for (int64_t index = 0; index < call.heads; ++index) {
      if (all->pos_bias_u)
        write_table_row(call.grad_pos_bias_u, index, 0, add_members(all, members, &Sums::pos_bias_u, index * p.size, p.size), p.size, 1.0f);
      if (all->pos_bias_v)
        write_table_row(call.grad_pos_bias_v, index, 0, add_members(all, members, &Sums::pos_bias_v, index * p.size, p.size), p.size, 1.0f);
    }
  }
};

template <class Kernel>
static int backward_with(const Problem& p, const Team& team, Shared& shared, Memory& memory) {
  const Call& call = p.call;
  const int64_t threads = team.threads;
  Kernel kernel(p, shared);

  // Units, and how many of the last ones are shared by teams.
  const bool per_head = p.per_head;
  const int64_t units = per_head ? call.key_heads : call.batch * call.key_heads;
  int64_t teams = units % threads;
  const int64_t members = teams ? clamp<int64_t>(threads / teams, 1, most<int64_t>(1, p.query_blocks() / 2)) : 1;
  if (members == 1) teams = 0;
  const int64_t alone = units - teams, takers = least(threads, alone);
  const int64_t sum_count = most(takers, teams * members), unit_count = most(takers, teams);

  kernel.take_memory(memory, threads, unit_count, sum_count, teams > 0);
  shared.sums = memory.array<Sums>(sum_count);
  const bool need_rel_k = call.grad_rel_k.data || call.grad_rel_bias.data;
  const bool mixed = need_rel_k && call.rel_k.data && call.rel_bias.data && (call.rel_k.stride[1] != 0) != (call.rel_bias.stride[1] != 0);
  auto heads = [&](const PackedTable& table) { return table.per_head ? p.ratio : 1; };
  for (int64_t member = 0; memory.enough && member < sum_count; ++member) {
    Sums& sums = shared.sums[member];
    sums.rel_k = memory.zeros(need_rel_k, heads(shared.tables.rel_k) * call.rows * p.padded_depth);
    sums.rel_q = memory.zeros(call.grad_rel_q.data, heads(shared.tables.rel_q) * call.rows * p.padded_size);
    sums.rel_v = memory.zeros(call.grad_rel_v.data, heads(shared.tables.rel_v) * call.rows * p.padded_value_size);
    sums.rel_k_shared = memory.zeros(mixed, call.rows * p.padded_depth);
    sums.pos_bias_u = memory.zeros(call.grad_pos_bias_u.data, call.heads * p.size);
    sums.pos_bias_v = memory.zeros(call.grad_pos_bias_v.data, call.heads * p.size);
  }
  if (memory.enough) kernel.pack_tables(team, memory);
  if (!memory.enough) return 1;

  const Backward<Kernel> run = {p, team, shared, kernel};
  parallel(team, takers, [&](int64_t taker, int64_t thread) {
    for (int64_t unit = taker; unit < alone; unit += takers) {
      if (per_head) {
        for (int64_t b = 0; b < call.batch; ++b) run.alone({b, unit, taker, taker, thread});
        run.flush(unit, taker, 1);
      } else {
        run.alone({unit / call.key_heads, unit % call.key_heads, taker, taker, thread});
      }
    }
  });
  if (teams > 0) {
    run.together(alone, teams, members);
    if (per_head)
      for (int64_t unit = 0; unit < teams; ++unit) run.flush(alone + unit, unit * members, members);
  }
  run.finish(sum_count);
  return 0;
}

static bool find_keys(const Call& call, Memory& memory, Shared& shared) {
  shared.keys = memory.array<Keys>(call.batch);
  float* holes = memory.floats(call.key_mask.data, call.batch * call.keys);
  for (int64_t b = 0; memory.enough && b < call.batch; ++b) shared.keys[b] = visible_keys(call, b, holes ? holes + b * call.keys : nullptr);
  return memory.enough;
}

static int backward(const Call& call, const Team& team) {
  const Problem p(call, kBlockRowsBackward, kBlockKeysBackward);
  Shared shared = {};
  Memory memory = {team};
  if (!find_keys(call, memory, shared) ||
      !plan_table(p, team, call.rel_k, call.rel_bias, p.rel_k_source(0), call.left, true, call.rel_k.data != nullptr,
                  shared.tables.rel_k) ||
      !plan_table(p, team, call.rel_q, Tensor{}, p.rel_q_source(0), call.right, true, true, shared.tables.rel_q) ||
      !plan_table(p, team, call.rel_v, Tensor{}, p.rel_v_source(0), call.left, true, true, shared.tables.rel_v))
    return 1;
  return backward_with<FloatKernel>(p, team, shared, memory);
}

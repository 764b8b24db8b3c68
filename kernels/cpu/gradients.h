// Who computes which gradients, so that every sum has one owner and the result depends on the number of threads only.
//
// A unit is a key head of a batch element with its query heads; where tables differ by head, of all batch elements (a
// head's table gradient then has one owner too). Units are dealt out one to a thread, as long as there are enough. The
// last ones are each shared by a team: member m has its own queries all the time, and in step s the keys of part (m +
// s) mod team, so that no two members ever add to the same keys. To even out causal masks both are cut in 2 x team
// pieces, and piece i goes with piece 2 x team - 1 - i.

// Sums of one member. Tables with one gradient per head are flushed when their unit is done, the others at the end.
struct Sums {
  PerHead<float> tables[3];  // (R, padded) for each query head of a unit where they differ by head, else once
  // rel_k and rel_bias where only one of them differs by head: what the other sums over heads.
  float* rel_k_shared;
  float *pos_bias_u, *pos_bias_v;  // (Hq, D)
};

// Two ranges that are worked on together.
struct Parts {
  Range ranges[2];
};

// Which part of the work a kernel is asked for: a member of a unit's team, on some thread. (A unit that one thread does
// alone: a team of 1.)
struct Job {
  int64_t batch, key_head, unit, member, thread;
};

// One block of queries of one head, and some of the keys. A team's member visits its blocks once for each part of the
// keys: the query gradient starts from zero at the first visit and is complete after the last.
struct Visit {
  int64_t head, block;
  Parts keys;
  bool team, first, last;
};

// Sums of a unit's query gradients while a team works on it: a block's do not stay in one visit's workspace.
struct QuerySums {
  float *content, *position;
};

INLINE Result in_tensor(const Tensor& grad, int64_t batch, int64_t head) {
  return {(float*)grad.data + batch * grad.stride[0] + head * grad.stride[1], grad.stride[2]};
}

// Keys, tables and sums that both kernels work with.
struct Shared {
  const Keys* keys;
  Tables tables;
  Sums* sums;
  bool needed[3];  // which tables' gradients are
};

// Where a visit adds to the gradients of the queries and of the two biases.
static void find_query_sums(const Problem& p, const Sums& own, const Visit& visit, const QuerySums& of_unit,
                            const Workspace& w, Gradients& out) {
  if (own.pos_bias_u) out.pos_bias_u = own.pos_bias_u + visit.head * p.size;
  if (own.pos_bias_v) out.pos_bias_v = own.pos_bias_v + visit.head * p.size;
  if (!p.call.grad_query.data && !own.pos_bias_u && !own.pos_bias_v) return;
  const int64_t place = visit.block * p.block_rows * p.padded_size;
  out.content = visit.team ? of_unit.content + place : w.content_gradient;
  out.position = !p.position_apart() ? out.content : visit.team ? of_unit.position + place : w.position_gradient;
}

// The float32 kernel: backward.h.
struct FloatKernel {
  static constexpr bool kSumsTables = true;  // in Sums::tables
  const Problem& p;
  const Shared& shared;
  bool key_in_place, value_in_place;  // gradients are summed in their tensors
  bool key_readable;                  // keys are read where they are

  // Memory of a unit while it is worked on.
  struct Unit {
    KeyPack pack;
    bool* nonfinite;                       // of each task of packing, whether some of its keys are
    float *key_gradient, *value_gradient;  // (Lk, padded), null if they are summed in place
    QuerySums query;                       // of one query head, only for teams
  };
  Unit* units;
  Workspace* workspaces;

  FloatKernel(const Problem& problem, const Shared& of_call)
      : p(problem), shared(of_call), units(nullptr), workspaces(nullptr) {
    auto in_place = [](const Tensor& grad, int64_t size) {
      return grad.data && grad.dtype == kFloat32 && grad.stride[3] == 1 && size % kPanel == 0 && grad.stride[2] >= size;
    };
    key_in_place = in_place(p.call.grad_key, p.size);
    value_in_place = in_place(p.call.grad_value, p.value_size);
    key_readable = readable_in_place(matrix(p.call.key, 0, 0), p.call.keys, p.size);
  }

  void take_memory(Memory& memory, int64_t unit_count, int64_t, bool teams) {
    const Call& call = p.call;
    workspaces =
        carve_for_threads<Workspace>(memory, [&](char* base, Workspace& w) { return carve_backward(p, base, w); });
    units = memory.array<Unit>(unit_count);
    const int64_t padded_keys = panels_of(call.keys) * kPanel;
    for (int64_t index = 0; memory.enough && index < unit_count; ++index) {
      Unit& unit = units[index];
      unit.pack = {memory.floats(true, padded_keys * p.size), memory.floats(!key_readable, call.keys * p.padded_size),
                   memory.floats(true, padded_keys * p.value_size), nullptr};
      unit.nonfinite = memory.array<bool>(pack_tasks(p));
      unit.key_gradient = memory.floats(call.grad_key.data && !key_in_place, call.keys * p.padded_size);
      unit.value_gradient = memory.floats(call.grad_value.data && !value_in_place, call.keys * p.padded_value_size);
      unit.query.content = memory.floats(teams, call.queries * p.padded_size);
      unit.query.position = memory.floats(teams && p.position_apart(), call.queries * p.padded_size);
    }
  }

  void prepare_tables(const Team& team) const { pack_tables(p, team, shared.keys, shared.tables, workspaces); }

  Result key_sum(const Job& job) const {
    if (!p.call.grad_key.data) return {nullptr, 0};
    return key_in_place ? in_tensor(p.call.grad_key, job.batch, job.key_head)
                        : Result{units[job.unit].key_gradient, p.padded_size};
  }
  Result value_sum(const Job& job) const {
    if (!p.call.grad_value.data) return {nullptr, 0};
    return value_in_place ? in_tensor(p.call.grad_value, job.batch, job.key_head)
                          : Result{units[job.unit].value_gradient, p.padded_value_size};
  }

  // Pack some of the unit's keys and values, whose gradients start from zero.
  void begin(const Job& job, int64_t task) const {
    const Unit& unit = units[job.unit];
    pack_keys(p, job.batch, job.key_head, unit.pack, task, workspaces[job.thread].scratch);
    const Result key = key_sum(job), value = value_sum(job);
    const Range keys = keys_of_task(p, task);
    unit.nonfinite[task] =
        !all_finite(unit.pack.key_panels + keys.first * p.size, round_up(keys.last - keys.first, kPanel) * p.size);
    for (int64_t row = keys.first; row < keys.last; ++row) {
      if (key.data) fill(key.data + row * key.row, 0.0f, p.padded_size);
      if (value.data) fill(value.data + row * value.row, 0.0f, p.padded_value_size);
    }
  }

  // Scale and write the gradients of some of the unit's keys and values.
  void end(const Job& job, int64_t task) const {
    const Matrix key = matrix(p.call.grad_key, job.batch, job.key_head),
                 value = matrix(p.call.grad_value, job.batch, job.key_head);
    const Result key_total = key_sum(job), value_total = value_sum(job);
    const Range keys = keys_of_task(p, task);
    for (int64_t row = keys.first; row < keys.last; ++row) {
      if (key.data) {
        float* total = key_total.data + row * key_total.row;
        if (key_in_place)
          scale_row(total, (float)kLn2, p.size);
        else
          write_row(key, row, p.size, total, (float)kLn2);
      }
      if (value.data && !value_in_place)
        write_row(value, row, p.value_size, value_total.data + row * value_total.row, 1.0f);
    }
  }

  void queries(const Job& job, const Visit& visit) const {
    const Unit& unit = units[job.unit];
    const Sums& own = shared.sums[job.member];
    Workspace& w = workspaces[job.thread];
    Head head = shared.tables.head(p, job.batch, visit.head, shared.keys[job.batch]);
    head.key_panels = unit.pack.key_panels;
    head.value_panels = unit.pack.value_panels;
    head.nonfinite = unit.nonfinite;
    head.key = rows_of(matrix(p.call.key, job.batch, job.key_head), unit.pack.key_rows, p.padded_size);
    Gradients out = {};
    out.key = key_sum(job);
    out.value = value_sum(job);
    out.rel_k = own.tables[kRelK].of(visit.head % p.ratio);
    out.rel_q = own.tables[kRelQ].of(visit.head % p.ratio);
    out.rel_v = own.tables[kRelV].of(visit.head % p.ratio);
    find_query_sums(p, own, visit, unit.query, w, out);

    const Block block = block_of(p, head.keys, visit.block);
    if (visit.first && out.content) {
      fill(out.content, 0.0f, block.rows * p.padded_size);
      if (p.position_apart()) fill(out.position, 0.0f, block.rows * p.padded_size);
    }
    if (!block.keys.empty() && prepare_backward(p, head, block, w))
      for (const Range& keys : visit.keys.ranges) backward_keys(p, head, block, keys, w, out);
    if (visit.last) finish_block(p, head, block, out);
  }

  // One row of a table's gradient: the sum over members, in their order, left at the first one's place.
  float* table_row(TableName name, const Range& members, int64_t local, int64_t row, int64_t) const {
    const int64_t padded = shared.tables[name].padded;
    float* total = shared.sums[members.first].tables[name].of(local) + row * padded;
    for (int64_t member = members.first + 1; member < members.last; ++member)
      add_scaled(total, shared.sums[member].tables[name].of(local) + row * padded, 1.0f, padded);
    return total;
  }

  // Of tables that differ by head.
  void clear_tables(const Range& members) const {
    for (int64_t member = members.first; member < members.last; ++member)
      for (TableName name : kTables)
        if (shared.tables[name].per_head && shared.needed[name])
          fill(shared.sums[member].tables[name].data, 0.0f, p.ratio * p.call.rows * shared.tables[name].padded);
  }
};

// The schedule, of any kernel: `begin` packs some of a unit's keys, `queries` makes a visit, `end` writes gradients of
// keys and values, `table_row` gives a row of a table's gradient.
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
        kernel.queries(job, {index, block, {{{0, p.call.keys}, {0, 0}}}, false, true, true});
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
        return Job{p.per_head ? b : index / call.key_heads, p.per_head ? index : index % call.key_heads, unit,
                   unit * members + member, thread};
      };
      parallel(team, count * tasks,
               [&](int64_t index, int64_t thread) { kernel.begin(job_of(index / tasks, 0, thread), index % tasks); });
      for (int64_t local = 0; local < p.ratio; ++local)
        for (int64_t step = 0; step < members; ++step)
          parallel(team, count * members, [&](int64_t index, int64_t thread) {
            const int64_t member = index % members;
            const Job job = job_of(index / members, member, thread);
            Parts parts = pieces((member + step) % members, members, panels);
            for (Range& range : parts.ranges) range = {range.first * kPanel, least(range.last * kPanel, call.keys)};
            for (const Range& blocks : pieces(member, members, p.query_blocks()).ranges)
              for (int64_t block = blocks.first; block < blocks.last; ++block)
                kernel.queries(job,
                               {job.key_head * p.ratio + local, block, parts, true, step == 0, step == members - 1});
          });
      parallel(team, count * tasks,
               [&](int64_t index, int64_t thread) { kernel.end(job_of(index / tasks, 0, thread), index % tasks); });
    }
  }

  // Add members' sums of tables that differ by head for the heads of one key head, write them, and clear the sums for
  // the next.
  void flush(int64_t key_head, int64_t first_member, int64_t members, int64_t thread) const {
    for (TableName name : kTables) {
      if (!shared.tables[name].per_head || !shared.needed[name]) continue;
      const int64_t padded = shared.tables[name].padded;
      float* mixed = name == kRelK ? shared.sums[first_member].rel_k_shared : nullptr;
      for (int64_t local = 0; local < p.ratio; ++local)
        for (int64_t row = 0; row < p.call.rows; ++row) {
          const float* total = kernel.table_row(name, {first_member, first_member + members}, local, row, thread);
          write_table_row(name, true, key_head * p.ratio + local, row, total);
          if (mixed) add_scaled(mixed + row * padded, total, 1.0f, padded);
        }
    }
    if (p.per_head) kernel.clear_tables({first_member, first_member + members});
  }

  // The sum over members, in their order, left at the first one's place.
  template <class Place>
  static float* add_members(const Sums* of, int64_t members, const Place& place, int64_t size) {
    float* total = place(of[0]);
    for (int64_t member = 1; member < members; ++member) add_scaled(total, place(of[member]), 1.0f, size);
    return total;
  }

  // One row of a table's gradient, where the table differs by head or where it does not.
  void write_table_row(TableName name, bool per_head, int64_t head, int64_t row, const float* total) const {
    const Call& call = p.call;
    auto write = [&](const Tensor& table, const Tensor& grad, int64_t to_row, int64_t size, const float* from,
                     float factor) {
      if (grad.data && differs_by_head(table) == per_head) write_row(matrix(grad, 0, head), to_row, size, from, factor);
    };
    if (name == kRelQ) return write(call.rel_q, call.grad_rel_q, call.rows - 1 - row, p.size, total, (float)call.scale);
    if (name == kRelV) return write(call.rel_v, call.grad_rel_v, row, p.value_size, total, 1.0f);
    write(call.rel_k, call.grad_rel_k, row, p.size, total, (float)kLn2);
    write(call.rel_bias, call.grad_rel_bias, row, 1, total + p.depth - 1, 1.0f);
  }

  // What all members share: summed and written at the end.
  void finish(int64_t members) const {
    const Call& call = p.call;
    const Sums* all = shared.sums;
    constexpr int64_t kRowsOfTask = 64;
    parallel(team, (call.rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task, int64_t thread) {
      for (TableName name : kTables) {
        const bool mixed = name == kRelK && all->rel_k_shared;
        if (!shared.needed[name] || (shared.tables[name].per_head && !mixed)) continue;
        const int64_t padded = shared.tables[name].padded;
        for (int64_t row = task * kRowsOfTask; row < least((task + 1) * kRowsOfTask, call.rows); ++row) {
          auto place = [&](const Sums& sums) { return sums.rel_k_shared + row * padded; };
          write_table_row(
              name, false, 0, row,
              mixed ? add_members(all, members, place, padded) : kernel.table_row(name, {0, members}, 0, row, thread));
        }
      }
    });
    for (int64_t head = 0; head < call.heads; ++head) {
      auto finish_bias = [&](auto sum, const Tensor& grad) {  // a member of Sums
        if (!(all->*sum)) return;
        const float* total =
            add_members(all, members, [&](const Sums& sums) { return sums.*sum + head * p.size; }, p.size);
        write_row(matrix(grad, 0, head), 0, p.size, total, 1.0f);
      };
      finish_bias(&Sums::pos_bias_u, call.grad_pos_bias_u);
      finish_bias(&Sums::pos_bias_v, call.grad_pos_bias_v);
    }
  }
};

template <class Kernel>
static int backward_with(const Problem& p, Kernel& kernel, Shared& shared, Memory& memory) {
  const Call& call = p.call;
  const Team& team = memory.team;
  const int64_t threads = team.threads;

  // Units, and how many of the last ones are shared by teams.
  const bool per_head = p.per_head;
  const int64_t units = per_head ? call.key_heads : call.batch * call.key_heads;
  int64_t teams = units % threads;
  const int64_t members = teams ? clamp<int64_t>(threads / teams, 1, most<int64_t>(1, p.query_blocks() / 2)) : 1;
  if (members == 1) teams = 0;
  const int64_t alone = units - teams, takers = least(threads, alone);
  const int64_t sum_count = most(takers, teams * members), unit_count = most(takers, teams);

  kernel.take_memory(memory, unit_count, sum_count, teams > 0);
  shared.sums = memory.array<Sums>(sum_count);
  shared.needed[kRelK] = call.grad_rel_k.data || call.grad_rel_bias.data;
  shared.needed[kRelQ] = call.grad_rel_q.data != nullptr;
  shared.needed[kRelV] = call.grad_rel_v.data != nullptr;
  const bool mixed = shared.needed[kRelK] && call.rel_k.data && call.rel_bias.data &&
                     differs_by_head(call.rel_k) != differs_by_head(call.rel_bias);
  for (int64_t member = 0; memory.enough && member < sum_count; ++member) {
    Sums& sums = shared.sums[member];
    for (TableName name : kTables) {
      const int64_t floats = call.rows * shared.tables[name].padded;
      const bool differs = shared.tables[name].per_head;
      const bool here = shared.needed[name] && Kernel::kSumsTables;
      sums.tables[name] = {memory.zeros(here, (differs ? p.ratio : 1) * floats), differs ? floats : 0};
    }
    sums.rel_k_shared = memory.zeros(mixed, call.rows * p.padded_depth);
    sums.pos_bias_u = memory.zeros(call.grad_pos_bias_u.data, call.heads * p.size);
    sums.pos_bias_v = memory.zeros(call.grad_pos_bias_v.data, call.heads * p.size);
  }
  if (!memory.enough) return 1;
  kernel.prepare_tables(team);

  const Backward<Kernel> run = {p, team, shared, kernel};
  parallel(team, takers, [&](int64_t taker, int64_t thread) {
    for (int64_t unit = taker; unit < alone; unit += takers) {
      if (per_head) {
        for (int64_t b = 0; b < call.batch; ++b) run.alone({b, unit, taker, taker, thread});
        run.flush(unit, taker, 1, thread);
      } else {
        run.alone({unit / call.key_heads, unit % call.key_heads, taker, taker, thread});
      }
    }
  });
  if (teams > 0) {
    run.together(alone, teams, members);
    if (per_head)
      for (int64_t unit = 0; unit < teams; ++unit) run.flush(alone + unit, unit * members, members, 0);
  }
  run.finish(sum_count);
  return 0;
}

static int backward(const Call& call, const Team& team) {
  const Problem p(call, kBlockRowsBackward, kBlockKeysBackward);
  Memory memory = {team};
  Shared shared = {};
  shared.keys = find_keys(call, memory);
  shared.tables.plan(p, memory, kRelK, call.rel_k.data ? kPanelsForm | kNaturalForm : kPanelsForm);
  shared.tables.plan(p, memory, kRelQ, kPanelsForm | kNaturalForm);
  shared.tables.plan(p, memory, kRelV, kPanelsForm | kNaturalForm);
  if (!memory.enough) return 1;
  FloatKernel kernel(p, shared);
  return backward_with(p, kernel, shared, memory);
}

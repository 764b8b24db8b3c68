// The bfloat16 kernel, backward_amx.h, behind the schedule of gradients.h.
struct AmxKernel {
  static constexpr bool kSumsTables = false;  // in AmxSums
  const AmxProblem& p;
  const Shared& shared;
  AmxBackward amx;
  AmxTables tables = {};
  AmxUnit* units = nullptr;
  AmxSums* sums = nullptr;  // of each member, `heads` of them
  int64_t heads;
  AmxBackwardWorkspace* workspaces = nullptr;

  AmxKernel(const AmxProblem& problem, const Shared& of_call) : p(problem), shared(of_call), amx(problem) {
    heads = p.per_head ? p.ratio : 1;
  }

  void take_memory(Memory& memory, int64_t unit_count, int64_t members, bool teams) {
    const Call& call = p.call;
    workspaces = carve_for_threads<AmxBackwardWorkspace>(
        memory, [&](char* base, AmxBackwardWorkspace& w) { return amx.carve(base, w); });
    units = memory.array<AmxUnit>(unit_count);
    sums = memory.array<AmxSums>(members * heads);
    const int64_t padded_queries = p.query_blocks() * p.block_rows, pair_rows = p.deep_keys + kTileDepth;
    for (int64_t index = 0; memory.enough && index < unit_count; ++index) {
      AmxUnit& unit = units[index];
      unit = {};
      unit.keys.key_panels = memory.halves(true, amx.key_columns * p.deep_size);
      unit.keys.value_panels = memory.halves(true, amx.key_columns * p.deep_value_size);
      unit.keys.key_pairs = {memory.halves(true, pair_rows * p.padded_size), pair_rows};
      unit.key_gradient = memory.floats(call.grad_key.data, p.padded_size * amx.key_columns);
      unit.key_rows_gradient = memory.floats(call.rel_q.data && call.grad_key.data, amx.key_columns * p.padded_size);
      unit.value_gradient = memory.floats(call.grad_value.data, p.padded_value_size * amx.key_columns);
      unit.query.content = memory.floats(teams, padded_queries * p.padded_size);
      unit.query.position = memory.floats(teams && p.position_apart(), padded_queries * p.padded_size);
    }
    for (int64_t index = 0; memory.enough && index < members * heads; ++index) take_sums(memory, index);
    tables.plan(p, memory, kRelK, kPanelsForm | kNaturalForm);
    tables.plan(p, memory, kRelQ, kPanelsForm | kNaturalForm);
    tables.plan(p, memory, kRelV, kPanelsForm);
    tables.plan_bias(p, memory);
  }

  int64_t size_of(TableName name) const { return name == kRelV ? p.value_size : p.size; }
  // Floats of a table's transposed gradient.
  int64_t floats_of(TableName name) const { return round_up(size_of(name), kPanel) * amx.table_columns; }
  bool owns(TableName name, int64_t index) const { return shared.tables[name].per_head || index % heads == 0; }

  void take_sums(Memory& memory, int64_t index) {
    const Call& call = p.call;
    const AmxSums& of_first = sums[index / heads * heads];
    auto take = [&](TableName name, const Tensor& grad) {
      if (!owns(name, index)) return of_first.tables[name];
      float *total = memory.zeros(grad.data, floats_of(name)), *left = memory.zeros(grad.data, size_of(name));
      return AmxTableSum{total, {left, memory.zeros(grad.data, size_of(name))}};
    };
    sums[index] = {{take(kRelK, call.grad_rel_k), take(kRelQ, call.grad_rel_q), take(kRelV, call.grad_rel_v)},
                   owns(kRelK, index) ? memory.zeros(call.grad_rel_bias.data, call.rows) : of_first.bias};
  }

  void prepare_tables(const Team& team) const {
    tables.pack(p, team, [&](int64_t thread) { return workspaces[thread].forward.scratch; });
  }

  void begin(const Job& job, int64_t task) const {
    const AmxUnit& unit = units[job.unit];
    pack_keys_amx(p, job.batch, job.key_head, unit.keys, task, workspaces[job.thread].forward.scratch);
    const int64_t first = task * kPanelsOfTask * kPanel,
                  columns = least(kPanelsOfTask * kPanel, amx.key_columns - first);
    auto clear = [&](float* sum, int64_t size) {
      for (int64_t d = 0; sum && d < size; ++d) fill(sum + d * amx.key_columns + first, 0.0f, columns);
    };
    clear(unit.key_gradient, p.padded_size);
    clear(unit.value_gradient, p.padded_value_size);
    if (unit.key_rows_gradient) fill(unit.key_rows_gradient + first * p.padded_size, 0.0f, columns * p.padded_size);
  }

  // Columns [first, first + 16) of a transposed sum as 16 rows of `padded`.
  static void transpose_columns(const float* from, int64_t stride, int64_t first, int64_t padded, float* to) {
    for (int64_t d = 0; d < padded; d += kPanel) transpose(from + d * stride + first, stride, to + d, padded);
  }

  void end(const Job& job, int64_t task) const {
    const AmxUnit& unit = units[job.unit];
    const Range keys = keys_of_task(p, task);
    // `further`: what is added, in rows and times the scale's sign (null: nothing).
    auto write = [&](const Tensor& tensor, const float* sum, const float* further, int64_t size, float factor) {
      if (!tensor.data) return;
      const Matrix grad = matrix(tensor, job.batch, job.key_head);
      const int64_t padded = round_up(size, kPanel);
      float* rows = workspaces[job.thread].forward.base.scores;  // 16 rows, for a moment
      for (int64_t first = keys.first; first < keys.last; first += kPanel)
        for (int64_t part = 0; part < size; part += 2 * kPanel) {
          const int64_t width = least<int64_t>(2 * kPanel, padded - part);
          transpose_columns(sum + part * amx.key_columns, amx.key_columns, first, width, rows);
          const Matrix of_part = {grad.data, grad.dtype, grad.first + part * grad.column, grad.row, grad.column};
          for (int64_t row = 0; row < least<int64_t>(kPanel, keys.last - first); ++row) {
            if (further)
              add_scaled(rows + row * width, further + (first + row) * padded + part, p.call.scale < 0 ? -1.0f : 1.0f,
                         width);
            write_row(of_part, first + row, least(width, size - part), rows + row * width, factor);
          }
        }
    };
    write(p.call.grad_key, unit.key_gradient, unit.key_rows_gradient, p.size, (float)p.absolute_scale());
    write(p.call.grad_value, unit.value_gradient, nullptr, p.value_size, 1.0f);
  }

  void queries(const Job& job, const Visit& visit) const {
    const AmxUnit& unit = units[job.unit];
    AmxBackwardWorkspace& w = workspaces[job.thread];
    const AmxHead operands = amx_head(p, tables, unit.keys, job.batch, visit.head, shared.keys[job.batch]);
    Gradients out = {};
    out.key.data = unit.key_gradient;
    out.value.data = unit.value_gradient;
    find_query_sums(p, shared.sums[job.member], visit, unit.query, w.forward.base, out);

    const AmxSums& of_member = sums[job.member * heads + (heads > 1 ? visit.head % p.ratio : 0)];
    const Block block = block_of(p, operands.head.keys, visit.block);
    if (visit.first && out.content) {
      fill(out.content, 0.0f, p.block_rows * p.padded_size);  // a group's rows are summed whole
      if (p.position_apart()) fill(out.position, 0.0f, p.block_rows * p.padded_size);
    }
    if (!block.keys.empty() && amx.prepare(operands, block, w))
      for (const Range& keys : visit.keys.ranges) amx.backward_keys(operands, block, keys, unit, of_member, out, w);
    if (visit.last) finish_block(p, operands.head, block, out);
  }

  // As FloatKernel's, whose sums of rel_k have a factor of scale * log2(e) in them: theirs is the scaled query.
  float* table_row(TableName name, const Range& members, int64_t local, int64_t row, int64_t thread) const {
    const float factor = name == kRelK ? (float)(p.absolute_scale() * kLog2E) : 1.0f;
    const int64_t size = size_of(name);
    float* total = workspaces[thread].forward.base.scores;  // for a moment
    fill(total, 0.0f, shared.tables[name].padded);
    for (int64_t member = members.first; member < members.last; ++member) {
      const AmxSums& of_member = sums[member * heads + local];
      const AmxTableSum& from = of_member.tables[name];
      if (from.total) {
        for (int64_t d = 0; d < size; ++d) total[d] += factor * from.total[d * amx.table_columns + row];
        if (row == 0) add_scaled(total, from.edges.left, factor, size);
        if (row == p.call.rows - 1) add_scaled(total, from.edges.right, factor, size);
      }
      if (name == kRelK && of_member.bias) total[p.depth - 1] += of_member.bias[row];
    }
    return total;
  }

  void clear_tables(const Range& members) const {
    for (int64_t index = members.first * heads; index < members.last * heads; ++index) {
      for (TableName name : kTables) {
        const AmxTableSum& sum = sums[index].tables[name];
        if (!shared.tables[name].per_head || !sum.total) continue;
        fill(sum.total, 0.0f, floats_of(name));
        clear_edges(sum.edges, size_of(name));
      }
      if (shared.tables[kRelK].per_head && sums[index].bias) fill(sums[index].bias, 0.0f, p.call.rows);
    }
  }
};

static int backward_amx(const Call& call, const Team& team) {
  AmxProblem p(call, kBlockRowsBackward, kBlockKeysBackward);
  p.block_rows = least(round_up(p.block_rows, kGroupRows), kBlockRowsBackward);  // a group's rows are summed whole
  Memory memory = {team};
  Shared shared = {};
  shared.keys = find_keys(call, memory);
  for (TableName name : kTables)
    shared.tables.plan(p, memory, name, 0);  // how its gradient is laid out; AmxTables has the table itself
  if (!memory.enough) return 1;
  AmxKernel kernel(p, shared);
  return backward_with(p, kernel, shared, memory);
}

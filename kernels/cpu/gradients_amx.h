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
    heads = shared.tables[kRelK].per_head ? p.ratio : 1;
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
      unit.value_gradient = memory.floats(call.grad_value.data, p.padded_value_size * amx.key_columns);
      unit.query.content = memory.floats(teams, padded_queries * p.padded_size);
      unit.query.position = memory.floats(teams && p.position_apart(), padded_queries * p.padded_size);
    }
    for (int64_t index = 0; memory.enough && index < members * heads; ++index) {
      sums[index].table = memory.zeros(call.grad_rel_k.data, p.deep_size * amx.table_columns);
      sums[index].edges = {memory.zeros(call.grad_rel_k.data, p.size), memory.zeros(call.grad_rel_k.data, p.size)};
      sums[index].bias = memory.zeros(call.grad_rel_bias.data, call.rows);
    }
    tables.plan(p, memory, kRelK, kPanelsForm | kNaturalForm);
    tables.plan_bias(p, memory);
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
  }

  // Columns [first, first + 16) of a transposed sum as 16 rows of `padded`.
  static void transpose_columns(const float* from, int64_t stride, int64_t first, int64_t padded, float* to) {
    for (int64_t d = 0; d < padded; d += kPanel) transpose(from + d * stride + first, stride, to + d, padded);
  }

  void end(const Job& job, int64_t task) const {
    const AmxUnit& unit = units[job.unit];
    const Range keys = keys_of_task(p, task);
    auto write = [&](const Tensor& tensor, const float* sum, int64_t size, int64_t padded, float factor) {
      if (!tensor.data) return;
      const Matrix grad = matrix(tensor, job.batch, job.key_head);
      float* rows = workspaces[job.thread].forward.base.scores;  // 16 rows, for a moment
      for (int64_t first = keys.first; first < keys.last; first += kPanel)
        for (int64_t part = 0; part < size; part += 2 * kPanel) {
          const int64_t width = least<int64_t>(2 * kPanel, padded - part);
          transpose_columns(sum + part * amx.key_columns, amx.key_columns, first, width, rows);
          const Matrix of_part = {grad.data, grad.dtype, grad.first + part * grad.column, grad.row, grad.column};
          for (int64_t row = 0; row < least<int64_t>(kPanel, keys.last - first); ++row)
            write_row(of_part, first + row, least(width, size - part), rows + row * width, factor);
        }
    };
    write(p.call.grad_key, unit.key_gradient, p.size, p.padded_size, (float)p.absolute_scale());
    write(p.call.grad_value, unit.value_gradient, p.value_size, p.padded_value_size, 1.0f);
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

  // As FloatKernel's, whose sums have a factor of scale * log2(e) in them: theirs is the scaled query.
  float* table_row(TableName, const Range& members, int64_t local, int64_t row, int64_t thread) const {
    const float factor = (float)(p.absolute_scale() * kLog2E);
    float* total = workspaces[thread].forward.base.scores;  // for a moment
    fill(total, 0.0f, p.padded_depth);
    for (int64_t member = members.first; member < members.last; ++member) {
      const AmxSums& from = sums[member * heads + local];
      if (from.table) {
        for (int64_t d = 0; d < p.size; ++d) total[d] += factor * from.table[d * amx.table_columns + row];
        if (row == 0) add_scaled(total, from.edges.left, factor, p.size);
        if (row == p.call.rows - 1) add_scaled(total, from.edges.right, factor, p.size);
      }
      if (from.bias) total[p.depth - 1] += from.bias[row];
    }
    return total;
  }

  void clear_tables(const Range& members) const {
    for (int64_t index = members.first * heads; index < members.last * heads; ++index) {
      if (sums[index].table) {
        fill(sums[index].table, 0.0f, p.deep_size * amx.table_columns);
        fill(sums[index].edges.left, 0.0f, p.size);
        fill(sums[index].edges.right, 0.0f, p.size);
      }
      if (sums[index].bias) fill(sums[index].bias, 0.0f, p.call.rows);
    }
  }
};

static int backward_amx(const Call& call, const Team& team) {
  AmxProblem p(call, kBlockRowsBackward, kBlockKeysBackward);
  p.block_rows = least(round_up(p.block_rows, kGroupRows), kBlockRowsBackward);  // a group's rows are summed whole
  Memory memory = {team};
  Shared shared = {};
  shared.keys = find_keys(call, memory);
  shared.tables.plan(p, memory, kRelK, 0);  // how its gradient is laid out; AmxTables has the table itself
  if (!memory.enough) return 1;
  AmxKernel kernel(p, shared);
  return backward_with(p, kernel, shared, memory);
}

// The bfloat16 kernel, backward_amx.h, behind the schedule of gradients.h.
struct AmxKernel {
  const Problem& p;
  const Shared& shared;
  AmxBackward amx;
  AmxUnit* units = nullptr;
  AmxSums* sums = nullptr;  // of each member, `heads` of them
  int64_t heads;
  float **content_gradients = nullptr, **position_gradients = nullptr;
  AmxBackwardWorkspace* workspaces = nullptr;

  AmxKernel(const Problem& problem, const Shared& of_call) : p(problem), shared(of_call), amx(problem) {
    heads = shared.tables.rel_k.per_head ? p.ratio : 1;
  }

  void take_memory(Memory& memory, int64_t threads, int64_t unit_count, int64_t members, bool teams) {
    const Call& call = p.call;
    auto half = [&](bool needed, int64_t count) { return (Half*)memory.floats(needed, (count + 1) / 2); };
    workspaces = memory.array<AmxBackwardWorkspace>(threads);
    units = memory.array<AmxUnit>(unit_count);
    sums = memory.array<AmxSums>(members * heads);
    content_gradients = memory.array<float*>(unit_count);
    position_gradients = memory.array<float*>(unit_count);
    AmxBackwardWorkspace probe;
    const int64_t floats = amx.carve(nullptr, probe) / 4, padded_queries = p.query_blocks() * p.block_rows;
    for (int64_t thread = 0; memory.enough && thread < threads; ++thread)
      if (float* space = memory.floats(true, floats)) amx.carve((char*)space, workspaces[thread]);
    for (int64_t index = 0; memory.enough && index < unit_count; ++index) {
      units[index].key_panels = half(true, amx.key_columns * amx.sizes.size);
      units[index].key_pairs = half(true, (amx.sizes.keys + kTileDepth) * p.padded_size);
      units[index].value_panels = half(true, amx.key_columns * amx.upstream_size);
      units[index].key_gradient = memory.floats(call.grad_key.data, p.padded_size * amx.key_columns);
      units[index].value_gradient = memory.floats(call.grad_value.data, p.padded_value_size * amx.key_columns);
      content_gradients[index] = memory.floats(teams, padded_queries * p.padded_size);
      position_gradients[index] = memory.floats(teams && p.position_apart(), padded_queries * p.padded_size);
    }
    for (int64_t index = 0; memory.enough && index < members * heads; ++index) {
      sums[index].table = memory.zeros(call.grad_rel_k.data, amx.sizes.size * amx.table_columns);
      sums[index].left_edge = memory.zeros(call.grad_rel_k.data, p.size);
      sums[index].right_edge = memory.zeros(call.grad_rel_k.data, p.size);
      sums[index].bias = memory.zeros(call.grad_rel_bias.data, call.rows);
    }
    amx.tables = half(call.rel_k.data, (amx.per_head ? call.heads : 1) * amx.table_halves);
    amx.table_pairs = half(call.rel_k.data, (amx.per_head ? call.heads : 1) * amx.pair_halves);
    amx.biases = memory.floats(call.rel_bias.data, (amx.bias_per_head ? call.heads : 1) * call.rows);
  }

  void pack_tables(const Team& team, Memory&) const {
    const Call& call = p.call;
    if (amx.biases)
      for (int64_t h = 0; h < (amx.bias_per_head ? call.heads : 1); ++h) read_bias(call, h, amx.biases + h * call.rows);
    if (!amx.tables) return;
    const int64_t panels = amx.table_pair_rows / kPanel, tasks = (panels + kPanelsOfTask - 1) / kPanelsOfTask;
    parallel(team, (amx.per_head ? call.heads : 1) * tasks, [&](int64_t index, int64_t thread) {
      const int64_t h = index / tasks, first = index % tasks * kPanelsOfTask, last = least(first + kPanelsOfTask, panels);
      const AmxWorkspace& w = workspaces[thread].forward;
      const Matrix table = matrix(call.rel_k, 0, h);
      for (int64_t panel = first; panel < least(last, panels_of(call.rows)); ++panel)
        pack_half_panel(table, call.rows, p.size, amx.sizes.size, true, panel,
                        amx.tables + h * amx.table_halves + panel * kPanel * amx.sizes.size, w.scratch, w.row_scratch);
      pack_half_pairs(table, call.rows, p.size, p.padded_size, first * kPanel, last * kPanel, amx.table_pair_rows,
                      amx.table_pairs + h * amx.pair_halves, 0, w.scratch, w.row_scratch);
    });
  }

  void begin(const Job& job, int64_t task) const {
    const AmxUnit& unit = units[job.unit];
    const AmxWorkspace& w = workspaces[job.thread].forward;
    const Matrix key = matrix(p.call.key, job.batch, job.key_head), value = matrix(p.call.value, job.batch, job.key_head);
    const int64_t first = task * kPanelsOfTask, last = least(first + kPanelsOfTask, panels_of(p.call.keys));
    for (int64_t panel = first; panel < last; ++panel) {
      pack_half_panel(key, p.call.keys, p.size, amx.sizes.size, false, panel, unit.key_panels + panel * kPanel * amx.sizes.size, w.scratch,
                      w.row_scratch);
      pack_half_panel(value, p.call.keys, p.value_size, amx.upstream_size, false, panel,
                      unit.value_panels + panel * kPanel * amx.upstream_size, w.scratch, w.row_scratch);
    }
    const bool final = (task + 1) * kPanelsOfTask >= panels_of(p.call.keys);
    pack_half_pairs(key, p.call.keys, p.size, p.padded_size, first * kPanel, final ? amx.sizes.keys + kTileDepth : last * kPanel,
                    amx.sizes.keys + kTileDepth, unit.key_pairs, 0, w.scratch, w.row_scratch);
    for (int64_t d = 0; unit.key_gradient && d < p.padded_size; ++d)
      fill(unit.key_gradient + d * amx.key_columns + first * kPanel, 0.0f, (last - first) * kPanel);
    for (int64_t d = 0; unit.value_gradient && d < p.padded_value_size; ++d)
      fill(unit.value_gradient + d * amx.key_columns + first * kPanel, 0.0f, (last - first) * kPanel);
  }

  // Columns [first, first + 16) of a transposed sum as 16 rows of `padded`.
  static void transpose_columns(const float* from, int64_t stride, int64_t first, int64_t padded, float* to) {
    for (int64_t d = 0; d < padded; d += kPanel) transpose(from + d * stride + first, stride, to + d, padded);
  }

  void end(const Job& job, int64_t task) const {
    const AmxUnit& unit = units[job.unit];
    const Range keys = keys_of_task(p, task);
    auto write = [&](const Tensor& grad, const float* sum, int64_t size, int64_t padded, float factor) {
      if (!grad.data) return;
      float* rows = workspaces[job.thread].forward.base.scores;  // 16 rows, for a moment
      for (int64_t first = keys.first; first < keys.last; first += kPanel) {
        for (int64_t part = 0; part < padded; part += 2 * kPanel) {
          const int64_t width = least<int64_t>(2 * kPanel, padded - part);
          transpose_columns(sum + part * amx.key_columns, amx.key_columns, first, width, rows);
          for (int64_t row = 0; row < least<int64_t>(kPanel, keys.last - first); ++row)
            if (part < size)
              write_row(grad.data, grad.dtype,
                        job.batch * grad.stride[0] + job.key_head * grad.stride[1] + (first + row) * grad.stride[2] + part * grad.stride[3],
                        grad.stride[3], least(width, size - part), rows + row * width, factor);
        }
      }
    };
    write(p.call.grad_key, unit.key_gradient, p.size, p.padded_size, (float)p.absolute_scale());
    write(p.call.grad_value, unit.value_gradient, p.value_size, p.padded_value_size, 1.0f);
  }

  void queries(const Job& job, int64_t index, int64_t block_index, const Parts& parts, bool team, bool first, bool last) const {
    const Call& call = p.call;
    const AmxUnit& unit = units[job.unit];
    const Sums& own = shared.sums[job.member];
    AmxBackwardWorkspace& w = workspaces[job.thread];
    AmxHead operands = {};
    Head& head = operands.head;
    head.batch = job.batch;
    head.head = index;
    head.keys = shared.keys[job.batch];
    head.rel_k.rows = call.rows;
    head.rel_k.left = call.left;
    operands.key_panels = unit.key_panels;
    operands.value_panels = unit.value_panels;
    operands.table_panels = amx.tables ? amx.tables + (amx.per_head ? index * amx.table_halves : 0) : nullptr;
    operands.bias = amx.biases ? amx.biases + (amx.bias_per_head ? index * call.rows : 0) : nullptr;
    Gradients out = {};
    out.key.data = unit.key_gradient;
    out.value.data = unit.value_gradient;
    FloatKernel::query_sums(p, own, index, block_index, team ? content_gradients[job.unit] : nullptr, position_gradients[job.unit],
                            w.forward.base, out);

    const AmxSums& of_member = sums[job.member * heads + (heads > 1 ? index % p.ratio : 0)];
    const Block block = amx.prepare(operands, w, block_index);
    if (first && out.content) {
      fill(out.content, 0.0f, p.block_rows * p.padded_size);
      if (p.position_apart()) fill(out.position, 0.0f, p.block_rows * p.padded_size);
    }
    if (!block.keys.empty())
      for (const Range& keys : parts.ranges) amx.keys(operands, block, keys, unit, of_member, out, w);
    if (last) finish_block(p, head, block, out);
  }

  // The sums of other kernels have a factor of scale * log2(e) in their tables: theirs is the scaled query.
  void collect(int64_t member) const {
    const float factor = (float)(p.absolute_scale() * kLog2E);
    const int64_t rows = p.call.rows;
    for (int64_t local = 0; local < heads; ++local) {
      const AmxSums& from = sums[member * heads + local];
      if (!shared.sums[member].rel_k) return;
      float* to = shared.sums[member].rel_k + local * rows * p.padded_depth;
      if (from.table) {
        for (int64_t d = 0; d < p.size; ++d)
          for (int64_t row = 0; row < rows; ++row) to[row * p.padded_depth + d] += factor * from.table[d * amx.table_columns + row];
        add_scaled(to, from.left_edge, factor, p.size);
        add_scaled(to + (rows - 1) * p.padded_depth, from.right_edge, factor, p.size);
        fill(from.table, 0.0f, amx.sizes.size * amx.table_columns);
        fill(from.left_edge, 0.0f, p.size);
        fill(from.right_edge, 0.0f, p.size);
      }
      if (from.bias) {
        for (int64_t row = 0; row < rows; ++row) to[row * p.padded_depth + p.depth - 1] += from.bias[row];
        fill(from.bias, 0.0f, rows);
      }
    }
  }
};

static int backward_amx(const Call& call, const Team& team) {
  Problem p(call, kBlockRowsBackward, kBlockKeysBackward);
  p.block_rows = least(round_up(p.block_rows, kGroupRows), kBlockRowsBackward);  // a group's rows are summed whole
  Shared shared = {};
  Memory memory = {team};
  if (!find_keys(call, memory, shared) ||
      !plan_table(p, team, call.rel_k, call.rel_bias, p.rel_k_source(0), call.left, false, false, shared.tables.rel_k))
    return 1;
  return backward_with<AmxKernel>(p, team, shared, memory);
}

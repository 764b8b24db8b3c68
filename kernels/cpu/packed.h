// Packed calls. Each sequence is a call of its own, with those rows of the tables that its distances reach, so that
// time and memory go with its length. What is long beside all others is shared by the threads, one sequence after the
// other; then every thread has sequences of its own, which depend on their lengths and the number of threads only.

using Entry = int (*)(const Call&, const Team&);

// A sequence as a call.
struct Sequence {
  Call call;
  int64_t row;  // of the whole tables: their first one here

  bool empty() const { return call.queries == 0 || call.keys == 0; }
};

INLINE int64_t bytes_of(int64_t dtype) {
  switch (dtype) {
    case kFloat32:
      return 4;
    case kBool:
      return 1;
    case kInt64:
      return 8;
    default:
      return 2;
  }
}

INLINE void advance(Tensor& tensor, int dim, int64_t count) {
  if (tensor.data) tensor.data += count * tensor.stride[dim] * bytes_of(tensor.dtype);
}

INLINE Range sequence_range(const Tensor& ends, int64_t number) {
  const int64_t* end = (const int64_t*)ends.data + number * ends.stride[0];
  return {end[0], end[ends.stride[0]]};
}

static Sequence sequence_of(const Call& packed, int64_t number) {
  Sequence result = {packed, 0};
  Call& call = result.call;
  const Range queries = sequence_range(packed.cu_seqlens_q, number), keys = sequence_range(packed.cu_seqlens_k, number);
  call.cu_seqlens_q.data = call.cu_seqlens_k.data = nullptr;
  call.batch = 1;
  call.first_batch = number;
  call.queries = queries.last - queries.first;
  call.keys = keys.last - keys.first;
  Tensor* const of_queries[] = {&call.query,       &call.output,   &call.lse,
                                &call.grad_output, &call.grad_lse, &call.grad_query};
  Tensor* const of_keys[] = {&call.key, &call.value, &call.key_mask, &call.grad_key, &call.grad_value};
  Tensor* const of_sequence[] = {&call.key_lengths, &call.query_offsets};
  for (Tensor* of : of_queries) advance(*of, 2, queries.first);
  for (Tensor* of : of_keys) advance(*of, 2, keys.first);
  for (Tensor* of : of_sequence) advance(*of, 0, number);
  if (result.empty()) return result;
  Call unmasked = call;
  unmasked.key_mask.data = nullptr;
  const Keys seen = visible_keys(unmasked, 0, nullptr);
  const int64_t first = table_position(seen, 0), last = table_position(seen, call.queries - 1);
  result.row = clamp<int64_t>(call.left - last, 0, call.rows - 1);
  call.rows = clamp<int64_t>(call.keys - 1 - first + call.left, 0, call.rows - 1) - result.row + 1;
  call.left -= result.row;
  call.right = call.rows - 1 - call.left;
  Tensor* const tables[] = {&call.rel_k, &call.rel_q, &call.rel_v, &call.rel_bias};
  for (Tensor* of : tables) advance(*of, 2, result.row);
  return result;
}

// About how long a sequence takes.
static int64_t cost_of(const Call& packed, int64_t number) {
  const Range queries = sequence_range(packed.cu_seqlens_q, number), keys = sequence_range(packed.cu_seqlens_k, number);
  const int64_t rows = queries.last - queries.first, columns = keys.last - keys.first;
  double seen = (double)columns;
  if (packed.has_window_left && packed.has_window_right)
    seen = least(seen, (double)packed.window_left + (double)packed.window_right + 1);
  if (packed.chunk_size && packed.chunk_left >= 0)
    seen = least(seen, ((double)packed.chunk_left + 1) * (double)packed.chunk_size);
  return (int64_t)((double)rows * seen) + 16 * (rows + columns) + 1;
}

// Who computes which sequence.
struct Shares {
  int64_t count, shared;   // of sequences; the first ones in `order` are everybody's
  int64_t *order, *owner;  // the longest ones come first, about; whose the sequence in this place is
};

static Shares share_out(const Call& packed, Memory& memory) {
  const int64_t count = packed.batch, threads = memory.team.threads;
  Shares result = {count, 0, memory.array<int64_t>(count), memory.array<int64_t>(count)};
  int64_t* cost = memory.array<int64_t>(count);
  double* load = memory.array<double>(threads);
  if (!memory.enough) return result;
  int64_t next[65] = {};  // places in the order, by powers of two of the cost, falling
  double rest = 0;
  for (int64_t n = 0; n < count; ++n) {
    cost[n] = cost_of(packed, n);
    rest += (double)cost[n];
    ++next[__builtin_clzll((uint64_t)cost[n]) + 1];
  }
  for (int power = 1; power < 65; ++power) next[power] += next[power - 1];
  for (int64_t n = 0; n < count; ++n) result.order[next[__builtin_clzll((uint64_t)cost[n])]++] = n;
  for (; threads > 1 && result.shared < count; ++result.shared) {
    const double own = (double)cost[result.order[result.shared]];
    if (own * (double)threads <= rest) break;
    rest -= own;
  }
  for (int64_t thread = 0; thread < threads; ++thread) load[thread] = 0;
  for (int64_t place = result.shared; place < count; ++place) {
    int64_t idle = 0;
    for (int64_t thread = 1; thread < threads; ++thread)
      if (load[thread] < load[idle]) idle = thread;
    result.owner[place] = idle;
    load[idle] += (double)cost[result.order[place]];
  }
  return result;
}

// compute(number, owner, team): every sequence, with a team whose memory is free again afterwards. 0 = all done.
template <class Compute>
static int all_sequences(const Shares& shares, Memory& memory, const Compute& compute) {
  const Team& team = memory.team;
  int* status = memory.array<int>(team.threads);
  if (!memory.enough) return 1;
  auto run = [&](int64_t place, int64_t owner, int64_t threads) {
    const Team own = {threads,       team.cache_bytes, team.run, team.allocate, team.arena_of(team, owner),
                      team.arena_of, team.clear};
    status[owner] |= compute(shares.order[place], owner, own);
    team.clear(own);
  };
  for (int64_t owner = 0; owner < team.threads; ++owner) status[owner] = 0;
  for (int64_t place = 0; place < shares.shared; ++place) run(place, 0, team.threads);
  parallel(team, team.threads, [&](int64_t owner, int64_t) {
    for (int64_t place = shares.shared; place < shares.count; ++place)
      if (shares.owner[place] == owner) run(place, owner, 1);
  });
  int all = 0;
  for (int64_t owner = 0; owner < team.threads; ++owner) all |= status[owner];
  return all;
}

// Zeros for all rows of a sequence's tensor; nothing where there is none.
static void clear_rows(const Tensor& tensor, int64_t heads, int64_t rows, int64_t size, const Team& team) {
  if (!tensor.data || rows == 0) return;
  float* zeros = (float*)team.allocate(team, round_up(size, kPanel) * 4);
  if (!zeros) return;
  fill(zeros, 0.0f, size);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t row = 0; row < rows; ++row) write_row(matrix(tensor, 0, head), row, size, zeros, 1.0f);
}

static int forward_packed(const Call& packed, const Team& team, Entry forward) {
  Memory memory = {team};
  const Shares shares = share_out(packed, memory);
  return all_sequences(shares, memory, [&](int64_t number, int64_t, const Team& own) {
    const Sequence sequence = sequence_of(packed, number);
    const Call& call = sequence.call;
    if (!sequence.empty()) return forward(call, own);
    clear_rows(call.output, call.heads, call.queries, call.value_size, own);
    for (int64_t head = 0; head < call.heads; ++head)
      for (int64_t row = 0; row < call.queries; ++row) element(call.lse, 0, head, row) = -kInfinity;
    return 0;
  });
}

// A gradient to which all sequences contribute, of a table or a bias: (heads or 1, rows, size). What a sequence
// contributes is written apart, in float32, and added to its owner's sum.
struct Contribution {
  Tensor Call::* gradient;
  bool by_distance;  // a table's: a sequence has some of the rows
  int64_t size;

  int64_t heads(const Call& call) const { return (call.*gradient).stride[1] ? call.heads : 1; }
  int64_t rows(const Call& call) const { return by_distance ? call.rows : 1; }
  int64_t floats(const Call& call) const { return heads(call) * rows(call) * size; }
};

struct Contributions {
  Contribution all[6];
  int count = 0;

  explicit Contributions(const Call& call) {
    auto add = [&](Tensor Call::* gradient, bool by_distance, int64_t size) {
      if ((call.*gradient).data) all[count++] = {gradient, by_distance, size};
    };
    add(&Call::grad_rel_k, true, call.size);
    add(&Call::grad_rel_q, true, call.size);
    add(&Call::grad_rel_v, true, call.value_size);
    add(&Call::grad_rel_bias, true, 1);
    add(&Call::grad_pos_bias_u, false, call.size);
    add(&Call::grad_pos_bias_v, false, call.size);
  }
};

static int backward_sequence(const Call& packed, int64_t number, const Contributions& shared, float* const* sums,
                             const Team& team, Entry backward) {
  Sequence sequence = sequence_of(packed, number);
  Call& call = sequence.call;
  if (sequence.empty()) {
    clear_rows(call.grad_query, call.heads, call.queries, call.size, team);
    clear_rows(call.grad_key, call.key_heads, call.keys, call.size, team);
    clear_rows(call.grad_value, call.key_heads, call.keys, call.value_size, team);
    return 0;
  }
  float* own[6];
  for (int i = 0; i < shared.count; ++i) {
    const Contribution& of = shared.all[i];
    own[i] = (float*)team.allocate(team, round_up(of.floats(call), kPanel) * 4);
    if (!own[i]) return 1;
    const int64_t rows = of.rows(call), head = of.heads(packed) > 1 ? rows * of.size : 0;
    call.*of.gradient = {(char*)own[i], kFloat32, {0, head, of.by_distance ? of.size : 0, 1}};
  }
  if (backward(call, team) != 0) return 1;
  for (int i = 0; i < shared.count; ++i) {
    const Contribution& of = shared.all[i];
    const int64_t rows = of.rows(call), first = of.by_distance ? sequence.row : 0;
    for (int64_t head = 0; head < of.heads(packed); ++head)
      add_scaled(sums[i] + (head * of.rows(packed) + first) * of.size, own[i] + head * rows * of.size, 1.0f,
                 rows * of.size);
  }
  return 0;
}

static int backward_packed(const Call& packed, const Team& team, Entry backward) {
  Memory memory = {team};
  const Shares shares = share_out(packed, memory);
  const Contributions shared(packed);
  float** sums = memory.array<float*>(team.threads * 6);
  for (int64_t index = 0; memory.enough && index < team.threads * shared.count; ++index)
    sums[index / shared.count * 6 + index % shared.count] =
        memory.zeros(true, shared.all[index % shared.count].floats(packed));
  if (!memory.enough) return 1;
  const int status = all_sequences(shares, memory, [&](int64_t number, int64_t owner, const Team& own) {
    return backward_sequence(packed, number, shared, sums + owner * 6, own, backward);
  });
  for (int i = 0; i < shared.count; ++i) {
    const Contribution& of = shared.all[i];
    const int64_t rows = of.rows(packed);
    for (int64_t owner = 1; owner < team.threads; ++owner)
      add_scaled(sums[i], sums[owner * 6 + i], 1.0f, of.floats(packed));
    for (int64_t index = 0; index < of.heads(packed) * rows; ++index)
      write_row(matrix(packed.*of.gradient, 0, index / rows), index % rows, of.size, sums[i] + index * of.size, 1.0f);
  }
  return status;
}

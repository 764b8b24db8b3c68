// The backward pass: the tiles of scores once more, and from each of them every gradient (Dao et al. 2022; with the
// relative terms).
//
// A block of queries stays while the keys pass. Its query gradient is its own; those of keys and values belong to one
// thread at a time (see gradients.h); those of the tables are summed for each thread.

// What one head of one thread adds to. Null: not needed. Keys and values are shared by the query heads of a key head.
struct Gradients {
  Result key, value;  // key: still to be multiplied by ln 2
  // Of the block's rows, (rows, padded size), perhaps the same; still to be multiplied by the scale.
  float *content, *position;
  // (R, padded); rel_k to be multiplied by ln 2 except for its bias column, rel_q by the scale.
  float *rel_k, *rel_q, *rel_v;
  float *pos_bias_u, *pos_bias_v;  // (D,)
};

static int64_t carve_backward(const Problem& p, char* base, Workspace& w) {
  Carver carver = {base, 0};
  w = {};
  carve_scores(p, carver, w);
  const int64_t rows = round_up(p.block_rows, kPanel);  // rel_q transposes whole panels of rows
  w.scores = carver.floats(rows * p.leading);
  w.weights_gradient = carver.floats(rows * p.leading);
  w.upstream = carver.floats(p.block_rows * p.padded_value_size);
  w.base = carver.floats(p.block_rows);
  w.inverse = carver.floats(p.block_rows);
  w.delta = carver.floats(p.block_rows);
  w.content_gradient = carver.floats(p.block_rows * p.padded_size);
  w.position_gradient = p.position_apart() ? carver.floats(p.block_rows * p.padded_size) : w.content_gradient;
  if (p.call.rel_v.data) {
    w.value_edges = {carver.floats(p.block_rows), carver.floats(p.block_rows)};
  }
  w.apart = carver.floats(p.block_rows);
  w.keys = carver.floats(p.block_keys * p.padded_size);
  return carver.used;
}

// Gradients of a tile's weights, before dropout: upstream times (value + rel_v).
static void tile_weights_gradient(const Problem& p, const Head& head, const Block& block, const Tile& tile,
                                  const Workspace& w, const Result& gradient) {
  const Left upstream = {w.upstream, p.padded_value_size, 1};
  const float* values = head.value_panels + tile.first_key * p.value_size;
  if (p.call.rel_v.data) {
    times_distances(block, tile, upstream, head.rel_v, w.value_edges, gradient);
    times_columns<true>(tile, upstream, values, p.value_size, gradient);
  } else {
    times_columns<false>(tile, upstream, values, p.value_size, gradient);
  }
}

// Of whole vectors; weights of zero count for nothing, whatever they meet.
INLINE float weighted_sum(const float* weights, const float* of, int64_t count) {
  Vec sum = {};
  for (int64_t column = 0; column < count; column += kWidth) {
    const Vec weight = load(weights + column);
    sum += keep_where(weight != Vec{}, weight * load(of + column));
  }
  return sum_lanes(sum);
}

// Rows that products must not meet, since they would multiply by zero what these hold: zeros take their place. What
// then stands for a row's base: infinity where it sees nothing, or nobody uses its output: it is owed nothing and its
// weights are 0. NaN where it is not finite, since it makes everything so that it sees, and only that. Or else 0.
INLINE float base_apart(const Problem& p, const Head& head, int64_t query, bool upstream, bool finite) {
  const Tensor& lse_slope = p.call.grad_lse;
  const bool used = element(p.call.lse, head.batch, head.head, query) != -kInfinity &&
                    (upstream || (lse_slope.data && element(lse_slope, head.batch, head.head, query) != 0.0f));
  return !used ? kInfinity : finite ? 0.0f : __builtin_nanf("");
}

// Returns whether anything is owed to some row.
static bool set_rows_apart(const Problem& p, const Head& head, const Block& block, const Workspace& w) {
  auto finite_rows = [&](int64_t first, int64_t count) {
    return all_finite(w.content + first * p.padded_size, count * p.padded_size) &&
           all_finite(w.upstream + first * p.padded_value_size, count * p.padded_value_size) &&
           (w.position == w.content || all_finite(w.position + first * p.padded_depth, count * p.padded_depth));
  };
  const bool all = finite_rows(0, block.rows);
  bool owed = false;
  for (int64_t row = 0; row < block.rows; ++row) {
    float *content = w.content + row * p.padded_size, *upstream = w.upstream + row * p.padded_value_size;
    float* position = w.position == w.content ? nullptr : w.position + row * p.padded_depth;
    const bool finite = all || finite_rows(row, 1);
    w.apart[row] = base_apart(p, head, block.first + row, any_nonzero(upstream, p.padded_value_size), finite);
    owed |= w.apart[row] != kInfinity;
    if (w.apart[row] == 0.0f) continue;
    fill(content, 0.0f, p.padded_size);
    fill(upstream, 0.0f, p.padded_value_size);
    if (position) fill(position, 0.0f, p.padded_depth);
  }
  return owed;
}

// To be called when the statistics are there.
static void finish_rows_apart(const Block& block, const Workspace& w) {
  for (int64_t row = 0; row < block.rows; ++row) {
    if (w.apart[row] == 0.0f) continue;
    w.base[row] = w.apart[row];
    w.delta[row] = 0.0f;
  }
}

// From maxima, sums and unnormalised sum_j w_ij dw_ij to base, inverse and delta.
static void finish_statistics(const Problem& p, const Block& block, Workspace& w, bool find_delta) {
  for (int64_t row = 0; row < block.rows; ++row) {
    if (w.inverse[row] != 0.0f) w.inverse[row] = 1.0f / w.inverse[row];
    if (w.base[row] == -kInfinity) w.base[row] = kInfinity;  // sees nothing: every weight is 0
    if (find_delta) w.delta[row] *= w.inverse[row] / p.dropout.kept_share;
  }
}

// d lse / d score is the weight.
static void subtract_lse_gradient(const Problem& p, const Head& head, const Block& block, Workspace& w) {
  for (int64_t row = 0; row < block.rows; ++row)
    if (w.base[row] != kInfinity)  // whatever the slope of a log-sum-exp of nothing
      w.delta[row] -= element(p.call.grad_lse, head.batch, head.head, block.first + row);
}

// Weights are 2^(score - base) * inverse. Where the log-sum-exp is moderate it is the base. A row whose scores share a
// large constant (a mask of -1e9) has one that no longer holds the logarithm of the sum; and in half precision the
// rounded output does not give the exact sum_j w_ij dw_ij. Then one more pass over the keys finds the maximum, the sum,
// and that.
static void row_statistics(const Problem& p, const Head& head, const Block& block, Workspace& w, bool find_delta) {
  const Result scores = {w.scores + kSlack, p.leading}, gradient = {w.weights_gradient + kSlack, p.leading};
  fill(w.base, -kInfinity, block.rows);
  fill(w.inverse, 0.0f, block.rows);  // for now the sum
  float* sums = find_delta ? w.delta : nullptr;
  if (sums) fill(sums, 0.0f, block.rows);
  Tile tile;
  for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last; first_key += p.block_keys) {
    cut_tile(p, head, block, first_key, kRows, tile);
    if (tile_hidden(p, head, block, tile.keys)) continue;
    tile_scores(p, head, block, tile, w, scores);
    if (sums) tile_weights_gradient(p, head, block, tile, w, gradient);
    for (int g = 0; g < tile.count; ++g) {
      const Group& group = tile.groups[g];
      const int64_t begin = group.columns.first, columns = group.columns.last - begin;
      for (int64_t row = group.row; row < group.row + group.rows; ++row) {
        float* weights = scores.data + row * scores.row + begin;
        softmax_row(weights, columns, {w.base[row], w.inverse[row], sums ? sums + row : nullptr, sums ? 1 : 0});
        if (!sums) continue;
        if (p.dropout.used()) drop_row(p.dropout, head, block.first + row, first_key + begin, columns, weights, w.keep);
        sums[row] += weighted_sum(weights, gradient.data + row * gradient.row + begin, columns);
      }
    }
  }
  finish_statistics(p, block, w, find_delta);
}

// The block's queries, upstream gradients, and what turns scores into weights and their gradients. Returns whether
// anything is owed to some row.
static bool prepare_backward(const Problem& p, const Head& head, const Block& block, Workspace& w) {
  const Call& call = p.call;
  const Matrix grad_output = matrix(call.grad_output, head.batch, head.head),
               output = matrix(call.output, head.batch, head.head);
  const bool half = call.output.dtype != kFloat32;  // a part's is not
  read_block(p, head, block, w);
  for (int64_t row = 0; row < block.rows; ++row)
    read_padded(grad_output, block.first + row, p.value_size, p.padded_value_size,
                w.upstream + row * p.padded_value_size);
  if (!set_rows_apart(p, head, block, w)) return false;
  find_edges(p, head, block, w);
  bool large = false;
  for (int64_t row = 0; row < block.rows; ++row) {
    const float lse = element(call.lse, head.batch, head.head, block.first + row);
    large |= (lse > 128.0f || lse < -128.0f) && w.apart[row] == 0.0f;
    w.base[row] = (float)(lse * kLog2E);
    w.inverse[row] = 1.0f;
    w.delta[row] = 0.0f;
    if (half) continue;
    read_padded(output, block.first + row, p.value_size, p.padded_value_size, w.scratch);
    w.delta[row] = weighted_sum(w.upstream + row * p.padded_value_size, w.scratch, p.padded_value_size);
  }
  if (call.rel_v.data) {
    // Hidden columns beyond the table get these even where no visible one needs them: a weight of 0 times what was left
    // there before.
    fill(w.value_edges.left, 0.0f, block.rows);
    fill(w.value_edges.right, 0.0f, block.rows);
    edge_products(lay_over(head.rel_v, block.rows, block.position, 0), block.keys, {w.upstream, p.padded_value_size, 1},
                  w.value_edges, w.scratch);
  }
  if (half || (large && !call.is_part)) row_statistics(p, head, block, w, half);
  if (call.grad_lse.data) subtract_lse_gradient(p, head, block, w);
  finish_rows_apart(block, w);
  return true;
}

// One row's scores of these keys become weights after dropout, gradients of its weights gradients of its scores.
INLINE void weights_and_gradients_row(const Problem& p, const Head& head, const Block& block, int64_t row,
                                      const Range& keys, const Workspace& w, float* weights, float* gradient) {
  const Vec base = splat(w.base[row]), inverse = splat(w.inverse[row]), delta = splat(w.delta[row]);
  const int64_t count = keys.last - keys.first;
  if (w.base[row] == kInfinity) {  // whatever its scores are
    fill(weights, 0.0f, count);
    fill(gradient, 0.0f, count);
    return;
  }
  // Zero for what is hidden, whatever came of a product with it.
  auto seen = [&](int64_t column) { return load(weights + column) != splat(-kInfinity); };
  if (p.dropout.used()) {
    dropout_keep(p.dropout, head.batch, head.head, block.first + row, keys.first, keys.last, w.keep);
    const Vec factor = splat(1.0f / p.dropout.kept_share);
    for (int64_t column = 0; column < count; column += kWidth) {
      const IVec sees = seen(column);
      const Vec weight = keep_where(sees, exp2_nonpositive(load(weights + column) - base) * inverse),
                kept = load(w.keep + column) * factor;
      store(gradient + column, keep_where(sees, weight * (load(gradient + column) * kept - delta)));
      store(weights + column, weight * kept);
    }
  } else {
    for (int64_t column = 0; column < count; column += kWidth) {
      const IVec sees = seen(column);
      const Vec weight = keep_where(sees, exp2_nonpositive(load(weights + column) - base) * inverse);
      store(gradient + column, keep_where(sees, weight * (load(gradient + column) - delta)));
      store(weights + column, weight);
    }
  }
}

// The same for a tile; zero wherever nothing is seen, slack included.
static void weights_and_gradients(const Problem& p, const Head& head, const Block& block, const Tile& tile,
                                  Workspace& w, const Result& scores, const Result& gradient) {
  int64_t next = 0;
  auto clear = [&](int64_t row, int64_t first, int64_t last) {
    fill(scores.data + row * scores.row + first, 0.0f, last - first);
    fill(gradient.data + row * gradient.row + first, 0.0f, last - first);
  };
  const int64_t end = p.block_keys + kSlack;
  for (int g = 0; g < tile.count; ++g) {
    const Group& group = tile.groups[g];
    for (; next < group.row; ++next) clear(next, -kSlack, end);
    next = group.row + group.rows;
    for (int64_t row = group.row; row < next; ++row) {
      const int64_t first = group.columns.first, last = group.columns.last;
      weights_and_gradients_row(p, head, block, row, {tile.first_key + first, tile.first_key + last}, w,
                                scores.data + row * scores.row + first, gradient.data + row * gradient.row + first);
      clear(row, -kSlack, first);
      clear(row, last, end);
    }
  }
  const int64_t rows = p.call.rel_q.data ? round_up(block.rows, kPanel) : block.rows;
  for (; next < rows; ++next) clear(next, -kSlack, end);
}

// gradient[key] += sum over the tile's rows of a[row][key] * right[row], for the keys of the tile.
static void add_over_rows(const Block& block, const Tile& tile, const Result& a, const Right& right, int64_t size,
                          const Result& gradient) {
  int64_t begin = 0, end = 0;
  const int64_t first = tile.keys.first - tile.first_key, last = tile.keys.last - tile.first_key;
  for (int64_t column = first; column < last; column += kRows) {
    const int count = (int)least<int64_t>(kRows, last - column);
    while (begin < block.rows && tile.last[begin] <= column) ++begin;
    while (end < block.rows && tile.first[end] < column + count) ++end;
    if (begin < end)
      multiply<true>(count, size / kPanel, {a.data + begin * a.row + column, 1, a.row}, right.from(begin), end - begin,
                     gradient.from(tile.first_key + column));
  }
}

// rel_q's share in the gradients: its tile is the transposed one.
static void key_score_gradients(const Problem& p, const Head& head, const Block& block, const Tile& tile, Workspace& w,
                                const Result& gradient, const Gradients& out) {
  const int64_t columns = round_up(block.rows, kPanel), leading = columns + 2 * kSlack,
                count = tile.keys.last - tile.keys.first;
  const Result by_key = {w.by_key + kSlack, leading};
  for (int64_t key = 0; key < count; key += kPanel) {
    for (int64_t row = 0; row < columns; row += kPanel)
      for (int64_t part = 0; part < kPanel; part += kWidth)
        transpose(gradient.data + row * gradient.row + tile.keys.first - tile.first_key + key + part, gradient.row,
                  by_key.data + (key + part) * leading + row, leading);
  }
  for (int64_t key = 0; key < count; ++key) {
    fill(by_key.data + key * leading - kSlack, 0.0f, kSlack);
    fill(by_key.data + key * leading + columns, 0.0f, kSlack);
  }
  if (out.key.data)
    for (int64_t key = 0; key < count; key += kRows) {
      const Skew skew = lay_over(head.rel_q, least<int64_t>(kRows, count - key), tile.keys.first + key, block.position);
      const Result target = out.key.from(tile.keys.first + key);
      const Range queries = {0, block.rows};
      relative_values(skew, skew.touched(queries), by_key.from(key), p.padded_size, target);
      edge_values(skew, queries, by_key.from(key), p.padded_size, target);
    }
  if (out.rel_q) {
    int32_t* first = (int32_t*)w.key_edges.left;  // no longer needed
    int32_t* last = (int32_t*)w.key_edges.right;
    for (int64_t key = 0; key < count; ++key) first[key] = 0, last[key] = (int32_t)block.rows;
    relative_table_gradient(lay_over(head.rel_q, count, tile.keys.first, block.position), {first, last, nullptr},
                            by_key, {w.key_rows, p.padded_size, kPanel}, p.padded_size, {out.rel_q, p.padded_size});
  }
}

// Rows of a tile's keys, for products with gradients of its scores: zeros for what is not finite, since such a gradient
// may be zero; where it is not, it is NaN, as the score was.
static Right finite_keys(const Problem& p, const Head& head, const Tile& tile, const Workspace& w) {
  const Right key = head.key.from(tile.first_key);
  if (!some_nonfinite(head, tile.keys)) return key;
  for (int64_t row = tile.keys.first - tile.first_key; row < tile.keys.last - tile.first_key; ++row) {
    copy(w.keys + row * p.padded_size, key.data + row * key.k, p.padded_size);
    drop_nonfinite(w.keys + row * p.padded_size, p.padded_size);
  }
  return {w.keys, p.padded_size, kPanel};
}

// Everything that the block's rows and the keys in `keys` contribute. The block has been prepared.
static void backward_keys(const Problem& p, const Head& head, const Block& block, Range keys, Workspace& w,
                          const Gradients& out) {
  const Call& call = p.call;
  const Result scores = {w.scores + kSlack, p.leading}, gradient = {w.weights_gradient + kSlack, p.leading};
  Block part = block;
  part.keys = {most(keys.first, block.keys.first), least(keys.last, block.keys.last)};
  Tile tile;
  for (int64_t first_key = part.keys.first / kPanel * kPanel; first_key < part.keys.last; first_key += p.block_keys) {
    cut_tile(p, head, part, first_key, kRows, tile);
    if (tile.count == 0 || tile_hidden(p, head, part, tile.keys)) continue;
    tile_scores(p, head, part, tile, w, scores);
    tile_weights_gradient(p, head, part, tile, w, gradient);
    weights_and_gradients(p, head, part, tile, w, scores, gradient);

    const Right upstream = {w.upstream, p.padded_value_size, kPanel}, content = {w.content, p.padded_size, kPanel},
                position = {w.position, p.padded_depth, kPanel};
    const Seen seen = {tile.first, tile.last, call.chunk_size ? tile.lowest : nullptr};
    if (out.value.data) add_over_rows(part, tile, scores, upstream, p.padded_value_size, out.value);
    if (out.key.data) add_over_rows(part, tile, gradient, content, p.padded_size, out.key);
    if (call.rel_q.data) {
      if (some_nonfinite(head, tile.keys))
        drop_nonfinite(w.key_rows, (tile.keys.last - tile.keys.first) * p.padded_size);
      key_score_gradients(p, head, part, tile, w, gradient, out);
    }
    if (out.rel_v)
      relative_table_gradient(lay_over(head.rel_v, block.rows, block.position, first_key), seen, scores, upstream,
                              p.padded_value_size, {out.rel_v, p.padded_value_size});
    if (out.rel_k)
      relative_table_gradient(lay_over(head.rel_k, block.rows, block.position, first_key), seen, gradient, position,
                              p.padded_depth, {out.rel_k, p.padded_depth});
    if (!out.content) continue;
    add_over_columns(tile, gradient, finite_keys(p, head, tile, w), p.padded_size, {out.content, p.padded_size});
    if (call.rel_k.data)
      add_over_distances(part, tile, gradient, head.rel_k, p.padded_size, {out.position, p.padded_size});
  }
}

// The block's query gradient is complete: write it, and add to those of the two biases.
static void finish_block(const Problem& p, const Head& head, const Block& block, const Gradients& out) {
  const Call& call = p.call;
  if (!out.content) return;
  const float scale = (float)call.scale;
  for (int64_t row = 0; row < block.rows; ++row) {
    float* content = out.content + row * p.padded_size;
    const float* position = p.position_apart() ? out.position + row * p.padded_size : nullptr;
    if (out.pos_bias_u) add_scaled(out.pos_bias_u, content, scale, p.size);
    if (out.pos_bias_v && position) add_scaled(out.pos_bias_v, position, scale, p.size);
    if (!call.grad_query.data) continue;
    if (position) add_scaled(content, position, 1.0f, p.size);
    write_row(matrix(call.grad_query, head.batch, head.head), block.first + row, p.size, content, scale);
  }
}

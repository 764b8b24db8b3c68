// The backward pass in bfloat16 on AMX. B of a product over queries is a pair of rows interleaved, which the pass over
// the scores writes; so gradients of keys, values and tables are summed transposed, (size, rows):
//
//   dV^T (Dv, keys)  += upstream^T x weights          dK^T (D, keys) += content^T x dS
//   dE^T (D, rows)   += position^T x dS, in which row 2t + 1 is taken one column further right, and pair t two columns
//                       further: unskewed; and so rel_v's, += upstream^T x weights
//   dQ   (rows, D)   += dS x keys
//   dQ'  (rows, D)   += dS, each row read one element further right, x table
//
// For rel_q keys take the place of queries, as in its scores, and so dS is transposed: it gives dE^T and the keys' own
// gradient as above, which therefore has a second sum, of rows.

// One key head's keys and values, and the sums of their gradients.
struct AmxUnit {
  AmxKeys keys;
  float *key_gradient, *value_gradient;  // (size, keys), transposed
  float* key_rows_gradient;              // rel_q's share, (keys, size), still to be multiplied by the scale's sign
  QuerySums query;                       // of one query head, only for teams
};

// A table's gradient transposed, without what lies beyond its edges: (size,) each. Null: not needed.
struct AmxTableSum {
  float* total;
  Edges edges;
};

// Sums of one member for one head; those of tables that all heads share are the same ones for each.
struct AmxSums {
  AmxTableSum tables[3];
  float* bias;
};

constexpr int kWeights = 2;  // place in by_row

struct AmxBackwardWorkspace {
  AmxWorkspace forward;
  Half *upstream, *content_t, *position_t, *upstream_t;
  uint32_t *weights, *gradient;  // pairs of rows: a word holds (row 2t, row 2t + 1)
  // Gradients of scores as the sum of two bfloat16 numbers, for the products with tables: sums of many that nearly
  // cancel. By row, with the weights for rel_v as the third; and for rel_q by key: a row for each column of a tile.
  SkewedRows by_row[3], by_key[2];
  Half* keys_t;             // rel_q: a tile's keys (size, keys)
  float* weights_gradient;  // of a group
  // Beyond the tables' edges: sums of each row's gradients of scores, of its weights, and of each key's gradients.
  Edges beyond, weights_beyond, beyond_by_key;
};

struct AmxBackward {
  const AmxProblem& p;
  int64_t rows;                        // of a block, rounded up to whole groups
  int64_t words;                       // stride of rows of pairs
  int64_t key_columns, table_columns;  // strides of transposed sums

  explicit AmxBackward(const AmxProblem& problem) : p(problem) {
    rows = round_up(p.block_rows, kGroupRows);
    words = p.block_keys + 2 * kWideSlack;
    key_columns = panels_of(p.call.keys) * kPanel;
    table_columns = panels_of(p.call.rows) * kPanel;
  }

  int64_t carve(char* memory, AmxBackwardWorkspace& w) const {
    w = {};
    const int64_t first = carve_amx(p, false, memory, w.forward);
    Carver carver = {memory, first};
    w.upstream = carver.halves(rows * p.deep_value_size);
    w.content_t = carver.halves(p.deep_size * rows);
    w.position_t = p.position_is_content() ? w.content_t : carver.halves(p.deep_size * rows);
    w.upstream_t = carver.halves(p.deep_value_size * rows);
    w.weights = (uint32_t*)carver.floats(rows / 2 * words);
    w.gradient = (uint32_t*)carver.floats(rows / 2 * words);
    const Call& call = p.call;
    for (int part = 0; part < 2; ++part) {
      if (part == 0 || call.rel_k.data || call.grad_pos_bias_u.data)
        w.by_row[part] = SkewedRows::carve(carver, rows, p.block_keys, call.grad_rel_k.data);
      if (takes_by_key())
        w.by_key[part] = SkewedRows::carve(carver, round_up(p.block_keys, kGroupRows), rows, call.grad_rel_q.data);
    }
    if (call.grad_rel_v.data) w.by_row[kWeights] = SkewedRows::carve(carver, rows, p.block_keys, true);
    if (call.grad_rel_q.data) w.keys_t = carver.halves(p.padded_size * round_up(p.block_keys, kGroupRows));
    w.weights_gradient = carver.floats(kGroupRows * p.leading + 2 * kGroupRows);
    w.beyond = {carver.floats(rows), carver.floats(rows)};
    w.weights_beyond = {carver.floats(rows), carver.floats(rows)};
    w.beyond_by_key = {carver.floats(p.block_keys), carver.floats(p.block_keys)};
    Workspace& base = w.forward.base;
    base.base = carver.floats(rows);
    base.inverse = carver.floats(rows);
    base.delta = carver.floats(rows);
    base.apart = carver.floats(rows);
    base.value_edges = {carver.floats(rows), carver.floats(rows)};
    base.content_gradient = carver.floats(rows * p.padded_size);
    base.position_gradient = p.position_apart() ? carver.floats(rows * p.padded_size) : base.content_gradient;
    return carver.used;
  }

  // Whether gradients of scores are needed by key, too.
  bool takes_by_key() const { return p.call.rel_q.data && (p.call.grad_key.data || p.call.grad_rel_q.data); }

  // A group's tiles, from its first row on.
  Result scores_of(const AmxBackwardWorkspace& w) const { return {w.forward.base.scores + kSlack, p.leading}; }
  Result gradient_of(const AmxBackwardWorkspace& w) const { return {w.weights_gradient + kSlack, p.leading}; }

  // (count, padded) rows of bfloat16 to (padded, rows of a block), zero beyond count.
  void transpose_rows(const Half* from, int64_t count, int64_t padded, Half* to) const {
    for (int64_t column = 0; column < padded; ++column)
      for (int64_t row = 0; row < rows; ++row) to[column * rows + row] = row < count ? from[row * padded + column] : 0;
  }

  // As set_rows_apart in backward.h.
  bool set_apart(const Head& head, const Block& block, const AmxBackwardWorkspace& w) const {
    bool owed = false;
    float* apart = w.forward.base.apart;
    for (int64_t row = 0; row < block.rows; ++row) {
      Half *content = w.forward.content + row * p.deep_size, *position = w.forward.position + row * p.deep_size,
           *upstream = w.upstream + row * p.deep_value_size;
      const bool finite = all_finite(content, p.deep_size) && all_finite(position, p.deep_size) &&
                          all_finite(upstream, p.deep_value_size);
      apart[row] = base_apart(p, head, block.first + row, any_nonzero(upstream, p.deep_value_size), finite);
      owed |= apart[row] != kInfinity;
      if (apart[row] == 0.0f) continue;
      zero_halves(content, p.deep_size);
      zero_halves(position, p.deep_size);
      zero_halves(upstream, p.deep_value_size);
    }
    return owed;
  }

  // As prepare_backward in backward.h.
  bool prepare(const AmxHead& operands, const Block& block, AmxBackwardWorkspace& w) const {
    const Head& head = operands.head;
    read_block_amx(p, head, block, w.forward);
    const HalfSource grad = {matrix(p.call.grad_output, head.batch, head.head), p.call.queries, p.value_size,
                             p.deep_value_size};
    for (int64_t row = 0; row < block.rows; ++row)
      read_halves(grad, block.first + row, w.upstream + row * p.deep_value_size, w.forward.scratch.row);
    zero_halves(w.upstream + block.rows * p.deep_value_size, (rows - block.rows) * p.deep_value_size);
    if (!set_apart(head, block, w)) return false;
    find_edges_amx(p, head, block, w.forward);
    if (p.call.rel_v.data)
      edge_products_amx(lay_over(head.rel_v, block.rows, block.position, 0), block.keys, p.source(kRelV, head.head),
                        {w.upstream, p.deep_value_size}, w.forward.base.value_edges, w.forward.scratch);
    transpose_rows(w.upstream, block.rows, p.deep_value_size, w.upstream_t);
    transpose_rows(w.forward.content, block.rows, p.deep_size, w.content_t);
    if (w.position_t != w.content_t) transpose_rows(w.forward.position, block.rows, p.deep_size, w.position_t);
    if (p.call.is_part)
      given_statistics(head, block, w.forward.base);
    else
      statistics(operands, block, w);
    if (p.call.grad_lse.data) subtract_lse_gradient(p, head, block, w.forward.base);
    finish_rows_apart(block, w.forward.base);
    return true;
  }

  // Scores of a group's columns in units of ln 2, -inf where hidden, and gradients of its weights before dropout.
  void group_scores(const AmxHead& operands, const Block& block, const Tile& tile, const Group& group,
                    const AmxBackwardWorkspace& w) const {
    const Head& head = operands.head;
    const Result scores = scores_of(w), gradient = gradient_of(w);
    const Range& columns = group.columns;
    const int64_t size = p.deep_value_size;
    group_scores_amx(p, operands, block, tile, group, w.forward);
    const HalfLeft upstream = {w.upstream + group.row * size, size};
    group_products(lay_over(head.rel_v, block, tile, group), columns,
                   {upstream, upstream, operands.keys.value_panels + tile.first_key * size, operands.panels[kRelV],
                    size, w.forward.base.value_edges.from(group.row)},
                   gradient);
    const float unit = (float)(p.absolute_scale() * kLog2E);
    const Skew skew = lay_over(head.rel_k, block, tile, group);
    for (int r = 0; r < group.rows; ++r) {
      float* of_row = scores.data + r * scores.row;
      scale_row(of_row + columns.first, unit, columns.last - columns.first);
      if (operands.bias) add_bias(skew, r, columns, operands.bias, of_row);
      hide(p, head, block, tile, group.row + r, columns, w.forward.base, of_row);
    }
  }

  // Of a part: from the output and the log-sum-exp that were handed over.
  void given_statistics(const Head& head, const Block& block, Workspace& base) const {
    const Matrix grad_output = matrix(p.call.grad_output, head.batch, head.head),
                 output = matrix(p.call.output, head.batch, head.head);
    float *upstream = base.scratch, *row_of_output = base.scratch + p.padded_value_size;
    for (int64_t row = 0; row < block.rows; ++row) {
      base.base[row] = (float)(element(p.call.lse, head.batch, head.head, block.first + row) * kLog2E);
      base.inverse[row] = 1.0f;
      read_padded(grad_output, block.first + row, p.value_size, p.padded_value_size, upstream);
      read_padded(output, block.first + row, p.value_size, p.padded_value_size, row_of_output);
      base.delta[row] = weighted_sum(upstream, row_of_output, p.padded_value_size);
    }
  }

  // See row_statistics in backward.h.
  void statistics(const AmxHead& operands, const Block& block, AmxBackwardWorkspace& w) const {
    Workspace& base = w.forward.base;
    const Head& head = operands.head;
    const Result scores = scores_of(w), gradient = gradient_of(w);
    fill(base.base, -kInfinity, block.rows);
    fill(base.inverse, 0.0f, block.rows);
    fill(base.delta, 0.0f, block.rows);
    Tile tile;
    TileRegisters registers;
    for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last;
         first_key += p.block_keys) {
      cut_tile(p, head, block, first_key, kGroupRows, tile);
      if (tile.count == 0 || tile_hidden(p, head, block, tile.keys)) continue;
      if (p.call.rel_q.data) key_scores_amx(p, operands, block, tile, w.forward);
      for (int g = 0; g < tile.count; ++g) {
        const Group& group = tile.groups[g];
        group_scores(operands, block, tile, group, w);
        const int64_t begin = group.columns.first, columns = group.columns.last - begin;
        for (int r = 0; r < group.rows; ++r) {
          const int64_t row = group.row + r;
          float* weights = scores.data + r * scores.row + begin;
          softmax_row(weights, columns, {base.base[row], base.inverse[row], base.delta + row, 1});
          if (p.dropout.used())
            drop_row(p.dropout, head, block.first + row, first_key + begin, columns, weights, base.keep);
          base.delta[row] += weighted_sum(weights, gradient.data + r * gradient.row + begin, columns);
        }
      }
    }
    finish_statistics(p, block, base, true);
  }

  void zero_pairs(uint32_t* pairs, int64_t pair, int64_t first, int64_t last) const {
    __builtin_memset(pairs + pair * words + kWideSlack + first, 0, (size_t)(last - first) * 4);
  }
  // A pair of rows, in each form that a tile has: zero in the columns [first, last).
  void zero_row_pair(const AmxBackwardWorkspace& w, int64_t pair, int64_t first, int64_t last) const {
    zero_pairs(w.weights, pair, first, last);
    zero_pairs(w.gradient, pair, first, last);
    for (const SkewedRows& of : w.by_row)
      for (int64_t row = 2 * pair; of.rows && row < 2 * pair + 2; ++row) of.zero_row(row, first, last);
  }
  void clear_pair(const AmxBackwardWorkspace& w, int64_t pair) const {
    zero_row_pair(w, pair, -kWideSlack, p.block_keys + kWideSlack);
    for (const SkewedRows& of : w.by_row)
      if (of.pairs) of.zero_pair(pair, -kWideSlack, p.block_keys + kWideSlack);
  }

  // A group's weights after dropout and gradients of its scores, in place; of these also what concerns rel_bias and the
  // tables' edges.
  void group_gradients(const AmxHead& operands, const Block& block, const Tile& tile, const Group& group,
                       const AmxSums& sums, const AmxBackwardWorkspace& w) const {
    const Result scores = scores_of(w), gradient = gradient_of(w);
    const Range& columns = group.columns;
    const Range keys = {tile.first_key + columns.first, tile.first_key + columns.last};
    const Skew skew = lay_over(operands.head.rel_k, block, tile, group);  // as rel_v's
    for (int r = 0; r < group.rows; ++r) {
      const int64_t row = group.row + r;
      float *of_weights = scores.data + r * scores.row, *of_scores = gradient.data + r * gradient.row;
      weights_and_gradients_row(p, operands.head, block, row, keys, w.forward.base, of_weights + columns.first,
                                of_scores + columns.first);
      const Range within = skew.within(r, columns), left = {columns.first, within.first},
                  right = {within.last, columns.last};
      auto add_beyond = [&](const float* of_row, const Edges& sum) {
        sum.left[row] += sum_row(of_row + left.first, left.last - left.first);
        sum.right[row] += sum_row(of_row + right.first, right.last - right.first);
      };
      if (p.position) add_beyond(of_scores, w.beyond);
      if (p.call.grad_rel_v.data) add_beyond(of_weights, w.weights_beyond);
      if (takes_by_key()) {  // its table is reversed
        add_scaled(w.beyond_by_key.right + left.first, of_scores + left.first, 1.0f, left.last - left.first);
        add_scaled(w.beyond_by_key.left + right.first, of_scores + right.first, 1.0f, right.last - right.first);
      }
      if (sums.bias && !within.empty())
        add_scaled(sums.bias + within.first - skew.shift - r, of_scores + within.first, 1.0f,
                   within.last - within.first);
    }
  }

  // Both in bfloat16, as pairs of rows and as rows.
  void write_pairs(const Group& group, const AmxBackwardWorkspace& w) const {
    const Result scores = scores_of(w), gradient = gradient_of(w);
    const int64_t begin = group.columns.first, end = group.columns.last, last_row = round_up(group.rows, 2);
    for (int r = group.rows; r < round_up(group.rows, kTileRows); ++r) {
      fill(scores.data + r * scores.row + begin, 0.0f, end - begin);
      fill(gradient.data + r * gradient.row + begin, 0.0f, end - begin);
    }
    for (int64_t r = 0; r < last_row; r += 2) {
      const int64_t pair = (group.row + r) / 2;
      write_pair(w, pair, group.columns, scores.from(r), gradient.from(r));
      zero_row_pair(w, pair, -kWideSlack, begin);
      zero_row_pair(w, pair, end, p.block_keys + kWideSlack);
      for (const SkewedRows& of : w.by_row)
        if (of.pairs) of.skew_pair(pair, group.columns);
    }
    for (int64_t r = last_row; r < kGroupRows; r += 2) clear_pair(w, (group.row + r) / 2);
  }

  void write_pair(const AmxBackwardWorkspace& w, int64_t pair, const Range& columns, const Result& scores,
                  const Result& gradient) const {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    // Two rows as pairs (null: as rows only) and as rows (or not); returns both.
    auto write = [&](Vec low, Vec high, uint32_t* pairs, const SkewedRows& rows, int64_t column) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      if (pairs) _mm512_storeu_si512(pairs + column, _mm512_permutexvar_epi16(interleave, both));
      if (rows.rows) {
        _mm256_storeu_si256((__m256i*)(rows.row(2 * pair) + column), _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i*)(rows.row(2 * pair + 1) + column), _mm512_extracti64x4_epi64(both, 1));
      }
      return both;
    };
    uint32_t *weights = w.weights + pair * words + kWideSlack, *of_scores = w.gradient + pair * words + kWideSlack;
    for (int64_t column = columns.first; column < columns.last; column += kWidth) {
      write(load(scores.data + column), load(scores.data + scores.row + column), weights, w.by_row[kWeights], column);
      const Vec low = load(gradient.data + column), high = load(gradient.data + gradient.row + column);
      const __m512i both = write(low, high, of_scores, w.by_row[0], column);
      if (w.by_row[1].rows)
        write(low - widen(_mm512_castsi512_si256(both)), high - widen(_mm512_extracti64x4_epi64(both, 1)), nullptr,
              w.by_row[1], column);
    }
  }

  // A group's gradients of scores by key. Its rows are zero up to a whole tile.
  void write_by_key(const Group& group, const AmxBackwardWorkspace& w) const {
    const Result gradient = gradient_of(w);
    float turned[kPanel * kTileRows];
    for (int64_t column = group.columns.first; column < group.columns.last; column += kPanel)
      for (int64_t r = 0; r < group.rows; r += kTileRows) {
        transpose(gradient.data + r * gradient.row + column, gradient.row, turned, kTileRows);
        for (int64_t key = 0; key < kPanel; ++key) {
          const Vec whole = load(turned + key * kTileRows);
          Half *high = w.by_key[0].row(column + key) + group.row + r,
               *rest = w.by_key[1].row(column + key) + group.row + r;
          store_half(high, whole);
          store_half(rest, whole - widen(_mm256_loadu_si256((const __m256i*)high)));
        }
      }
  }

  // gradient^T (size, keys) += rows^T x pairs, over these rows.
  void add_over_rows(const Tile& tile, const Range& of, const Half* rows_t, int64_t size, const uint32_t* pairs,
                     float* gradient) const {
    const int64_t first = (tile.keys.first - tile.first_key) / kPanel,
                  last = panels_of(tile.keys.last - tile.first_key), steps = (of.last - of.first) / kTileDepth;
    const HalfRight right = {(const Half*)(pairs + of.first / 2 * words + kWideSlack + first * kPanel), 2 * kPanel,
                             2 * words, 2 * kTileRows * words};
    for (int64_t d = 0; d < size; d += kGroupRows)
      amx_multiply<true>((int)least(kGroupRows, size - d), last - first, {rows_t + d * rows + of.first, rows}, right,
                         steps, {gradient + d * key_columns + tile.first_key + first * kPanel, key_columns});
  }

  // A group's share in the gradients of its queries.
  void query_gradient(const AmxHead& operands, const Block& block, const Tile& tile, const Group& group,
                      const AmxBackwardWorkspace& w, const Gradients& out) const {
    const int64_t panels = p.padded_size / kPanel, place = group.row * p.padded_size;
    auto of_group = [&](int part, int64_t column) {
      return HalfLeft{w.by_row[part].row(group.row) + column, w.by_row[part].stride};
    };
    const int64_t first = group.columns.first, steps = (group.columns.last - first + kTileDepth - 1) / kTileDepth;
    for (int part = 0; part < (out.pos_bias_u ? 2 : 1); ++part)  // that gradient is a sum over all of them
      amx_multiply<true>(group.rows, panels, of_group(part, first),
                         operands.keys.key_pairs.from(tile.first_key + first), steps,
                         {out.content + place, p.padded_size});
    for (int part = 0; p.call.rel_k.data && part < 2; ++part)
      relative_values_amx(lay_over(operands.head.rel_k, block, tile, group), group.seen, of_group(part, 0),
                          operands.pairs[kRelK], {out.position + place, p.padded_size});
  }

  // A tile's keys (size, keys), from their pairs, in which what is not finite is zero.
  void transpose_keys(const AmxHead& operands, const Tile& tile, const TableProduct& of, Half* keys_t) const {
    for (int64_t d = 0; d < of.size; d += kPanel)
      for (int64_t key = of.rows.first; key < of.rows.last; key += kTileDepth) {
        const HalfRight pairs = operands.keys.key_pairs.from(tile.first_key + key);
        transpose((const float*)(pairs.data + d / kPanel * pairs.panel), kPanel, (float*)(keys_t + d * of.stride + key),
                  of.stride / 2);
      }
  }

  // rel_q's share in the gradients of a tile's keys, and its own. `by_key`: some keys are not beyond its edges.
  void key_gradients(const AmxHead& operands, const Block& block, const Tile& tile, bool by_key, const AmxUnit& unit,
                     const AmxTableSum& sum, const AmxBackwardWorkspace& w) const {
    const Range queries = {0, block.rows}, keys = {0, tile.keys.last - tile.first_key};
    auto keys_from = [&](int64_t first) {
      return lay_over(operands.head.rel_q, least(kGroupRows, keys.last - first), tile.first_key + first,
                      block.position);
    };
    const Result own = {unit.key_rows_gradient, p.padded_size};
    for (int64_t key = 0; by_key && own.data && key < keys.last; key += kGroupRows)
      for (const SkewedRows& of : w.by_key)
        relative_values_amx(keys_from(key), queries, {of.row(key), of.stride}, operands.pairs[kRelQ],
                            own.from(tile.first_key + key));
    if (by_key && sum.total) {
      const TableProduct product = {w.keys_t, round_up(p.block_keys, kGroupRows),   p.padded_size, w.by_key,
                                    2,        {0, round_up(keys.last, kGroupRows)}, queries};
      transpose_keys(operands, tile, product, w.keys_t);
      for (const SkewedRows& of : w.by_key)
        for (int64_t pair = 0; pair < product.rows.last / 2; ++pair) of.skew_pair(pair, {0, rows});
      table_gradient_amx(keys_from(0), product, {sum.total, table_columns});
    }
    const int64_t first = tile.keys.first - tile.first_key;
    add_edges_amx(p.source(kRelQ, operands.head.head),
                  {{w.forward.key_rows, p.deep_size},
                   keys.last - first,
                   w.beyond_by_key.from(first),
                   own.data ? own.from(tile.keys.first) : own},
                  sum.edges, w.forward.base.scratch);
  }

  // Everything that the block's rows and the keys in `keys` contribute. The block has been prepared.
  void backward_keys(const AmxHead& operands, const Block& whole, Range keys, const AmxUnit& unit, const AmxSums& sums,
                     const Gradients& out, AmxBackwardWorkspace& w) const {
    const Call& call = p.call;
    const Head& head = operands.head;
    Block block = whole;
    block.keys = {most(keys.first, whole.keys.first), least(keys.last, whole.keys.last)};
    clear_edges(w.beyond, block.rows);
    clear_edges(w.weights_beyond, block.rows);
    Tile tile;
    TileRegisters registers;
    for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last;
         first_key += p.block_keys) {
      cut_tile(p, head, block, first_key, kGroupRows, tile);
      if (tile.count == 0 || tile_hidden(p, head, block, tile.keys)) continue;
      const Range of = {tile.groups[0].row, tile.groups[tile.count - 1].row + kGroupRows},  // rows of the block
          columns = {tile.keys.first - first_key, tile.keys.last - first_key};
      const bool by_key =
          takes_by_key() &&
          !lay_over(head.rel_q, columns.last, first_key, block.position).touched({0, block.rows}).empty();
      if (call.rel_q.data) key_scores_amx(p, operands, block, tile, w.forward);
      clear_by_key(columns.last, by_key, w);
      int64_t next = of.first;
      for (int g = 0; g < tile.count; ++g) {
        const Group& group = tile.groups[g];
        for (; next < group.row; next += 2) clear_pair(w, next / 2);  // groups between that see nothing
        next = group.row + kGroupRows;
        group_scores(operands, block, tile, group, w);
        group_gradients(operands, block, tile, group, sums, w);
        write_pairs(group, w);
        if (by_key) write_by_key(group, w);
        if (out.content) query_gradient(operands, block, tile, group, w, out);
      }
      if (out.value.data) add_over_rows(tile, of, w.upstream_t, p.padded_value_size, w.weights, unit.value_gradient);
      if (out.key.data) add_over_rows(tile, of, w.content_t, p.padded_size, w.gradient, unit.key_gradient);
      const Skew skew = lay_over(head.rel_k, block.rows, block.position, first_key);  // as rel_v's
      if (sums.tables[kRelK].total)
        table_gradient_amx(skew, {w.position_t, rows, p.padded_size, w.by_row, 2, of, columns},
                           {sums.tables[kRelK].total, table_columns});
      if (sums.tables[kRelV].total)
        table_gradient_amx(skew, {w.upstream_t, rows, p.padded_value_size, w.by_row + kWeights, 1, of, columns},
                           {sums.tables[kRelV].total, table_columns});
      if (takes_by_key()) key_gradients(operands, block, tile, by_key, unit, sums.tables[kRelQ], w);
    }
    add_row_edges(operands, block, sums, out, w);
  }

  // A tile's gradients by key start from zero: groups leave out what they do not see.
  void clear_by_key(int64_t keys, bool by_key, const AmxBackwardWorkspace& w) const {
    clear_edges(w.beyond_by_key, p.block_keys);
    for (const SkewedRows& of : w.by_key)
      if (by_key) zero_halves(of.rows, round_up(keys, kGroupRows) * of.stride);
  }

  // What lies beyond the edges of the tables that queries meet.
  void add_row_edges(const AmxHead& operands, const Block& block, const AmxSums& sums, const Gradients& out,
                     const AmxBackwardWorkspace& w) const {
    const int64_t head = operands.head.head;
    for (int64_t row = 0; sums.bias && row < block.rows; ++row) {
      sums.bias[0] += w.beyond.left[row];
      sums.bias[p.call.rows - 1] += w.beyond.right[row];
    }
    if (p.call.rel_k.data)
      add_edges_amx(p.source(kRelK, head),
                    {{w.forward.position, p.deep_size},
                     block.rows,
                     w.beyond,
                     {out.content ? out.position : nullptr, p.padded_size}},
                    sums.tables[kRelK].edges, w.forward.base.scratch);
    if (p.call.grad_rel_v.data)
      add_edges_amx(p.source(kRelV, head),
                    {{w.upstream, p.deep_value_size}, block.rows, w.weights_beyond, {nullptr, 0}},
                    sums.tables[kRelV].edges, w.forward.base.scratch);
  }
};

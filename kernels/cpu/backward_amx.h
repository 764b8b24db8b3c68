// The backward pass in bfloat16 on AMX. B of a product over queries is a pair of rows interleaved, which the pass over
// the scores writes; so gradients of keys, values and tables are summed transposed, (size, rows), and no tile is ever
// transposed:
//
//   dV^T (Dv, keys)  += upstream^T x weights          dK^T (D, keys) += content^T x dS
//   dE^T (D, rows)   += position^T x dS, in which row 2t + 1 is taken one column further right, and pair t two columns
//                       further: unskewed
//   dQ   (rows, D)   += dS x keys
//   dQ'  (rows, D)   += dS, each row read one element further right, x table

// One key head's keys and values, and the sums of their gradients.
struct AmxUnit {
  AmxKeys keys;
  float *key_gradient, *value_gradient;  // (size, keys), transposed
  QuerySums query;                       // of one query head, only for teams
};

// Sums of one member for one head: rel_k's gradient transposed, what lies beyond its edges, rel_bias's.
struct AmxSums {
  float* table;
  Edges edges;  // (D,) each
  float* bias;
};

struct AmxBackwardWorkspace {
  AmxWorkspace forward;
  Half *upstream, *content_t, *position_t, *upstream_t;
  uint32_t *weights, *gradient;  // pairs of rows: a word holds (row 2t, row 2t + 1)
  // Gradients of scores as the sum of two bfloat16 numbers, for the products with tables: sums of many that nearly
  // cancel.
  uint32_t* skewed[2];  // pairs of rows, the second taken one column further right
  Half* gradient_rows[2];
  float* weights_gradient;  // of a group
  Edges beyond;             // of each row: the sum of its gradients of scores beyond the table's edges
};

struct AmxBackward {
  const AmxProblem& p;
  int64_t rows;                        // of a block, rounded up to whole groups
  int64_t words, halves;               // strides of rows of pairs and of gradient_rows
  int64_t key_columns, table_columns;  // strides of transposed sums

  explicit AmxBackward(const AmxProblem& problem) : p(problem) {
    rows = round_up(p.block_rows, kGroupRows);
    words = p.block_keys + 2 * kWideSlack;
    halves = p.block_keys + 2 * kWideSlack;
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
    const bool table = p.call.rel_k.data != nullptr;
    for (int part = 0; part < 2; ++part) {
      w.skewed[part] = table ? (uint32_t*)carver.floats((rows / 2 + kTileRows) * words) : nullptr;
      w.gradient_rows[part] =
          part == 0 || table || p.call.grad_pos_bias_u.data ? carver.halves((rows + kGroupRows) * halves) : nullptr;
    }
    w.weights_gradient = carver.floats(kGroupRows * p.leading + 2 * kGroupRows);
    w.beyond = {carver.floats(rows), carver.floats(rows)};
    Workspace& base = w.forward.base;
    base.base = carver.floats(rows);
    base.inverse = carver.floats(rows);
    base.delta = carver.floats(rows);
    base.apart = carver.floats(rows);
    base.content_gradient = carver.floats(rows * p.padded_size);
    base.position_gradient = p.position_apart() ? carver.floats(rows * p.padded_size) : base.content_gradient;
    return carver.used;
  }

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
    transpose_rows(w.upstream, block.rows, p.deep_value_size, w.upstream_t);
    transpose_rows(w.forward.content, block.rows, p.deep_size, w.content_t);
    if (w.position_t != w.content_t) transpose_rows(w.forward.position, block.rows, p.deep_size, w.position_t);
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
    group_products(p, operands, block, tile, group, w.forward, scores);
    amx_multiply<false>(group.rows, (columns.last - columns.first) / kPanel, {w.upstream + group.row * size, size},
                        {operands.keys.value_panels + (tile.first_key + columns.first) * size, kPanel * size},
                        size / kTileDepth, {gradient.data + columns.first, gradient.row});
    const float unit = (float)(p.absolute_scale() * kLog2E);
    const Skew skew = lay_over(head.rel_k, block, tile, group);
    for (int r = 0; r < group.rows; ++r) {
      float* of_row = scores.data + r * scores.row;
      scale_row(of_row + columns.first, unit, columns.last - columns.first);
      if (operands.bias) add_bias(skew, r, columns, operands.bias, of_row);
      hide(p, head, block, tile, group.row + r, columns, w.forward.base, of_row);
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
    for (int64_t first_key = block.keys.first / kTileDepth * kTileDepth; first_key < block.keys.last;
         first_key += p.block_keys) {
      cut_tile(p, head, block, first_key, kGroupRows, tile);
      if (tile_hidden(p, head, block, tile.keys)) continue;
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
  // A pair of rows, in each form that a tile's gradients have: zero in the columns [first, last).
  void zero_row_pair(const AmxBackwardWorkspace& w, int64_t pair, int64_t first, int64_t last) const {
    zero_pairs(w.weights, pair, first, last);
    zero_pairs(w.gradient, pair, first, last);
    for (Half* of_rows : w.gradient_rows)
      for (int64_t row = 2 * pair; of_rows && row < 2 * pair + 2; ++row)
        zero_halves(of_rows + row * halves + kWideSlack + first, last - first);
  }
  void clear_pair(const AmxBackwardWorkspace& w, int64_t pair) const {
    zero_row_pair(w, pair, -kWideSlack, p.block_keys + kWideSlack);
    for (uint32_t* skewed : w.skewed)
      if (skewed) zero_pairs(skewed, pair, -kWideSlack, p.block_keys + kWideSlack);
  }

  // A group's weights after dropout and gradients of its scores, in place; of these also what concerns rel_bias and the
  // table's edges.
  void group_gradients(const AmxHead& operands, const Block& block, const Tile& tile, const Group& group,
                       float* bias_sum, const AmxBackwardWorkspace& w) const {
    const Result scores = scores_of(w), gradient = gradient_of(w);
    const Range& columns = group.columns;
    const Range keys = {tile.first_key + columns.first, tile.first_key + columns.last};
    const Skew skew = lay_over(operands.head.rel_k, block, tile, group);
    for (int r = 0; r < group.rows; ++r) {
      const int64_t row = group.row + r;
      float* of_scores = gradient.data + r * gradient.row;
      weights_and_gradients_row(p, operands.head, block, row, keys, w.forward.base,
                                scores.data + r * scores.row + columns.first, of_scores + columns.first);
      if (!p.position) continue;
      const Range within = skew.within(r, columns);
      w.beyond.left[row] += sum_row(of_scores + columns.first, within.first - columns.first);
      w.beyond.right[row] += sum_row(of_scores + within.last, columns.last - within.last);
      if (bias_sum && !within.empty())
        add_scaled(bias_sum + within.first - skew.shift - r, of_scores + within.first, 1.0f,
                   within.last - within.first);
    }
  }

  // Both in bfloat16, as pairs of rows and as rows.
  void write_pairs(const Group& group, const AmxBackwardWorkspace& w) const {
    const Result scores = scores_of(w), gradient = gradient_of(w);
    const int64_t begin = group.columns.first, end = group.columns.last, last_row = round_up(group.rows, 2);
    for (int r = group.rows; r < last_row; ++r) {
      fill(scores.data + r * scores.row + begin, 0.0f, end - begin);
      fill(gradient.data + r * gradient.row + begin, 0.0f, end - begin);
    }
    for (int64_t r = 0; r < last_row; r += 2) {
      const int64_t pair = (group.row + r) / 2;
      write_pair(w, pair, group.columns, scores.from(r), gradient.from(r));
      zero_row_pair(w, pair, -kWideSlack, begin);
      zero_row_pair(w, pair, end, p.block_keys + kWideSlack);
      for (int part = 0; w.skewed[0] && part < 2; ++part) write_skewed_pair(w, part, pair, group.columns);
    }
    for (int64_t r = last_row; r < kGroupRows; r += 2) clear_pair(w, (group.row + r) / 2);
  }

  void write_pair(const AmxBackwardWorkspace& w, int64_t pair, const Range& columns, const Result& scores,
                  const Result& gradient) const {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const float *low = scores.data, *high = low + scores.row, *low_gradient = gradient.data,
                *high_gradient = low_gradient + gradient.row;
    uint32_t *weights = w.weights + pair * words + kWideSlack, *of_scores = w.gradient + pair * words + kWideSlack;
    Half *low_row = w.gradient_rows[0] + 2 * pair * halves + kWideSlack, *high_row = low_row + halves;
    Half* rest = w.gradient_rows[1] ? w.gradient_rows[1] + 2 * pair * halves + kWideSlack : nullptr;
    for (int64_t column = columns.first; column < columns.last; column += kWidth) {
      const __m512i of_weights = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(high + column), (__m512)load(low + column));
      _mm512_storeu_si512(weights + column, _mm512_permutexvar_epi16(interleave, of_weights));
      const __m512i both =
          (__m512i)_mm512_cvtne2ps_pbh((__m512)load(high_gradient + column), (__m512)load(low_gradient + column));
      _mm512_storeu_si512(of_scores + column, _mm512_permutexvar_epi16(interleave, both));
      _mm256_storeu_si256((__m256i*)(low_row + column), _mm512_castsi512_si256(both));
      _mm256_storeu_si256((__m256i*)(high_row + column), _mm512_extracti64x4_epi64(both, 1));
      if (rest) {
        store_half(rest + column, load(low_gradient + column) - widen(_mm512_castsi512_si256(both)));
        store_half(rest + halves + column, load(high_gradient + column) - widen(_mm512_extracti64x4_epi64(both, 1)));
      }
    }
  }

  // From the rows that write_pair has written, and the zeros beside them.
  void write_skewed_pair(const AmxBackwardWorkspace& w, int part, int64_t pair, const Range& columns) const {
    const Half *first_row = w.gradient_rows[part] + 2 * pair * halves + kWideSlack, *second_row = first_row + halves;
    uint32_t* skewed = w.skewed[part] + pair * words + kWideSlack;
    // The second row's first column stands one column before the first row's.
    const int64_t begin = columns.first - kPanel;
    for (int64_t column = begin; column < columns.last; column += kPanel) {
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first_row + column)));
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second_row + column + 1)));
      _mm512_storeu_si512(skewed + column, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
    zero_pairs(w.skewed[part], pair, -kWideSlack, begin);
    zero_pairs(w.skewed[part], pair, columns.last, p.block_keys + kWideSlack);
  }

  // A tile's rows [rows.first, rows.last), in whole groups, of a block's transposed ones: A of the products for
  // transposed sums.
  HalfLeft of_block(const Half* transposed, int64_t column, int64_t row) const {
    return {transposed + column * rows + row, rows};
  }

  // gradient^T (size, keys) += rows^T x pairs, over these rows.
  void add_over_rows(const Tile& tile, const Range& of, const Half* rows_t, int64_t size, const uint32_t* pairs,
                     float* gradient) const {
    const int64_t first = (tile.keys.first - tile.first_key) / kPanel,
                  last = panels_of(tile.keys.last - tile.first_key), steps = (of.last - of.first) / kTileDepth;
    const HalfRight right = {(const Half*)(pairs + of.first / 2 * words + kWideSlack + first * kPanel), 2 * kPanel,
                             2 * words, 2 * kTileRows * words};
    for (int64_t d = 0; d < size; d += kGroupRows)
      amx_multiply<true>((int)least(kGroupRows, size - d), last - first, of_block(rows_t, d, of.first), right, steps,
                         {gradient + d * key_columns + tile.first_key + first * kPanel, key_columns});
  }

  // The same over distances, in the skewed pairs: rel_k's gradient^T (size, table rows).
  void table_gradient(const Tile& tile, const Block& block, const Head& head, const Range& of, AmxBackwardWorkspace& w,
                      float* gradient) const {
    const int64_t shift = lay_over(head.rel_k, block.rows, block.position, tile.first_key).shift;
    const int64_t first_column = tile.keys.first - tile.first_key, last_column = tile.keys.last - tile.first_key;
    const int64_t lowest = most<int64_t>(first_column - shift - (of.last - 1), 0),
                  highest = least(last_column - 1 - shift - of.first, head.rel_k.rows - 1);
    if (lowest > highest) return;
    for (int64_t r = lowest / kPanel * kPanel; r <= highest; r += 2 * kPanel) {
      // Groups of rows with some column in these two panels.
      int64_t begin = of.first, end = of.last;
      while (begin < end && r + 2 * kPanel - 1 + shift + begin + kGroupRows - 1 < first_column) begin += kGroupRows;
      while (begin < end && r + shift + end - kGroupRows >= last_column) end -= kGroupRows;
      if (begin == end) continue;
      const int64_t panels = least<int64_t>(2, panels_of(highest + 1 - r));
      for (const uint32_t* part : w.skewed) {
        const HalfRight right = {(const Half*)(part + begin / 2 * words + kWideSlack + r + shift + begin), 2 * kPanel,
                                 2 * (words + 2), 2 * kTileRows * (words + 2)};
        for (int64_t d = 0; d < p.deep_size; d += kGroupRows)
          amx_multiply<true>((int)least(kGroupRows, p.deep_size - d), panels, of_block(w.position_t, d, begin), right,
                             (end - begin) / kTileDepth, {gradient + d * table_columns + r, table_columns});
      }
    }
  }

  // A group's share in the gradients of its queries.
  void query_gradient(const AmxHead& operands, const Block& block, const Tile& tile, const Group& group,
                      const AmxBackwardWorkspace& w, const Gradients& out) const {
    const int64_t panels = p.padded_size / kPanel, place = group.row * p.padded_size;
    auto of_group = [&](int part, int64_t column) {
      return w.gradient_rows[part] + group.row * halves + kWideSlack + column;
    };
    const int64_t first = group.columns.first, steps = (group.columns.last - first + kTileDepth - 1) / kTileDepth;
    for (int part = 0; part < (out.pos_bias_u ? 2 : 1); ++part)  // that gradient is a sum over all of them
      amx_multiply<true>(group.rows, panels, {of_group(part, first), halves},
                         operands.keys.key_pairs.from(tile.first_key + first), steps,
                         {out.content + place, p.padded_size});
    if (!p.call.rel_k.data) return;
    const Skew skew = lay_over(operands.head.rel_k, block, tile, group);
    const Range touched = skew.touched(group.seen);
    const int64_t lowest = touched.first / 2 * 2;  // whole pairs
    for (int part = 0; part < 2 && lowest < touched.last; ++part)
      amx_multiply<true>(group.rows, panels, {of_group(part, lowest + skew.shift), halves + 1},
                         operands.table_pairs.from(lowest), (touched.last - 1 - lowest) / kTileDepth + 1,
                         {out.position + place, p.padded_size});
  }

  // Everything that the block's rows and the keys in `keys` contribute. The block has been prepared.
  void backward_keys(const AmxHead& operands, const Block& whole, Range keys, const AmxUnit& unit, const AmxSums& sums,
                     const Gradients& out, AmxBackwardWorkspace& w) const {
    const Head& head = operands.head;
    Block block = whole;
    block.keys = {most(keys.first, whole.keys.first), least(keys.last, whole.keys.last)};
    fill(w.beyond.left, 0.0f, block.rows);
    fill(w.beyond.right, 0.0f, block.rows);
    Tile tile;
    TileRegisters registers;
    for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last;
         first_key += p.block_keys) {
      cut_tile(p, head, block, first_key, kGroupRows, tile);
      if (tile.count == 0 || tile_hidden(p, head, block, tile.keys)) continue;
      const Range of = {tile.groups[0].row, tile.groups[tile.count - 1].row + kGroupRows};  // rows of the block
      int64_t next = of.first;
      for (int g = 0; g < tile.count; ++g) {
        const Group& group = tile.groups[g];
        for (; next < group.row; next += 2) clear_pair(w, next / 2);  // groups between that see nothing
        next = group.row + kGroupRows;
        group_scores(operands, block, tile, group, w);
        group_gradients(operands, block, tile, group, sums.bias, w);
        write_pairs(group, w);
        if (out.content) query_gradient(operands, block, tile, group, w, out);
      }
      if (out.value.data) add_over_rows(tile, of, w.upstream_t, p.padded_value_size, w.weights, unit.value_gradient);
      if (out.key.data) add_over_rows(tile, of, w.content_t, p.padded_size, w.gradient, unit.key_gradient);
      if (sums.table) table_gradient(tile, block, head, of, w, sums.table);
    }
    if (p.position) add_edges(operands, block, sums, out, w);
  }

  // What lies beyond the table's edges, from the rows' sums there.
  void add_edges(const AmxHead& operands, const Block& block, const AmxSums& sums, const Gradients& out,
                 AmxBackwardWorkspace& w) const {
    const Matrix table = matrix(p.call.rel_k, 0, operands.head.head);
    for (int side = 0; side < 2; ++side) {
      const bool right = side == 1;
      const float* total = right ? w.beyond.right : w.beyond.left;
      const int64_t table_row = right ? p.call.rows - 1 : 0;
      float *gradient = right ? sums.edges.right : sums.edges.left, *edge = w.forward.base.scratch;
      if (table.data) read_row(table, table_row, p.size, edge);
      for (int64_t row = 0; row < block.rows; ++row) {
        if (total[row] == 0.0f) continue;
        if (sums.bias) sums.bias[table_row] += total[row];
        if (!table.data) continue;
        const Half* position = w.forward.position + row * p.deep_size;
        for (int64_t column = 0; gradient && column < p.size; ++column)
          gradient[column] += total[row] * from_bfloat16(position[column]);
        if (out.content) add_scaled(out.position + row * p.padded_size, edge, total[row], p.size);
      }
    }
  }
};

// The backward pass in bfloat16 on AMX. B of a product over queries is a pair of rows interleaved, which the pass over the scores writes;
// so gradients of keys, values and tables are summed transposed, (size, rows), and no tile is ever transposed:
//
//   dV^T (Dv, keys)  += upstream^T x weights          dK^T (D, keys) += content^T x dS
//   dE^T (D, rows)   += position^T x dS, in which row 2t + 1 is taken one column further right, and pair t two columns further: unskewed
//   dQ   (rows, D)   += dS x keys                     dQ' (rows, D)  += dS, each row read one element further right, x table

constexpr int64_t kWideSlack = 64;  // elements, zero, on both sides of what is read skewed in steps of 32

// The forms of one head's keys and values, and the sums of their gradients.
struct AmxUnit {
  Half *key_panels, *key_pairs, *value_panels;
  float *key_gradient, *value_gradient;  // (size, keys), transposed
};

// Sums of one member for one head: rel_k's gradient transposed, what lies beyond its edges, rel_bias's.
struct AmxSums {
  float *table, *left_edge, *right_edge, *bias;
};

struct AmxBackwardWorkspace {
  AmxWorkspace forward;
  Half *upstream, *content_t, *position_t, *upstream_t;
  uint32_t *weights, *gradient;  // pairs of rows: a word holds (row 2t, row 2t + 1)
  // Gradients of scores as the sum of two bfloat16 numbers, for the products with tables: sums of many that nearly cancel.
  uint32_t* skewed[2];  // pairs of rows, the second taken one column further right
  Half* gradient_rows[2];
  float *weights_gradient, *row_left, *row_right;  // of a group; a row's sums beyond the edges
};

struct AmxBackward {
  const Problem& p;
  AmxSizes sizes;
  int64_t upstream_size;               // of values, rounded up to whole instructions
  int64_t rows;                        // of a block, rounded up to whole groups
  int64_t words, halves;               // strides of rows of pairs and of gradient_rows
  int64_t key_columns, table_columns;  // strides of transposed sums
  Half *tables, *table_pairs;          // of all heads that differ
  float* biases;
  bool per_head, bias_per_head;
  int64_t table_halves, table_pair_rows, pair_halves;

  AmxBackward(const Problem& problem) : p(problem), sizes(problem) {
    upstream_size = round_up(p.value_size, kTileDepth);
    rows = round_up(p.block_rows, kGroupRows);
    words = p.block_keys + 2 * kWideSlack;
    halves = p.block_keys + 2 * kWideSlack;
    key_columns = panels_of(p.call.keys) * kPanel;
    table_columns = panels_of(p.call.rows) * kPanel;
    per_head = p.call.rel_k.data && p.call.rel_k.stride[1] != 0;
    bias_per_head = p.call.rel_bias.data && p.call.rel_bias.stride[1] != 0;
    table_halves = table_columns * sizes.size;
    table_pair_rows = round_up(p.call.rows, kTileDepth) + kTileDepth;  // products begin at any row
    pair_halves = table_pair_rows * p.padded_size;
    tables = table_pairs = nullptr;
    biases = nullptr;
  }

  int64_t carve(char* memory, AmxBackwardWorkspace& w) const {
    w = {};
    const int64_t first = carve_amx(p, sizes, false, memory, w.forward);
    Carver carver = {memory, first};
    auto half = [&](int64_t count) { return (Half*)carver.floats((count + 1) / 2); };
    w.upstream = half(rows * upstream_size);
    w.content_t = half(sizes.size * rows);
    w.position_t = p.call.pos_bias_u.data || p.call.pos_bias_v.data ? half(sizes.size * rows) : w.content_t;
    w.upstream_t = half(upstream_size * rows);
    w.weights = (uint32_t*)carver.floats(rows / 2 * words);
    w.gradient = (uint32_t*)carver.floats(rows / 2 * words);
    const bool table = p.call.rel_k.data != nullptr;
    for (int part = 0; part < 2; ++part) {
      w.skewed[part] = table ? (uint32_t*)carver.floats((rows / 2 + kTileRows) * words) : nullptr;
      w.gradient_rows[part] = part == 0 || table || p.call.grad_pos_bias_u.data ? half((rows + kGroupRows) * halves) : nullptr;
    }
    w.weights_gradient = carver.floats(kGroupRows * p.leading + 2 * kGroupRows);
    w.row_left = carver.floats(rows);
    w.row_right = carver.floats(rows);
    Workspace& base = w.forward.base;
    base.base = carver.floats(rows);
    base.inverse = carver.floats(rows);
    base.delta = carver.floats(rows);
    base.content_gradient = carver.floats(rows * p.padded_size);
    base.position_gradient = p.position_apart() ? carver.floats(rows * p.padded_size) : base.content_gradient;
    return carver.used;
  }

  // (count, padded) rows of bfloat16 to (padded, rows of a block), zero beyond count.
  void transpose_rows(const Half* from, int64_t count, int64_t padded, Half* to) const {
    for (int64_t column = 0; column < padded; ++column)
      for (int64_t row = 0; row < rows; ++row) to[column * rows + row] = row < count ? from[row * padded + column] : 0;
  }

  Block prepare(const AmxHead& operands, AmxBackwardWorkspace& w, int64_t index) const {
    const Block block = prepare_block_amx(p, sizes, operands, w.forward, index);
    if (block.keys.empty()) return block;
    const Head& head = operands.head;
    const Matrix grad = matrix(p.call.grad_output, head.batch, head.head);
    for (int64_t row = 0; row < block.rows; ++row)
      read_halves(grad, block.first + row, p.value_size, upstream_size, w.upstream + row * upstream_size, w.forward.row_scratch);
    __builtin_memset(w.upstream + block.rows * upstream_size, 0, (size_t)((rows - block.rows) * upstream_size) * 2);
    transpose_rows(w.upstream, block.rows, upstream_size, w.upstream_t);
    transpose_rows(w.forward.content, block.rows, sizes.size, w.content_t);
    if (w.position_t != w.content_t) transpose_rows(w.forward.position, block.rows, sizes.size, w.position_t);
    statistics(operands, block, w);
    if (p.call.grad_lse.data) subtract_lse_gradient(p, head, block, w.forward.base);
    return block;
  }

  // Scores of a group's columns in units of ln 2, -inf where hidden, and gradients of its weights before dropout.
  void group(const AmxHead& operands, const Block& block, const Tile& tile, const Group& group, AmxBackwardWorkspace& w,
             const Result& scores, const Result& gradient) const {
    const Head& head = operands.head;
    const int64_t begin = group.columns.first, end = group.columns.last;
    group_products(p, sizes, operands, block, group, tile.first_key, w.forward, scores);
    amx_multiply<false>(group.rows, (end - begin) / kPanel, {w.upstream + group.row * upstream_size, upstream_size},
                        {operands.value_panels + (tile.first_key + begin) * upstream_size, kPanel * upstream_size},
                        upstream_size / kTileDepth, {gradient.data + begin, gradient.row});
    const float unit = (float)(p.absolute_scale() * kLog2E);
    for (int r = 0; r < group.rows; ++r) {
      float* of_row = scores.data + r * scores.row;
      scale_row(of_row + begin, unit, end - begin);
      if (operands.bias) add_bias(head.rel_k, operands.bias, block.position + group.row + r, tile.first_key, begin, end, of_row);
      hide(p, head, block.first + group.row + r, tile, group.row + r, begin, end, w.forward.base, of_row);
    }
  }

  // See row_statistics in backward.h.
  void statistics(const AmxHead& operands, const Block& block, AmxBackwardWorkspace& w) const {
    Workspace& base = w.forward.base;
    const Head& head = operands.head;
    const Result scores = {base.scores + kSlack, p.leading}, gradient = {w.weights_gradient + kSlack, p.leading};
    fill(base.base, -kInfinity, block.rows);
    fill(base.inverse, 0.0f, block.rows);
    fill(base.delta, 0.0f, block.rows);
    Tile tile;
    TileRegisters registers;
    for (int64_t first_key = block.keys.first / kTileDepth * kTileDepth; first_key < block.keys.last; first_key += p.block_keys) {
      cut_tile(p, head, block, first_key, kGroupRows, tile);
      if (tile_hidden(p, head, block, tile.keys)) continue;
      for (int g = 0; g < tile.count; ++g) {
        const Group& of = tile.groups[g];
        group(operands, block, tile, of, w, scores, gradient);
        const int64_t begin = of.columns.first, columns = of.columns.last - begin;
        for (int r = 0; r < of.rows; ++r) {
          const int64_t row = of.row + r;
          float* weights = scores.data + r * scores.row + begin;
          const float* of_weights = gradient.data + r * gradient.row + begin;
          softmax_row(weights, columns, base.base[row], base.inverse[row], base.delta + row, 1);
          if (p.dropout.used()) drop_row(p.dropout, head, block.first + row, first_key + begin, columns, weights, base.keep);
          Vec sum = {};
          for (int64_t column = 0; column < columns; column += kWidth) sum += load(weights + column) * load(of_weights + column);
          base.delta[row] += sum_lanes(sum);
        }
      }
    }
    finish_statistics(p, block, base, true);
  }

  void zero_pairs(uint32_t* pairs, int64_t pair, int64_t first, int64_t last) const {
    __builtin_memset(pairs + pair * words + kWideSlack + first, 0, (size_t)(last - first) * 4);
  }
  void zero_halves(const AmxBackwardWorkspace& w, int64_t row, int64_t first, int64_t last) const {
    for (Half* of_rows : w.gradient_rows)
      if (of_rows) __builtin_memset(of_rows + row * halves + kWideSlack + first, 0, (size_t)(last - first) * 2);
  }

  // A group's weights after dropout and gradients of its scores, as pairs of rows and as rows.
  void write_pairs(const AmxHead& operands, const Block& block, const Tile& tile, const Group& of, const AmxSums& sums,
                   AmxBackwardWorkspace& w, const Result& scores, const Result& gradient) const {
    const Head& head = operands.head;
    Workspace& base = w.forward.base;
    const int64_t begin = of.columns.first, end = of.columns.last, shift = block.position + of.row - head.rel_k.left - tile.first_key;
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                                19, 3, 18, 2, 17, 1, 16, 0);
    const Vec factor = splat(1.0f / p.dropout.kept_share);
    for (int r = 0; r < of.rows; ++r) {  // in place, in float32
      const int64_t row = of.row + r;
      float *weights = scores.data + r * scores.row, *of_scores = gradient.data + r * gradient.row;
      const Vec subtracted = splat(base.base[row]), inverse = splat(base.inverse[row]), delta = splat(base.delta[row]);
      if (p.dropout.used())
        dropout_keep(p.dropout, head.batch, head.head, block.first + row, tile.first_key + begin, tile.first_key + end, base.keep);
      for (int64_t column = begin; column < end; column += kWidth) {
        const Vec weight = exp2_nonpositive(load(weights + column) - subtracted) * inverse;
        const Vec upstream = load(of_scores + column);
        if (p.dropout.used()) {
          const Vec kept = load(base.keep + column - begin) * factor;
          store(of_scores + column, weight * (upstream * kept - delta));
          store(weights + column, weight * kept);
        } else {
          store(of_scores + column, weight * (upstream - delta));
          store(weights + column, weight);
        }
      }
      if (!p.position) continue;
      const int64_t left_stop = clamp(shift + r, begin, end), right_start = clamp(head.rel_k.rows + shift + r, left_stop, end);
      w.row_left[row] += sum_row(of_scores + begin, left_stop - begin);
      w.row_right[row] += sum_row(of_scores + right_start, end - right_start);
      if (sums.bias && left_stop < right_start)
        add_scaled(sums.bias + left_stop - shift - r, of_scores + left_stop, 1.0f, right_start - left_stop);
    }
    for (int r = of.rows; r < round_up(of.rows, 2); ++r) {
      fill(scores.data + r * scores.row + begin, 0.0f, end - begin);
      fill(gradient.data + r * gradient.row + begin, 0.0f, end - begin);
    }
    const int64_t limit = p.block_keys;
    for (int64_t pair = of.row / 2; pair < (of.row + of.rows + 1) / 2; ++pair) {
      const int64_t r = 2 * pair - of.row;
      const float *low = scores.data + r * scores.row, *high = low + scores.row, *low_gradient = gradient.data + r * gradient.row,
                  *high_gradient = low_gradient + gradient.row;
      uint32_t *weights = w.weights + pair * words + kWideSlack, *of_scores = w.gradient + pair * words + kWideSlack;
      Half *low_row = w.gradient_rows[0] + 2 * pair * halves + kWideSlack, *high_row = low_row + halves;
      Half* rest = w.gradient_rows[1] ? w.gradient_rows[1] + 2 * pair * halves + kWideSlack : nullptr;
      for (int64_t column = begin; column < end; column += kWidth) {
        const __m512i of_weights = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(high + column), (__m512)load(low + column));
        _mm512_storeu_si512(weights + column, _mm512_permutexvar_epi16(interleave, of_weights));
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(high_gradient + column), (__m512)load(low_gradient + column));
        _mm512_storeu_si512(of_scores + column, _mm512_permutexvar_epi16(interleave, both));
        _mm256_storeu_si256((__m256i*)(low_row + column), _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i*)(high_row + column), _mm512_extracti64x4_epi64(both, 1));
        if (rest) {
          store_half(rest + column, load(low_gradient + column) - widen(_mm512_castsi512_si256(both)));
          store_half(rest + halves + column, load(high_gradient + column) - widen(_mm512_extracti64x4_epi64(both, 1)));
        }
      }
      zero_pairs(w.weights, pair, -kWideSlack, begin);
      zero_pairs(w.weights, pair, end, limit + kWideSlack);
      zero_pairs(w.gradient, pair, -kWideSlack, begin);
      zero_pairs(w.gradient, pair, end, limit + kWideSlack);
      for (int64_t row = 2 * pair; row < 2 * pair + 2; ++row) {
        zero_halves(w, row, -kWideSlack, begin);
        zero_halves(w, row, end, limit + kWideSlack);
      }
      if (!w.skewed[0]) continue;
      for (int part = 0; part < 2; ++part) {
        const Half *first_row = w.gradient_rows[part] + 2 * pair * halves + kWideSlack, *second_row = first_row + halves;
        uint32_t* skewed = w.skewed[part] + pair * words + kWideSlack;
        for (int64_t column = begin - kPanel; column < end; column += kPanel) {  // the second row's first column stands at begin - 1
          const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first_row + column)));
          const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second_row + column + 1)));
          _mm512_storeu_si512(skewed + column, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
        zero_pairs(w.skewed[part], pair, -kWideSlack, begin - kPanel);
        zero_pairs(w.skewed[part], pair, end, limit + kWideSlack);
      }
    }
    for (int64_t pair = (of.row + of.rows + 1) / 2; pair < (of.row + kGroupRows) / 2; ++pair) clear_pair(w, pair);
  }

  void clear_pair(AmxBackwardWorkspace& w, int64_t pair) const {
    zero_pairs(w.weights, pair, -kWideSlack, p.block_keys + kWideSlack);
    zero_pairs(w.gradient, pair, -kWideSlack, p.block_keys + kWideSlack);
    for (uint32_t* skewed : w.skewed)
      if (skewed) zero_pairs(skewed, pair, -kWideSlack, p.block_keys + kWideSlack);
    for (int64_t row = 2 * pair; row < 2 * pair + 2; ++row) zero_halves(w, row, -kWideSlack, p.block_keys + kWideSlack);
  }

  // gradient^T (size, keys) += rows^T x pairs, over the rows of the groups [first_group, last_group).
  void add_over_rows(const Tile& tile, const Half* rows_t, int64_t size, const uint32_t* pairs, int64_t first_row, int64_t last_row,
                     float* gradient) const {
    const int64_t first = (tile.keys.first - tile.first_key) / kPanel, last = panels_of(tile.keys.last - tile.first_key),
                  steps = (last_row - first_row) / kTileDepth;
    for (int64_t d = 0; d < size; d += kGroupRows)
      amx_multiply<true>(
          (int)least(kGroupRows, size - d), last - first, {rows_t + d * rows + first_row, rows},
          {(const Half*)(pairs + first_row / 2 * words + kWideSlack + first * kPanel), 2 * kPanel, 2 * words, 2 * kTileRows * words}, steps,
          {gradient + d * key_columns + tile.first_key + first * kPanel, key_columns});
  }

  void table_gradient(const Tile& tile, const Block& block, const Head& head, int64_t first_row, int64_t last_row, AmxBackwardWorkspace& w,
                      float* gradient) const {
    const int64_t shift = block.position - head.rel_k.left - tile.first_key;
    const int64_t lowest = most<int64_t>(tile.keys.first - tile.first_key - shift - (last_row - 1), 0),
                  highest = least(tile.keys.last - tile.first_key - 1 - shift - first_row, head.rel_k.rows - 1);
    if (lowest > highest) return;
    for (int64_t r = lowest / kPanel * kPanel; r <= highest; r += 2 * kPanel) {
      // Groups of rows with some column in these two panels.
      int64_t begin = first_row, end = last_row;
      while (begin < end && r + 2 * kPanel - 1 + shift + begin + kGroupRows - 1 < tile.keys.first - tile.first_key) begin += kGroupRows;
      while (begin < end && r + shift + end - kGroupRows >= tile.keys.last - tile.first_key) end -= kGroupRows;
      if (begin == end) continue;
      const int64_t panels = least<int64_t>(2, panels_of(highest + 1 - r));
      for (const uint32_t* part : w.skewed) {
        const uint32_t* pairs = part + begin / 2 * words + kWideSlack + r + shift + begin;
        for (int64_t d = 0; d < sizes.size; d += kGroupRows)
          amx_multiply<true>((int)least(kGroupRows, sizes.size - d), panels, {w.position_t + d * rows + begin, rows},
                             {(const Half*)pairs, 2 * kPanel, 2 * (words + 2), 2 * kTileRows * (words + 2)}, (end - begin) / kTileDepth,
                             {gradient + d * table_columns + r, table_columns});
      }
    }
  }

  // Everything that the block's rows and the keys in `keys` contribute. The block has been prepared.
  void keys(const AmxHead& operands, const Block& whole, Range keys, const AmxUnit& unit, const AmxSums& sums, const Gradients& out,
            AmxBackwardWorkspace& w) const {
    const Head& head = operands.head;
    Workspace& base = w.forward.base;
    const Result scores = {base.scores + kSlack, p.leading}, gradient = {w.weights_gradient + kSlack, p.leading};
    Block block = whole;
    block.keys = {most(keys.first, whole.keys.first), least(keys.last, whole.keys.last)};
    fill(w.row_left, 0.0f, block.rows);
    fill(w.row_right, 0.0f, block.rows);
    Tile tile;
    TileRegisters registers;
    for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last; first_key += p.block_keys) {
      cut_tile(p, head, block, first_key, kGroupRows, tile);
      if (tile.count == 0 || tile_hidden(p, head, block, tile.keys)) continue;
      const int64_t first_row = tile.groups[0].row, last_row = tile.groups[tile.count - 1].row + kGroupRows;
      int64_t next = first_row;
      for (int g = 0; g < tile.count; ++g) {
        const Group& of = tile.groups[g];
        for (; next < of.row; next += 2) clear_pair(w, next / 2);  // groups between that see nothing
        next = of.row + kGroupRows;
        group(operands, block, tile, of, w, scores, gradient);
        write_pairs(operands, block, tile, of, sums, w, scores, gradient);
        if (!out.content) continue;
        const int64_t first = of.columns.first, steps = (of.columns.last - first + kTileDepth - 1) / kTileDepth,
                      panels = p.padded_size / kPanel;
        for (int part = 0; part < (out.pos_bias_u ? 2 : 1); ++part)  // that gradient is a sum over all of them
          amx_multiply<true>(of.rows, panels, {w.gradient_rows[part] + of.row * halves + kWideSlack + first, halves},
                             {unit.key_pairs + (first_key + first) * kPanel, (sizes.keys + kTileDepth) * kPanel}, steps,
                             {out.content + of.row * p.padded_size, p.padded_size});
        if (!p.call.rel_k.data) continue;
        const int64_t shift = block.position + of.row - head.rel_k.left - first_key;
        const int64_t lowest = most<int64_t>(of.seen.first - shift - (of.rows - 1), 0) / 2 * 2,
                      highest = least(of.seen.last - 1 - shift, p.call.rows - 1);
        for (int part = 0; part < 2 && lowest <= highest; ++part)
          amx_multiply<true>(of.rows, panels, {w.gradient_rows[part] + of.row * halves + kWideSlack + lowest + shift, halves + 1},
                             {table_pairs + (per_head ? head.head * pair_halves : 0) + lowest * kPanel, table_pair_rows * kPanel},
                             (highest - lowest) / kTileDepth + 1, {out.position + of.row * p.padded_size, p.padded_size});
      }
      if (out.value.data) add_over_rows(tile, w.upstream_t, p.padded_value_size, w.weights, first_row, last_row, unit.value_gradient);
      if (out.key.data) add_over_rows(tile, w.content_t, p.padded_size, w.gradient, first_row, last_row, unit.key_gradient);
      if (sums.table) table_gradient(tile, block, head, first_row, last_row, w, sums.table);
    }
    if (p.position) add_edges(operands, block, sums, out, w);
  }

  // What lies beyond the table's edges, from the rows' sums there.
  void add_edges(const AmxHead& operands, const Block& block, const AmxSums& sums, const Gradients& out, AmxBackwardWorkspace& w) const {
    const Tensor& rel_k = p.call.rel_k;
    for (int side = 0; side < 2; ++side) {
      const float* total = side ? w.row_right : w.row_left;
      const int64_t table_row = side ? p.call.rows - 1 : 0;
      float* gradient = side ? sums.right_edge : sums.left_edge;
      float* edge = w.forward.base.scratch;
      if (rel_k.data)
        read_row(rel_k.data, rel_k.dtype, operands.head.head * rel_k.stride[1] + table_row * rel_k.stride[2], rel_k.stride[3], p.size,
                 edge);
      for (int64_t row = 0; row < block.rows; ++row) {
        if (total[row] == 0.0f) continue;
        if (sums.bias) sums.bias[table_row] += total[row];
        if (!rel_k.data) continue;
        const Half* position = w.forward.position + row * sizes.size;
        for (int64_t column = 0; gradient && column < p.size; ++column) gradient[column] += total[row] * from_bfloat16(position[column]);
        if (out.content) add_scaled(out.position + row * p.padded_size, edge, total[row], p.size);
      }
    }
  }
};

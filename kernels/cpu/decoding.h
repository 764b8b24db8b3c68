// The forward pass of few queries against many keys, as in decoding: it reads keys, values and tables once, where they
// are, since packing them costs more than all products. Heads that share keys are taken together, and the keys in parts
// of fixed length, so that one head occupies several threads and the result does not depend on how many there are.

constexpr int64_t kFewQueries = 2;  // more share what was packed
constexpr int64_t kFewRows = 8;     // query heads of a key head, times queries
constexpr int64_t kKeysOfPart = 1024;
constexpr int64_t kBlockKeysFew = 256;  // of a tile of scores

INLINE bool whole_vectors(const Tensor& tensor, int64_t size) {
  return !tensor.data || (tensor.stride[3] == 1 && size % kWidth == 0);
}

static bool takes_few(const Call& call) {
  return call.queries <= kFewQueries && call.queries * (call.heads / call.key_heads) <= kFewRows && !call.rel_q.data &&
         whole_vectors(call.key, call.size) && whole_vectors(call.value, call.value_size) &&
         whole_vectors(call.rel_k, call.size) && whole_vectors(call.rel_v, call.value_size);
}

// kWidth elements from `index` on, as floats.
template <int64_t kType>
INLINE Vec load_as(const char* data, int64_t index) {
  if constexpr (kType == kFloat32) return load((const float*)data + index);
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256((const __m256i*)((const uint16_t*)data + index));
  return kType == kBFloat16 ? (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
                            : (Vec)_mm512_cvtph_ps(bits);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128((const __m128i*)((const uint16_t*)data + index));
  return kType == kBFloat16 ? (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))
                            : (Vec)_mm256_cvtph_ps(bits);
#else
  Vec result;
  for (int lane = 0; lane < kWidth; ++lane) result[lane] = read_element(data, kType, index + lane);
  return result;
#endif
}

// Products of the matrix's rows with each of kCount vectors of whole floats: to[v][row - rows.first], or added to it.
// What is addressed comes by value here: behind a reference it would be read again after every store (vectors may alias
// anything), 2% of a decoding step.
template <int64_t kType, int kCount>
static void dots_of(const Matrix& m, Range rows, Left vectors, int64_t size, bool add, Result to) {
  float sums[kCount][kPanel * kWidth], turned[kWidth * kPanel];
  for (int64_t row = rows.first; row < rows.last; row += kPanel) {
    const int count = (int)least<int64_t>(kPanel, rows.last - row);
    for (int r = 0; r < count; ++r) {
      const int64_t start = m.first + (row + r) * m.row;
      Vec sum[kCount] = {};
      for (int64_t column = 0; column < size; column += kWidth) {
        const Vec element = load_as<kType>(m.data, start + column);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) sum[v] += element * load(vectors.data + v * vectors.row + column);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) store(sums[v] + r * kWidth, sum[v]);
    }
    for (int v = 0; v < kCount; ++v) {
      for (int r = count; r < kPanel; ++r) store(sums[v] + r * kWidth, Vec{});
      transpose(sums[v], kWidth, turned, kPanel);
      float* target = to.data + v * to.row + row - rows.first;
      for (int column = 0; column < kPanel; column += kWidth) {
        Vec total = load(turned + column);
        for (int lane = 1; lane < kWidth; ++lane) total += load(turned + lane * kPanel + column);
        if (count == kPanel) {
          store(target + column, add ? load(target + column) + total : total);
        } else {
          for (int lane = 0; lane < kWidth && column + lane < count; ++lane)
            target[column + lane] = add ? target[column + lane] + total[lane] : total[lane];
        }
      }
    }
  }
}

// result[v] += sum over the matrix's rows of weights[v][row - rows.first] times the row.
template <int64_t kType, int kCount>
static void weighted_of(const Matrix& m, Range rows, Left weights, int64_t size, Result result) {
  constexpr int kStep = 4;
  for (int64_t column = 0; column < size; column += kStep * kWidth) {
    const int vectors = (int)least<int64_t>(kStep, (size - column) / kWidth);
    Vec sum[kCount][kStep] = {};
    auto over_rows = [&](auto width) {
      constexpr int kVectors = decltype(width)::value;
      for (int64_t row = rows.first; row < rows.last; ++row) {
        const int64_t start = m.first + row * m.row + column;
#pragma GCC unroll 4
        for (int step = 0; step < kVectors; ++step) {
          const Vec element = load_as<kType>(m.data, start + step * kWidth);
#pragma GCC unroll 4
          for (int v = 0; v < kCount; ++v) sum[v][step] += element * weights.data[v * weights.row + row - rows.first];
        }
      }
    };
    if (vectors == 4) over_rows(Constant<4>{});
    if (vectors == 3) over_rows(Constant<3>{});
    if (vectors == 2) over_rows(Constant<2>{});
    if (vectors == 1) over_rows(Constant<1>{});
    for (int v = 0; v < kCount; ++v) {
      Vec nothing = {};
      for (int step = 0; step < vectors; ++step) nothing += sum[v][step] * splat(0.0f);
      if (sum_lanes(nothing) != 0.0f) {  // something is not finite: perhaps a row without weight, which has no say
        const float* of_rows = weights.data + v * weights.row;
        for (int step = 0; step < vectors; ++step) sum[v][step] = Vec{};
        for (int64_t row = rows.first; row < rows.last; ++row)
          for (int step = 0; step < vectors && of_rows[row - rows.first] != 0.0f; ++step)
            sum[v][step] +=
                load_as<kType>(m.data, m.first + row * m.row + column + step * kWidth) * of_rows[row - rows.first];
      }
      for (int step = 0; step < vectors; ++step) {
        float* to = result.data + v * result.row + column + step * kWidth;
        store(to, load(to) + sum[v][step]);
      }
    }
  }
}

// call(type, count) with both as constants: `count` vectors, four at a time at most.
template <class Call_>
INLINE void with_constants(int64_t dtype, int64_t count, const Call_& call) {
  auto typed = [&](auto type) {
    switch (count) {
      case 1:
        return call(type, Constant<1>{});
      case 2:
        return call(type, Constant<2>{});
      case 3:
        return call(type, Constant<3>{});
      default:
        return call(type, Constant<4>{});
    }
  };
  switch (dtype) {
    case kFloat32:
      return typed(Constant<kFloat32>{});
    case kBFloat16:
      return typed(Constant<kBFloat16>{});
    default:
      return typed(Constant<kFloat16>{});
  }
}

static void dots(const Matrix& m, const Range& rows, const Left& vectors, int64_t count, int64_t size, bool add,
                 const Result& to) {
  if (rows.empty()) return;
  for (int64_t v = 0; v < count; v += 4)
    with_constants(m.dtype, least<int64_t>(4, count - v), [&](auto type, auto taken) {
      dots_of<decltype(type)::value, decltype(taken)::value>(m, rows, vectors.from(v), size, add, to.from(v));
    });
}

static void weighted(const Matrix& m, const Range& rows, const Left& weights, int64_t count, int64_t size,
                     const Result& result) {
  if (rows.empty()) return;
  for (int64_t v = 0; v < count; v += 4)
    with_constants(m.dtype, least<int64_t>(4, count - v), [&](auto type, auto taken) {
      weighted_of<decltype(type)::value, decltype(taken)::value>(m, rows, weights.from(v), size, result.from(v));
    });
}

// One vector, and a place for its product.
INLINE Left single(const float* vector) { return {vector, 0, 1}; }
INLINE Result single(float* result) { return {result, 0}; }

// What one part of the keys makes of the rows of one key head: result not yet divided, running maximum and sum of each.
struct Part {
  float *result, *highest, *total;
};

// One row of a tile, laid over the tables: their row r belongs to column r + shift.
struct TileRow {
  int64_t head, shift;
  Range columns, within;  // that are seen; of these, those whose distances have rows of their own
};

// The position scores of a tile's row.
static void position_scores(const Problem& p, const TileRow& row, const float* query, float* scores) {
  const Call& call = p.call;
  const Range &columns = row.columns, &within = row.within;
  if (call.rel_k.data) {
    const Matrix table = matrix(call.rel_k, 0, row.head);
    auto edge = [&](int64_t table_row, int64_t first, int64_t last) {
      if (first >= last) return;
      float score;
      dots(table, {table_row, table_row + 1}, single(query), 1, p.size, false, single(&score));
      fill(scores + first, score, last - first);
    };
    dots(table, {within.first - row.shift, within.last - row.shift}, single(query), 1, p.size, false,
         single(scores + within.first));
    edge(0, columns.first, within.first);
    edge(call.rows - 1, within.last, columns.last);
  } else {
    fill(scores + columns.first, 0.0f, columns.last - columns.first);
  }
  if (!call.rel_bias.data) return;
  const Matrix bias = matrix(call.rel_bias, 0, row.head);
  for (int64_t column = columns.first; column < columns.last; ++column) {
    const int64_t table_row = clamp<int64_t>(column - row.shift, 0, call.rows - 1);
    scores[column] += (float)kLog2E * read_element(bias.data, bias.dtype, bias.first + table_row * bias.row);
  }
}

// result += the weights of a tile's row times the rows of rel_v of their distances.
static void value_positions(const Problem& p, const TileRow& row, const float* weights, float* result) {
  const int64_t rows = p.call.rows;
  const Range &columns = row.columns, &within = row.within;
  const Matrix table = matrix(p.call.rel_v, 0, row.head);
  auto add = [&](const Range& table_rows, const float* of_rows) {
    weighted(table, table_rows, single(of_rows), 1, p.value_size, single(result));
  };
  add({within.first - row.shift, within.last - row.shift}, weights + within.first);
  const float left = sum_row(weights + columns.first, within.first - columns.first),
              right = sum_row(weights + within.last, columns.last - within.last);
  if (columns.first < within.first) add({0, 1}, &left);
  if (within.last < columns.last) add({rows - 1, rows}, &right);
}

static void part_of_keys(const Problem& p, const Keys& keys, int64_t batch, int64_t key_head, Range range, Workspace& w,
                         const Part& part) {
  const Call& call = p.call;
  const int64_t rows = p.ratio * call.queries;
  const Matrix key = matrix(call.key, batch, key_head), value = matrix(call.value, batch, key_head);
  fill(part.result, 0.0f, rows * p.padded_value_size);
  fill(part.highest, -kInfinity, rows);
  fill(part.total, 0.0f, rows);
  Block block = {0, call.queries, window_of(call, keys, 0, call.queries), table_position(keys, 0)};
  block.keys = {most(block.keys.first, range.first), least(block.keys.last, range.last)};
  if (block.keys.empty()) return;
  Head head = {};
  head.batch = batch;
  head.keys = keys;
  auto head_of = [&](int64_t row) { return key_head * p.ratio + row / call.queries; };
  for (int64_t row = 0; row < rows; row += call.queries) {
    Workspace of_head = w;
    of_head.content += row * p.padded_size;
    of_head.position = w.position == w.content ? of_head.content : w.position + row * p.padded_depth;
    head.head = head_of(row);
    read_block(p, head, block, of_head);
  }
  const Table table = {nullptr, nullptr, 0, 0, call.rows, call.left, false};  // only where its rows lie
  const Result scores = {w.scores + kSlack, p.leading};
  Tile tile;
  for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last; first_key += p.block_keys) {
    cut_tile(p, head, block, first_key, call.queries, tile);
    const Range seen = {tile.keys.first - first_key, tile.keys.last - first_key};
    const Range columns = {seen.first / kPanel * kPanel, round_up(seen.last, kPanel)};
    auto tile_row = [&](int64_t row) {
      const Skew skew = lay_over(table, 1, block.position + row % call.queries, first_key);
      return TileRow{head_of(row), skew.shift, seen, skew.within(0, seen)};
    };
    if (p.position)
      for (int64_t row = 0; row < rows; ++row)
        position_scores(p, tile_row(row), w.position + row * p.padded_depth, scores.data + row * scores.row);
    dots(key, tile.keys, {w.content, p.padded_size, 1}, rows, p.size, p.position,
         {scores.data + seen.first, scores.row});
    for (int64_t row = 0; row < rows; ++row) {
      float *weights = scores.data + row * scores.row, *result = part.result + row * p.padded_value_size;
      const int64_t query = row % call.queries, count = columns.last - columns.first;
      head.head = head_of(row);
      hide(p, head, block, tile, query, columns, w, weights);
      softmax_row(weights + columns.first, count, {part.highest[row], part.total[row], result, p.padded_value_size});
      if (p.dropout.used())
        drop_row(p.dropout, head, query, first_key + columns.first, count, weights + columns.first, w.keep);
      if (call.rel_v.data) value_positions(p, tile_row(row), weights, result);
    }
    weighted(value, tile.keys, {scores.data + seen.first, scores.row, 1}, rows, p.value_size,
             {part.result, p.padded_value_size});
  }
}

// Add what a later part made of a row to what the earlier ones did.
static void join_parts(const Problem& p, int64_t row, const Part& sum, const Part& part) {
  const float highest = most(sum.highest[row], part.highest[row]), base = highest == -kInfinity ? 0.0f : highest;
  const float before = exp2_nonpositive(sum.highest[row] - base), after = exp2_nonpositive(part.highest[row] - base);
  float* result = sum.result + row * p.padded_value_size;
  scale_row(result, before, p.padded_value_size);
  add_scaled(result, part.result + row * p.padded_value_size, after, p.padded_value_size);
  sum.total[row] = sum.total[row] * before + part.total[row] * after;
  sum.highest[row] = highest;
}

static int64_t carve_few(const Problem& p, char* base, Workspace& w) {
  const int64_t rows = p.ratio * p.call.queries;
  Carver carver = {base, 0};
  w = {};
  w.content = carver.floats(rows * p.padded_size);
  w.position = p.position_is_content() ? w.content : carver.floats(rows * p.padded_depth);
  w.row = p.call.attn_mask.data ? carver.floats(p.block_keys) : nullptr;
  w.keep = p.dropout.used() ? carver.floats_after(kKeepBefore, p.block_keys + kKeepAfter) : nullptr;
  w.scratch = carver.floats(kPanel * p.padded_size);
  w.scores = carver.floats(rows * p.leading);
  return carver.used;
}

static int forward_few(const Call& call, const Team& team) {
  const Problem p(call, call.queries, kBlockKeysFew);
  const int64_t units = call.batch * call.key_heads, rows = p.ratio * call.queries;
  const int64_t parts = most<int64_t>((call.keys + kKeysOfPart - 1) / kKeysOfPart, 1);
  const int64_t part_floats = round_up(rows * (p.padded_value_size + 2), kPanel);
  Memory memory = {team};
  Workspace* workspaces =
      carve_for_threads<Workspace>(memory, [&](char* base, Workspace& w) { return carve_few(p, base, w); });
  const Keys* keys = find_keys(call, memory);
  float* results = memory.floats(true, units * parts * part_floats);
  if (!memory.enough) return 1;
  auto part_of = [&](int64_t index) {
    float* result = results + index * part_floats;
    float* highest = result + rows * p.padded_value_size;
    return Part{result, highest, highest + rows};
  };
  parallel(team, units * parts, [&](int64_t index, int64_t thread) {
    const int64_t unit = index / parts, first = index % parts * kKeysOfPart, b = unit / call.key_heads;
    part_of_keys(p, keys[b], b, unit % call.key_heads, {first, first + kKeysOfPart}, workspaces[thread],
                 part_of(index));
  });
  for (int64_t unit = 0; unit < units; ++unit) {
    const Part sum = part_of(unit * parts);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t part = 1; part < parts; ++part) join_parts(p, row, sum, part_of(unit * parts + part));
    Head head = {};
    head.batch = unit / call.key_heads;
    for (int64_t row = 0; row < rows; row += call.queries) {
      head.head = unit % call.key_heads * p.ratio + row / call.queries;
      Workspace w = {};
      w.result = sum.result + row * p.padded_value_size;
      w.highest = sum.highest + row;
      w.total = sum.total + row;
      write_block(p, head, {0, call.queries, {}, 0}, w);
    }
  }
  return 0;
}

// The forward pass of few queries against many keys, as in decoding: it reads keys, values and tables once, where they are, since packing
// them costs more than all products. Heads that share keys are taken together, and the keys in parts of fixed length, so that one head
// occupies several threads and the result does not depend on how many there are.

constexpr int64_t kFewQueries = 2;      // more share what was packed
constexpr int64_t kFewRows = 8;         // query heads of a key head, times queries
constexpr int64_t kKeysOfPart = 1024;
constexpr int64_t kBlockKeysFew = 256;  // of a tile of scores

INLINE bool whole_vectors(const Tensor& tensor, int64_t size) { return !tensor.data || (tensor.stride[3] == 1 && size % kWidth == 0); }

static bool takes_few(const Call& call) {
  return call.queries <= kFewQueries && call.queries * (call.heads / call.key_heads) <= kFewRows && !call.rel_q.data &&
         whole_vectors(call.key, call.size) && whole_vectors(call.value, call.value_size) && whole_vectors(call.rel_k, call.size) &&
         whole_vectors(call.rel_v, call.value_size);
}

// kWidth elements from `index` on, as floats.
template <int64_t kType>
INLINE Vec load_as(const char* data, int64_t index) {
  if constexpr (kType == kFloat32) return load((const float*)data + index);
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256((const __m256i*)((const uint16_t*)data + index));
  return kType == kBFloat16 ? (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)) : (Vec)_mm512_cvtph_ps(bits);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128((const __m128i*)((const uint16_t*)data + index));
  return kType == kBFloat16 ? (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)) : (Vec)_mm256_cvtph_ps(bits);
#else
  Vec result;
  for (int lane = 0; lane < kWidth; ++lane) result[lane] = read_element(data, kType, index + lane);
  return result;
#endif
}

// Products of the matrix's rows [first, last) with each of kCount vectors of whole floats: to[v][row - first], or added to it.
template <int64_t kType, int kCount>
static void dots_of(const Matrix& m, int64_t first, int64_t last, const float* vectors, int64_t vector_row, int64_t size, bool add, float* to,
                    int64_t to_row) {
  float sums[kCount][kPanel * kWidth], turned[kWidth * kPanel];
  for (int64_t row = first; row < last; row += kPanel) {
    const int count = (int)least<int64_t>(kPanel, last - row);
    for (int r = 0; r < count; ++r) {
      const int64_t start = m.first + (row + r) * m.row;
      Vec sum[kCount] = {};
      for (int64_t column = 0; column < size; column += kWidth) {
        const Vec element = load_as<kType>(m.data, start + column);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) sum[v] += element * load(vectors + v * vector_row + column);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) store(sums[v] + r * kWidth, sum[v]);
    }
    for (int v = 0; v < kCount; ++v) {
      for (int r = count; r < kPanel; ++r) store(sums[v] + r * kWidth, Vec{});
      transpose(sums[v], kWidth, turned, kPanel);
      float* target = to + v * to_row + row - first;
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

// result[v] += sum over the matrix's rows [first, last) of weights[v][row - first] times the row.
template <int64_t kType, int kCount>
static void weighted_of(const Matrix& m, int64_t first, int64_t last, const float* weights, int64_t weights_row, int64_t size, float* result,
                        int64_t result_row) {
  constexpr int kStep = 4;
  for (int64_t column = 0; column < size; column += kStep * kWidth) {
    const int vectors = (int)least<int64_t>(kStep, (size - column) / kWidth);
    Vec sum[kCount][kStep] = {};
    auto over_rows = [&](auto width) {
      constexpr int kVectors = decltype(width)::value;
      for (int64_t row = first; row < last; ++row) {
        const int64_t start = m.first + row * m.row + column;
#pragma GCC unroll 4
        for (int step = 0; step < kVectors; ++step) {
          const Vec element = load_as<kType>(m.data, start + step * kWidth);
#pragma GCC unroll 4
          for (int v = 0; v < kCount; ++v) sum[v][step] += element * weights[v * weights_row + row - first];
        }
      }
    };
    if (vectors == 4) over_rows(Constant<4>{});
    if (vectors == 3) over_rows(Constant<3>{});
    if (vectors == 2) over_rows(Constant<2>{});
    if (vectors == 1) over_rows(Constant<1>{});
    for (int v = 0; v < kCount; ++v)
      for (int step = 0; step < vectors; ++step) {
        float* to = result + v * result_row + column + step * kWidth;
        store(to, load(to) + sum[v][step]);
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

static void dots(const Matrix& m, int64_t first, int64_t last, const float* vectors, int64_t vector_row, int64_t count, int64_t size, bool add,
                 float* to, int64_t to_row) {
  if (first >= last) return;
  for (int64_t v = 0; v < count; v += 4)
    with_constants(m.dtype, least<int64_t>(4, count - v), [&](auto type, auto rows) {
      dots_of<decltype(type)::value, decltype(rows)::value>(m, first, last, vectors + v * vector_row, vector_row, size, add, to + v * to_row,
                                                            to_row);
    });
}

static void weighted(const Matrix& m, int64_t first, int64_t last, const float* weights, int64_t weights_row, int64_t count, int64_t size,
                     float* result, int64_t result_row) {
  if (first >= last) return;
  for (int64_t v = 0; v < count; v += 4)
    with_constants(m.dtype, least<int64_t>(4, count - v), [&](auto type, auto rows) {
      weighted_of<decltype(type)::value, decltype(rows)::value>(m, first, last, weights + v * weights_row, weights_row, size,
                                                                result + v * result_row, result_row);
    });
}

// What one part of the keys makes of the rows of one key head: result not yet divided, running maximum and sum of each.
struct Part {
  float *result, *highest, *total;
};

// Columns [first, last) of a tile whose distances have rows of their own in the table; column 0 would have row `row`.
struct Reach {
  int64_t first, last, row;
};

INLINE Reach reach_of(const Call& call, int64_t position, int64_t first_key, int64_t begin, int64_t end) {
  const int64_t row = first_key - position + call.left;
  const int64_t first = clamp(-row, begin, end);
  return {first, clamp(call.rows - row, first, end), row};
}

// The position scores of one row of a tile, in columns [begin, end).
static void position_scores(const Problem& p, int64_t head, int64_t position, int64_t first_key, int64_t begin, int64_t end,
                            const float* query, float* scores) {
  const Call& call = p.call;
  const Reach reach = reach_of(call, position, first_key, begin, end);
  const int64_t edges[2] = {0, call.rows - 1};
  const Range sides[2] = {{begin, reach.first}, {reach.last, end}};
  if (call.rel_k.data) {
    const Matrix table = matrix(call.rel_k, 0, head);
    dots(table, reach.first + reach.row, reach.last + reach.row, query, 0, 1, p.size, false, scores + reach.first, 0);
    for (int side = 0; side < 2; ++side) {
      if (sides[side].empty()) continue;
      float edge;
      dots(table, edges[side], edges[side] + 1, query, 0, 1, p.size, false, &edge, 0);
      fill(scores + sides[side].first, edge, sides[side].last - sides[side].first);
    }
  } else {
    fill(scores + begin, 0.0f, end - begin);
  }
  if (!call.rel_bias.data) return;
  const Tensor& bias = call.rel_bias;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t row = clamp<int64_t>(column + reach.row, 0, call.rows - 1);
    scores[column] += (float)kLog2E * read_element(bias.data, bias.dtype, head * bias.stride[1] + row * bias.stride[2]);
  }
}

// result += the weights of one row of a tile times the rows of rel_v of their distances.
static void value_positions(const Problem& p, int64_t head, int64_t position, int64_t first_key, int64_t begin, int64_t end,
                            const float* weights, float* result) {
  const Call& call = p.call;
  const Matrix table = matrix(call.rel_v, 0, head);
  const Reach reach = reach_of(call, position, first_key, begin, end);
  weighted(table, reach.first + reach.row, reach.last + reach.row, weights + reach.first, 0, 1, p.value_size, result, 0);
  const float left = sum_row(weights + begin, reach.first - begin), right = sum_row(weights + reach.last, end - reach.last);
  if (reach.first > begin) weighted(table, 0, 1, &left, 0, 1, p.value_size, result, 0);
  if (end > reach.last) weighted(table, call.rows - 1, call.rows, &right, 0, 1, p.value_size, result, 0);
}

static void part_of_keys(const Problem& p, const Keys& keys, int64_t batch, int64_t key_head, Range range, Workspace& w, const Part& part) {
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
  Tile tile;
  for (int64_t first_key = block.keys.first / kPanel * kPanel; first_key < block.keys.last; first_key += p.block_keys) {
    cut_tile(p, head, block, first_key, call.queries, tile);
    const int64_t first = tile.keys.first - first_key, last = tile.keys.last - first_key;
    const int64_t begin = first / kPanel * kPanel, end = round_up(last, kPanel);
    float* scores = w.scores + kSlack;
    if (p.position)
      for (int64_t row = 0; row < rows; ++row)
        position_scores(p, head_of(row), block.position + row % call.queries, first_key, first, last, w.position + row * p.padded_depth,
                        scores + row * p.leading);
    dots(key, tile.keys.first, tile.keys.last, w.content, p.padded_size, rows, p.size, p.position, scores + first, p.leading);
    for (int64_t row = 0; row < rows; ++row) {
      float* weights = scores + row * p.leading;
      const int64_t query = row % call.queries;
      head.head = head_of(row);
      hide(p, head, query, tile, query, begin, end, w, weights);
      softmax_row(weights + begin, end - begin, part.highest[row], part.total[row], part.result + row * p.padded_value_size,
                  p.padded_value_size);
      if (p.dropout.used()) drop_row(p.dropout, head, query, first_key + begin, end - begin, weights + begin, w.keep);
      if (call.rel_v.data)
        value_positions(p, head.head, block.position + query, first_key, first, last, weights, part.result + row * p.padded_value_size);
    }
    weighted(value, tile.keys.first, tile.keys.last, scores + first, p.leading, rows, p.value_size, part.result, p.padded_value_size);
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
  w.position = position_is_content(p) ? w.content : carver.floats(rows * p.padded_depth);
  w.row = p.call.attn_mask.data ? carver.floats(p.block_keys) : nullptr;
  w.keep = p.dropout.used() ? carver.floats(p.block_keys + kKeepBefore + kKeepAfter) + kKeepBefore : nullptr;
  w.scratch = carver.floats(kPanel * p.padded_size);
  w.scores = carver.floats(rows * p.leading);
  return carver.used;
}

static int forward_few(const Call& call, const Team& team) {
  const Problem p(call, call.queries, kBlockKeysFew);
  const int64_t threads = team.threads, units = call.batch * call.key_heads, rows = p.ratio * call.queries;
  const int64_t parts = most<int64_t>((call.keys + kKeysOfPart - 1) / kKeysOfPart, 1);
  const int64_t part_floats = round_up(rows * (p.padded_value_size + 2), kPanel);
  Workspace probe;
  const int64_t workspace_floats = carve_few(p, nullptr, probe) / 4;
  Workspace* workspaces = (Workspace*)allocate(team, threads * (int64_t)sizeof(Workspace) / 4);
  Keys* keys = (Keys*)allocate(team, call.batch * (int64_t)sizeof(Keys) / 4);
  float* holes = call.key_mask.data ? allocate(team, call.batch * call.keys) : nullptr;
  float* memory = allocate(team, units * parts * part_floats);
  if (!workspaces || !keys || (call.key_mask.data && !holes) || !memory) return 1;
  for (int64_t thread = 0; thread < threads; ++thread) {
    float* own = allocate(team, workspace_floats);
    if (!own) return 1;
    carve_few(p, (char*)own, workspaces[thread]);
  }
  for (int64_t b = 0; b < call.batch; ++b) keys[b] = visible_keys(call, b, holes ? holes + b * call.keys : nullptr);
  auto part_of = [&](int64_t index) {
    float* result = memory + index * part_floats;
    float* highest = result + rows * p.padded_value_size;
    return Part{result, highest, highest + rows};
  };
  parallel(team, units * parts, [&](int64_t index, int64_t thread) {
    const int64_t unit = index / parts, first = index % parts * kKeysOfPart, b = unit / call.key_heads;
    part_of_keys(p, keys[b], b, unit % call.key_heads, {first, first + kKeysOfPart}, workspaces[thread], part_of(index));
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

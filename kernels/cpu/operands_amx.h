// A call's sizes on AMX, and packing its operands in bfloat16, for both passes.

INLINE void zero_halves(Half* to, int64_t count) { __builtin_memset(to, 0, (size_t)count * 2); }

// Rows of a matrix, rounded to bfloat16 and filled up with zeros to `padded` elements.
struct HalfSource {
  Matrix matrix;
  int64_t rows, size, padded;
  bool repeat_last = false;  // beyond the last row of panels come copies of it, instead of zeros
  bool finite = false;       // of pairs: zeros for what is not
  bool reversed = false;     // the last row first

  Matrix first_to_last() const {
    Matrix m = matrix;
    if (reversed) {
      m.first += (rows - 1) * m.row;
      m.row = -m.row;
    }
    return m;
  }
};

// 16 rows, of which pairs and panels are made, and one as floats.
struct HalfScratch {
  Half* rows;
  float* row;
};

// Rows as B of products over them, `rows` of them: each panel of 16 columns holds (rows / 2, 16) pairs of rows.
struct HalfPairs {
  Half* data;
  int64_t rows;

  HalfRight from(int64_t row) const { return {data + row * kPanel, rows * kPanel}; }  // an even one
};

static void read_halves(const HalfSource& source, int64_t row, Half* to, float* scratch) {
  const Matrix m = source.first_to_last();
  if (m.dtype == kBFloat16 && m.column == 1) {
    __builtin_memcpy(to, (const Half*)m.data + m.first + row * m.row, (size_t)source.size * 2);
  } else {
    read_row(m, row, source.size, scratch);
    for (int64_t column = 0; column < source.size; ++column) to[column] = to_bfloat16(scratch[column]);
  }
  zero_halves(to + source.size, source.padded - source.size);
}

// Panel `index` of the rows, as B of products over their elements: (padded / 2, 16) pairs of elements.
static void pack_half_panel(const HalfSource& source, int64_t index, Half* to, const HalfScratch& scratch) {
  const Matrix m = source.first_to_last();
  const int64_t first = index * kPanel, padded = source.padded;
  const Half* rows = scratch.rows;
  int64_t stride = padded;
  if (m.dtype == kBFloat16 && m.column == 1 && source.size == padded && m.row % 2 == 0 && m.first % 2 == 0 &&
      first + kPanel <= source.rows) {
    rows = (const Half*)m.data + m.first + first * m.row;
    stride = m.row;
  } else {
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t row = first + r;
      if (row < source.rows || source.repeat_last) {
        read_halves(source, least(row, source.rows - 1), scratch.rows + r * padded, scratch.row);
      } else {
        zero_halves(scratch.rows + r * padded, padded);
      }
    }
  }
  for (int64_t pair = 0; pair < padded / 2; pair += kPanel)
    transpose((const float*)(rows + 2 * pair), stride / 2, (float*)to + pair * kPanel, kPanel);
}

// These rows (the first even), of which `origin` is the first of `to`. Returns whether source.finite left something
// out.
static bool pack_half_pairs(const HalfSource& source, const Range& rows, int64_t origin, const HalfPairs& to,
                            const HalfScratch& scratch) {
  const int64_t padded = source.padded;
  bool dropped = false;
  for (int64_t row = rows.first; row < rows.last; row += 2) {
    Half* pair[2] = {scratch.rows, scratch.rows + padded};
    for (int r = 0; r < 2; ++r) {
      if (row + r < source.rows) {
        read_halves(source, row + r, pair[r], scratch.row);
        if (source.finite && !all_finite(pair[r], padded)) {
          drop_nonfinite(pair[r], padded);
          dropped = true;
        }
      } else {
        zero_halves(pair[r], padded);
      }
    }
    for (int64_t column = 0; column < padded; column += kPanel) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(pair[0] + column)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(pair[1] + column)));
      _mm512_storeu_si512(to.data + column * to.rows + (row - origin) * kPanel,
                          _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  return dropped;
}

struct AmxProblem : Problem {
  // Head sizes and keys, rounded up to whole instructions of a product over them.
  int64_t deep_size, deep_value_size, deep_keys;

  AmxProblem(const Call& c, int64_t rows_of_block, int64_t keys_of_block) : Problem(c, rows_of_block, keys_of_block) {
    deep_size = round_up(size, kTileDepth);
    deep_value_size = round_up(value_size, kTileDepth);
    deep_keys = round_up(c.keys, kTileDepth);
  }

  // Whether the position product's rows are the content product's: rel_bias is not among them here.
  bool position_is_content() const { return !(call.pos_bias_u.data || call.pos_bias_v.data); }

  HalfSource keys(int64_t batch, int64_t key_head, int64_t padded) const {
    return {matrix(call.key, batch, key_head), call.keys, size, padded};
  }
  HalfSource values(int64_t batch, int64_t key_head, int64_t padded) const {
    return {matrix(call.value, batch, key_head), call.keys, value_size, padded};
  }
  HalfSource source(TableName name, int64_t head) const {  // as table_source
    HalfSource result = {matrix(table(name), 0, head), call.rows, size, deep_size, true};
    if (name == kRelV) {
      result.size = value_size;
      result.padded = deep_value_size;
    }
    result.reversed = name == kRelQ;
    return result;
  }
};

// The tables in the forms that the passes read, for each head or for all that share one; rel_bias in units of ln 2.
struct AmxTables {
  PerHead<Half> panels[3], pairs[3];  // panels: of products over the head size. pairs: of products over the rows
  PerHead<float> bias;
  int64_t pair_rows;
  bool* nonfinite;  // whether rel_v's pairs have zeros for some numbers that are not

  static int64_t panel_halves(const AmxProblem& p, TableName name) {
    return panels_of(p.call.rows) * kPanel * p.source(name, 0).padded;
  }
  int64_t pair_halves(const AmxProblem& p, TableName name) const {
    return pair_rows * (name == kRelV ? p.padded_value_size : p.padded_size);
  }

  // The memory for the forms (panels, natural) of a table that are needed.
  void plan(const AmxProblem& p, Memory& memory, TableName name, int forms) {
    const Tensor& table = p.table(name);
    const bool per_head = differs_by_head(table);
    const int64_t heads = per_head ? p.call.heads : 1;
    pair_rows = round_up(p.call.rows, kTileDepth) + kTileDepth;  // products begin at any even row
    const int64_t panel = panel_halves(p, name), pair = pair_halves(p, name);
    panels[name] = {memory.halves(table.data && (forms & kPanelsForm), heads * panel), per_head ? panel : 0};
    pairs[name] = {memory.halves(table.data && (forms & kNaturalForm), heads * pair), per_head ? pair : 0};
  }
  void plan_bias(const AmxProblem& p, Memory& memory) {
    nonfinite = memory.array<bool>(1);
    if (nonfinite) *nonfinite = false;
    const bool per_head = differs_by_head(p.call.rel_bias);
    bias = {memory.floats(p.call.rel_bias.data, (per_head ? p.call.heads : 1) * p.call.rows),
            per_head ? p.call.rows : 0};
  }

  // In parallel; scratch(thread) is a thread's HalfScratch.
  template <class Scratch>
  void pack(const AmxProblem& p, const Team& team, const Scratch& scratch) const {
    const Call& call = p.call;
    for (int64_t head = 0; bias.data && head < (bias.stride ? call.heads : 1); ++head) {
      const Tensor& from = call.rel_bias;
      read_row(from.data, from.dtype, head * from.stride[1], from.stride[2], call.rows, bias.of(head));
      scale_row(bias.of(head), (float)kLog2E, call.rows);
    }
    const int64_t tasks = tasks_of(pair_rows / kPanel);
    for (TableName name : kTables) {
      if (!panels[name].data && !pairs[name].data) continue;
      const int64_t heads = differs_by_head(p.table(name)) ? call.heads : 1;
      parallel(team, heads * tasks, [&](int64_t index, int64_t thread) {
        const int64_t head = index / tasks, first = index % tasks * kPanelsOfTask,
                      last = least(first + kPanelsOfTask, pair_rows / kPanel);
        HalfSource source = p.source(name, head);
        for (int64_t panel = first; panels[name].data && panel < least(last, panels_of(call.rows)); ++panel)
          pack_half_panel(source, panel, panels[name].of(head) + panel * kPanel * source.padded, scratch(thread));
        source.padded = name == kRelV ? p.padded_value_size : p.padded_size;
        source.finite = true;
        const HalfPairs to = {pairs[name].of(head), pair_rows};
        if (to.data && pack_half_pairs(source, {first * kPanel, last * kPanel}, 0, to, scratch(thread)) &&
            name == kRelV)
          __atomic_store_n(nonfinite, true, __ATOMIC_RELAXED);
      });
    }
  }
};

// Keys and values of one key head of one batch element, in the forms that are planned (null: not needed).
struct AmxKeys {
  Half *key_panels, *value_panels;
  HalfPairs key_pairs, value_pairs;
};

static void pack_keys_amx(const AmxProblem& p, int64_t batch, int64_t key_head, const AmxKeys& pack, int64_t task,
                          const HalfScratch& scratch) {
  const HalfSource key = p.keys(batch, key_head, p.deep_size), value = p.values(batch, key_head, p.deep_value_size);
  const int64_t panels = panels_of(p.call.keys), first = task * kPanelsOfTask,
                last = least(first + kPanelsOfTask, panels);
  for (int64_t panel = first; panel < last; ++panel) {
    if (pack.key_panels) pack_half_panel(key, panel, pack.key_panels + panel * kPanel * p.deep_size, scratch);
    if (pack.value_panels)
      pack_half_panel(value, panel, pack.value_panels + panel * kPanel * p.deep_value_size, scratch);
  }
  auto rows_of_task = [&](const HalfPairs& pairs) {
    return Range{first * kPanel, last == panels ? pairs.rows : last * kPanel};
  };
  if (pack.key_pairs.data) {  // see finite_keys in backward.h
    HalfSource finite = p.keys(batch, key_head, p.padded_size);
    finite.finite = true;
    pack_half_pairs(finite, rows_of_task(pack.key_pairs), 0, pack.key_pairs, scratch);
  }
  if (pack.value_pairs.data)
    pack_half_pairs(p.values(batch, key_head, p.padded_value_size), rows_of_task(pack.value_pairs), 0, pack.value_pairs,
                    scratch);
}

// What a query head of a batch element is multiplied with.
struct AmxHead {
  Head head;  // of its tables only where their rows lie
  AmxKeys keys;
  int64_t first_key, first_value;  // where the keys and the values begin
  const Half* panels[3];           // of its tables
  HalfPairs pairs[3];
  const float* bias;  // null: none
};

static AmxHead amx_head(const AmxProblem& p, const AmxTables& tables, const AmxKeys& keys, int64_t batch, int64_t index,
                        const Keys& visible) {
  AmxHead result = {};
  result.head.batch = batch;
  result.head.head = index;
  result.head.keys = visible;
  Table& table = result.head.rel_k;
  table.rows = p.call.rows;
  table.left = p.call.left;
  result.head.rel_q = result.head.rel_v = table;
  result.head.rel_q.left = p.call.right;  // it is packed reversed
  result.keys = keys;
  for (TableName name : kTables) {
    result.panels[name] = tables.panels[name].of(index);
    result.pairs[name] = {tables.pairs[name].of(index), tables.pair_rows};
  }
  result.bias = tables.bias.of(index);
  result.head.rel_v.nonfinite = *tables.nonfinite;
  return result;
}

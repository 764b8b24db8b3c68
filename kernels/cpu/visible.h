// Which keys a query may see: a contiguous range from causality, window and lengths, and within it what the masks hide.

struct Range {
  int64_t first, last;  // last is exclusive

  bool empty() const { return first >= last; }
};

// Of one batch element.
struct Keys {
  Range range;         // outside of it every key is hidden from all queries
  const float* holes;  // 0, or -inf for hidden keys; null: the range has none
  int64_t offset;      // position of query 0 relative to key 0
};

// `holes` has room for Lk floats, or is null if there is no key_mask.
static Keys visible_keys(const Call& call, int64_t batch, float* holes) {
  int64_t stop = call.keys, start = 0;
  if (call.key_lengths.data)
    stop = clamp<int64_t>(((const int64_t*)call.key_lengths.data)[batch * call.key_lengths.stride[0]], 0, stop);
  bool any_hole = false;
  if (call.key_mask.data) {
    const uint8_t* mask = (const uint8_t*)call.key_mask.data + batch * call.key_mask.stride[0];
    const int64_t stride = call.key_mask.stride[2];
    while (stop > 0 && !mask[(stop - 1) * stride]) --stop;
    while (start < stop && !mask[start * stride]) ++start;
    for (int64_t key = start; key < stop; ++key) {
      holes[key] = mask[key * stride] ? 0.0f : -kInfinity;
      any_hole |= !mask[key * stride];
    }
  }
  int64_t offset = call.query_offset;
  if (call.query_offsets.data)
    offset += ((const int64_t*)call.query_offsets.data)[batch * call.query_offsets.stride[0]];
  return {{start, stop}, any_hole ? holes : nullptr, offset};
}

// Keys within window and chunks of query `query`. Offsets and windows may be as large as 2^62, hence the wide sums.
INLINE Range window_of(const Call& call, const Keys& keys, int64_t query) {
  Range range = keys.range;
  const __int128 position = (__int128)query + keys.offset;
  auto from = [&](__int128 first) {
    if (first > range.first) range.first = first < range.last ? (int64_t)first : range.last;
  };
  auto up_to = [&](__int128 last) {
    if (last < range.last) range.last = last > range.first ? (int64_t)last : range.first;
  };
  if (call.has_window_left) from(position - call.window_left);
  if (call.has_window_right) up_to(position + call.window_right + 1);
  if (call.chunk_size) {
    const __int128 before = (position + call.first_key) % call.chunk_size,
                   start = position - (before < 0 ? before + call.chunk_size : before);  // of its own chunk
    if (call.chunk_left >= 0) from(start - (__int128)call.chunk_left * call.chunk_size);
    up_to(start + call.chunk_size);
  }
  return range;
}

// What rows [first, last) of queries may see together: windows and chunks move to the right with the query.
INLINE Range window_of(const Call& call, const Keys& keys, int64_t first, int64_t last) {
  return {window_of(call, keys, first).first, window_of(call, keys, last - 1).last};
}

// The query's position as the tables see it. Farther away everything clamps to the edge rows, as it does at kFar.
INLINE int64_t table_position(const Keys& keys, int64_t query) {
  constexpr int64_t kFar = (int64_t)1 << 40;
  return clamp(keys.offset, -kFar, kFar) + query;
}

INLINE float hidden_from(int64_t dtype) {  // as relattn.arguments.hidden_from
  switch (dtype) {
    case kFloat32:
      return -1.7014117331926443e38f;
    case kBFloat16:
      return -1.6947656946257677e38f;
    default:
      return -32752.0f;
  }
}

// Add attn_mask to one row's scores of these keys, -inf where it hides. `row` has room for as many floats.
static void apply_attn_mask(const Matrix& mask, int64_t query, const Range& keys, float* scores, float* row) {
  const int64_t start = mask.first + query * mask.row + keys.first * mask.column;
  const int64_t stride = mask.column, count = keys.last - keys.first;
  if (mask.dtype == kBool) {
    const uint8_t* seen = (const uint8_t*)mask.data + start;
    if (stride == 1) {
      for (int64_t key = 0; key < count; ++key) scores[key] = seen[key] ? scores[key] : -kInfinity;
    } else {
      for (int64_t key = 0; key < count; ++key) scores[key] = seen[key * stride] ? scores[key] : -kInfinity;
    }
    return;
  }
  const float hidden = hidden_from(mask.dtype);
  const float* added = row;
  if (mask.dtype == kFloat32 && stride == 1) {
    added = (const float*)mask.data + start;
  } else if (stride == 0) {
    fill(row, read_element(mask.data, mask.dtype, start), count);
  } else {
    read_row(mask.data, mask.dtype, start, stride, count, row);
  }
  for (int64_t key = 0; key < count; ++key) {
    const float sum = scores[key] + added[key] * (float)kLog2E;
    scores[key] = added[key] <= hidden ? -kInfinity : sum;
  }
}

// Whether attn_mask hides all of these keys from all of these queries. Looks no further than the first that is seen.
static bool attn_mask_hides(const Matrix& mask, const Range& queries, const Range& keys) {
  // Rows or columns that lie in the same memory are looked at once.
  const int64_t last_query = mask.row == 0 ? queries.first + 1 : queries.last,
                last_key = mask.column == 0 ? keys.first + 1 : keys.last;
  const float hidden = mask.dtype == kBool ? 0.0f : hidden_from(mask.dtype);
  for (int64_t query = queries.first; query < last_query; ++query) {
    const int64_t start = mask.first + query * mask.row;
    for (int64_t key = keys.first; key < last_key; ++key) {
      const int64_t index = start + key * mask.column;
      if (mask.dtype == kBool ? ((const uint8_t*)mask.data)[index] != 0
                              : !(read_element(mask.data, mask.dtype, index) <= hidden))
        return false;
    }
  }
  return true;
}

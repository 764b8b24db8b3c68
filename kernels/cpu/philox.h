// Dropout's random numbers: Philox4x32-7 with the counters of relattn/philox.py, so that every backend drops the same
// weights. (Salmon, Moraes, Dror and Shaw, SC 2011.)

struct Dropout {
  uint64_t threshold;  // a weight is kept where its random word is at least this; 0: no dropout
  uint32_t key0, key1;
  float kept_share;                                             // what sums of kept weights are divided by
  int64_t first_batch, first_head, first_query, first_quarter;  // of the call, where it is a part of another

  bool used() const { return threshold > 0; }
};

static Dropout make_dropout(const Call& call) {
  const double p = call.dropout_p;
  const double kept = 1.0 - p;
  return {(uint64_t)__builtin_nearbyint(p * 4294967296.0),
          (uint32_t)call.seed,
          (uint32_t)((uint64_t)call.seed >> 32),
          kept > 0 ? (float)kept : 1.0f,
          call.first_batch,
          call.first_head,
          call.first_query,
          call.first_key / 4};
}

// 1 or 0 for each of the keys [first, last), at to[0 ...]. Whole counters are written: up to 3 elements before, and 66
// after.
constexpr int64_t kKeepBefore = 16, kKeepAfter = 80;
static void dropout_keep(const Dropout& dropout, int64_t batch, int64_t head, int64_t query, int64_t first,
                         int64_t last, float* to) {
  constexpr int kLanes = 16;  // counters at a time
  float* out = to - (first & 3);
  for (int64_t quarter = first >> 2; quarter * 4 < last; quarter += kLanes, out += 4 * kLanes) {
    uint32_t w0[kLanes], w1[kLanes], w2[kLanes], w3[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      w0[lane] = (uint32_t)(dropout.first_batch + batch);
      w1[lane] = (uint32_t)(dropout.first_head + head);
      w2[lane] = (uint32_t)(dropout.first_query + query);
      w3[lane] = (uint32_t)(dropout.first_quarter + quarter + lane);
    }
    uint32_t key0 = dropout.key0, key1 = dropout.key1;
    for (int round = 0; round < 7; ++round) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t product0 = (uint64_t)w0[lane] * 0xD2511F53u, product1 = (uint64_t)w2[lane] * 0xCD9E8D57u;
        w0[lane] = (uint32_t)(product1 >> 32) ^ w1[lane] ^ key0;
        w2[lane] = (uint32_t)(product0 >> 32) ^ w3[lane] ^ key1;
        w1[lane] = (uint32_t)product1;
        w3[lane] = (uint32_t)product0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      out[4 * lane] = w0[lane] >= dropout.threshold ? 1.0f : 0.0f;
      out[4 * lane + 1] = w1[lane] >= dropout.threshold ? 1.0f : 0.0f;
      out[4 * lane + 2] = w2[lane] >= dropout.threshold ? 1.0f : 0.0f;
      out[4 * lane + 3] = w3[lane] >= dropout.threshold ? 1.0f : 0.0f;
    }
  }
}

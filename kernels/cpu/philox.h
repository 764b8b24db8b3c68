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

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;

// keep_of_counters: 1 or 0 for each of the 4 * kCounters keys from 4 * quarter on, four keys a counter.
#if defined(__AVX2__)
constexpr int kCounters = kWidth;
typedef uint64_t LongVec __attribute__((vector_size(4 * kWidth)));

INLINE UVec splat_word(uint32_t word) { return word - (UVec){}; }

#if defined(__AVX512F__)
INLINE LongVec multiply_even(LongVec a, UVec b) { return (LongVec)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
INLINE UVec even_odd(LongVec a, LongVec b) { return (UVec)_mm512_mask_blend_epi32(0xAAAA, (__m512i)a, (__m512i)b); }
INLINE Vec interleave_low(Vec a, Vec b) { return (Vec)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
INLINE Vec interleave_high(Vec a, Vec b) { return (Vec)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
#else
INLINE LongVec multiply_even(LongVec a, UVec b) { return (LongVec)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
INLINE UVec even_odd(LongVec a, LongVec b) { return (UVec)_mm256_blend_epi32((__m256i)a, (__m256i)b, 0xAA); }
INLINE Vec interleave_low(Vec a, Vec b) { return (Vec)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
INLINE Vec interleave_high(Vec a, Vec b) { return (Vec)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
#endif

// Each lane's product, in two halves. The instruction multiplies the lanes 0, 2, 4 ...
INLINE UVec multiply(UVec a, UVec b, UVec& high) {
  const LongVec even = multiply_even((LongVec)a, b), odd = multiply_even((LongVec)a >> 32, b);
  high = even_odd(even >> 32, odd);
  return even_odd(even, odd << 32);
}

INLINE void keep_of_counters(const Dropout& dropout, uint32_t batch, uint32_t head, uint32_t query, uint32_t quarter,
                             float* to) {
  // Of each group of four lanes the counters lie kWidth / 4 apart: then results that are transposed within these
  // groups, which instructions can do, lie in order.
  UVec w0 = splat_word(batch), w1 = splat_word(head), w2 = splat_word(query), w3 = splat_word(quarter);
  for (int lane = 0; lane < kWidth; ++lane) w3[lane] += lane % 4 * (kWidth / 4) + lane / 4;
  for (int round = 0; round < kRounds; ++round) {
    UVec high0, high1;
    const UVec low0 = multiply(w0, splat_word(kMultiplier0), high0);
    const UVec low1 = multiply(w2, splat_word(kMultiplier1), high1);
    w0 = high1 ^ w1 ^ splat_word(dropout.key0 + round * kKeyStep0);
    w2 = high0 ^ w3 ^ splat_word(dropout.key1 + round * kKeyStep1);
    w1 = low1;
    w3 = low0;
  }
  const UVec dropped = splat_word((uint32_t)(dropout.threshold - 1));  // the highest word of a dropped weight
  const Vec one = splat(1.0f), keep0 = keep_where((IVec)(w0 > dropped), one),
            keep1 = keep_where((IVec)(w1 > dropped), one), keep2 = keep_where((IVec)(w2 > dropped), one),
            keep3 = keep_where((IVec)(w3 > dropped), one);
  // Interleaved twice, that is a transposition.
  const Vec low02 = interleave_low(keep0, keep2), high02 = interleave_high(keep0, keep2);
  const Vec low13 = interleave_low(keep1, keep3), high13 = interleave_high(keep1, keep3);
  store(to, interleave_low(low02, low13));
  store(to + kWidth, interleave_high(low02, low13));
  store(to + 2 * kWidth, interleave_low(high02, high13));
  store(to + 3 * kWidth, interleave_high(high02, high13));
}
#else  // for ARM: compilers make umull of these products and st4 of these stores
constexpr int kCounters = 16;
INLINE void keep_of_counters(const Dropout& dropout, uint32_t batch, uint32_t head, uint32_t query, uint32_t quarter,
                             float* to) {
  uint32_t w0[kCounters], w1[kCounters], w2[kCounters], w3[kCounters];
  for (int lane = 0; lane < kCounters; ++lane) {
    w0[lane] = batch;
    w1[lane] = head;
    w2[lane] = query;
    w3[lane] = quarter + lane;
  }
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t key0 = dropout.key0 + round * kKeyStep0, key1 = dropout.key1 + round * kKeyStep1;
    for (int lane = 0; lane < kCounters; ++lane) {
      const uint64_t product0 = (uint64_t)w0[lane] * kMultiplier0, product1 = (uint64_t)w2[lane] * kMultiplier1;
      w0[lane] = (uint32_t)(product1 >> 32) ^ w1[lane] ^ key0;
      w2[lane] = (uint32_t)(product0 >> 32) ^ w3[lane] ^ key1;
      w1[lane] = (uint32_t)product1;
      w3[lane] = (uint32_t)product0;
    }
  }
  for (int lane = 0; lane < kCounters; ++lane) {
    to[4 * lane] = w0[lane] >= dropout.threshold ? 1.0f : 0.0f;
    to[4 * lane + 1] = w1[lane] >= dropout.threshold ? 1.0f : 0.0f;
    to[4 * lane + 2] = w2[lane] >= dropout.threshold ? 1.0f : 0.0f;
    to[4 * lane + 3] = w3[lane] >= dropout.threshold ? 1.0f : 0.0f;
  }
}
#endif

// 1 or 0 for each of the keys [first, last), at to[0 ...]. Whole groups of counters are written: up to 3 elements
// before it, and fewer than a group's after.
constexpr int64_t kKeepBefore = 16, kKeepAfter = 4 * kCounters;
static void dropout_keep(const Dropout& dropout, int64_t batch, int64_t head, int64_t query, int64_t first,
                         int64_t last, float* to) {
  to -= first & 3;
  for (int64_t quarter = first >> 2; quarter * 4 < last; quarter += kCounters, to += 4 * kCounters)
    keep_of_counters(dropout, (uint32_t)(dropout.first_batch + batch), (uint32_t)(dropout.first_head + head),
                     (uint32_t)(dropout.first_query + query), (uint32_t)(dropout.first_quarter + quarter), to);
}

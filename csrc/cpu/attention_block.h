// A block of keys meets a chunk of queries: the two products, masks and softmax of attention.h, and how their factors lie in scratch.

constexpr int LANES = 64;
constexpr int KEYS = 64;   // keys of a block
constexpr int CHAIN = 64;  // products added up before they meet the rest of a score: shorter chains lose fewer bits
constexpr int ROUND = 16;  // K is rounded up to a multiple of this in scratch: what register blocks may overrun

// Rows that are broadcast against QV vectors of queries: enough independent sums to hide the latency of FMA, within the registers.
template <int QV>
constexpr int BROADCAST = W < 16 ? 4 : QV == 1 ? 16 : QV <= 3 ? 8 : 4;

constexpr int VECTORS = LANES / W;
constexpr int CHUNKS = 8;  // at most so many share the keys and values that were packed

struct Block {  // scratch of one thread: a block of keys, and what LANES lanes make of it
    float* k;       // [KEYS, Kp] words, Kp = K rounded up; columns beyond K hold anything
    float* v;       // [KEYS, Kp] words, two keys in one where L has two
    float* s;       // [KEYS, LANES] scores, then weights in words
    float* shrink;  // [LANES] what the block's new largest score does to earlier sums
    int64_t Kp;
};

struct Chunk {  // scratch of one thread for LANES lanes
    float* q;         // [K, LANES] words, each one element or (AVX512-BF16) two: layout L says
    float* o;         // [Kp, LANES] weighted sum of values so far
    float* top;       // [LANES] largest score so far, in units of log2
    float* total;     // [LANES] sum of weights so far
    float* position;  // [LANES] of the query
    float* row;       // [LANES] start of the head's row of the bias table
    int64_t lowest[VECTORS], highest[VECTORS];  // position of a vector
    bool more[VECTORS];                         // some block has been added to the vector's o
    int vectors;                                // in use
};

static inline int64_t chunk_floats(int64_t Kp) { return (2 * Kp + 4) * LANES; }

// The keys or values of one text and head, by position: its prefix, then its own.
template <class T>
struct Source {
    const T *prefix, *own;
    int64_t prefix_stride, own_stride, shared;  // `shared` positions are the prefix
    int64_t ahead;  // to what is fetched ahead, as rows are too far apart for the hardware to guess: the next block, or of short texts
                    // the next head, which the thread takes next

    const T* row(int64_t position) const {
        return position < shared ? prefix + position * prefix_stride : own + (position - shared) * own_stride;
    }
};

template <class T>
static inline Source<T> source(const HeadRows& prefix, int64_t prefix_row, int64_t shared, const HeadRows& own, int64_t own_row,
                               int64_t g, bool many) {
    const T* at = shared == 0 ? nullptr : (const T*)prefix.data + prefix_row * prefix.token_stride + g * prefix.head_stride;
    const T* mine = (const T*)own.data + own_row * own.token_stride + g * own.head_stride;
    return Source<T>{at, mine, prefix.token_stride, own.token_stride, shared, many ? KEYS * own.token_stride : own.head_stride};
}

template <class L, class T>
static inline void pack_keys(const Source<T>& from, int64_t first, int64_t count, int64_t K, float* to, int64_t Kp) {
    for (int64_t j = 0; j < count; ++j, to += Kp) {
        const T* row = from.row(first + j);
        for (int64_t i = 0; i < K / L::PER_WORD; i += W) {
            __builtin_prefetch(row + i * L::PER_WORD + from.ahead);
            store_row(to, i, Kp, L::words(row, i, K));
        }
    }
}

template <class L, class T>
static inline void pack_values(const Source<T>& from, int64_t first, int64_t count, int64_t K, float* to, int64_t Kp) {
    for (int64_t j = 0; j < count; j += L::PER_WORD, to += Kp) {
        const T* row = from.row(first + j);
        const T* next = j + 1 < count ? from.row(first + j + 1) : nullptr;  // an odd last key is paired with zeros
        for (int64_t d = 0; d < K; d += W) {
            __builtin_prefetch(row + d + from.ahead);
            V v = load_row(row, d, K);
            if constexpr (L::PER_WORD == 2) {
                if (next) __builtin_prefetch(next + d + from.ahead);
                v = L::merge(v, next ? load_row(next, d, K) : zero());
            }
            store_row(to, d, Kp, v);
        }
    }
}

// Sums over `count` words of x [count, LANES] times y, for BROADCAST rows of y and QV vectors of x; finish(row, vector, sum) takes each.
template <class L, int QV, class F>
static inline void products(const float* x, const float* y, int64_t row, int64_t word, int64_t count, const F& finish) {
    constexpr int R = BROADCAST<QV>;
    V sums[R][QV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) sums[r][i] = zero();
    for (int64_t d = 0; d < count; ++d) {
        V own[QV];
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) own[i] = load(x + d * LANES + i * W);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const V all = set1(y[r * row + d * word]);
#pragma GCC unroll 4
            for (int i = 0; i < QV; ++i) sums[r][i] = L::multiply_add(own[i], all, sums[r][i]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) finish(r * LANES + i * W, i * W, sums[r][i]);
}

// S[key][lane] = q . k over `count` words for BROADCAST keys and QV vectors of queries; added to what is there if `more`.
template <class L, int QV>
__attribute__((noinline)) static void score_block(const float* q, const float* k, int64_t count, int64_t Kp, bool more, float* s) {
    products<L, QV>(q, k, Kp, 1, count, [=](int at, int, V sum) { store(s + at, more ? load(s + at) + sum : sum); });
}

// O[d][lane] = O * shrink + P . V for BROADCAST dimensions and QV vectors of queries; O is not read unless there is `more`.
template <class L, int QV>
__attribute__((noinline)) static void value_block(const float* p, const float* v, int64_t count, int64_t Kp, const float* shrink,
                                                  bool more, float* o) {
    products<L, QV>(p, v, 1, Kp, count, [=](int at, int lane, V sum) {
        store(o + at, more ? fma(load(o + at), load(shrink + lane), sum) : sum);
    });
}

template <class L, int QV>
static inline void scores(const Chunk& c, const Block& b, int lane, int64_t count, int64_t K) {
    const int64_t words = K / L::PER_WORD;
    for (int64_t j = 0; j < count; j += BROADCAST<QV>) {
        float* s = b.s + j * LANES + lane;
        for (int64_t d = 0; d < words; d += CHAIN) {
            score_block<L, QV>(c.q + d * LANES + lane, b.k + j * b.Kp + d, least(CHAIN, words - d), b.Kp, d > 0, s);
        }
    }
}
template <class L, int QV>
static inline void values(const Chunk& c, const Block& b, int lane, int64_t count, int64_t K) {
    const int64_t words = (count + L::PER_WORD - 1) / L::PER_WORD;
    for (int64_t d = 0; d < K; d += BROADCAST<QV>) {
        value_block<L, QV>(b.s + lane, b.v + d, words, b.Kp, b.shrink + lane, c.more[lane / W], c.o + d * LANES + lane);
    }
}

constexpr float LOG2E = 1.44269504f;

// Scale, softcap and bias: raw products to scores in units of log2.
static inline void finish_scores(const AttentionParams& p, const Chunk& c, const Block& b, int from, int to, int64_t first, int64_t count) {
    const V scale = set1(p.softcap > 0 ? p.scale / p.softcap : p.scale * LOG2E), cap = set1(p.softcap * LOG2E);
    const V radius = set1(float(p.radius));
    for (int64_t j = 0; j < count; ++j) {
        for (int i = from; i < to; ++i) {
            float* at = b.s + j * LANES + i * W;
            const V distance = set1(float(first + j)) - load(c.position + i * W);
            V s = load(at) * scale;
            if (p.softcap > 0) s = tanh(s) * cap;
            if (p.bias) {
                const V column = min(radius, max(zero() - radius, distance)) + radius;
                s = fma(gather(p.bias, column + load(c.row + i * W)), set1(LOG2E), s);
            }
            store(at, s);
        }
    }
}

// Hides the keys whose position minus the query's is below `low` or above `high`. `first` is the position of s[0].
static inline void hide(const Chunk& c, float* s, int i, int64_t first, int64_t count, float low, float high) {
    const V hidden = set1(-__builtin_inff()), position = load(c.position + i * W);
    for (int64_t j = 0; j < count; ++j) {
        float* at = s + j * LANES;
        const V distance = set1(float(first + j)) - position;
        store(at, if_less(distance, set1(low), hidden, if_less(set1(high), distance, hidden, load(at))));
    }
}

// Scores to weights 2^(s * unit - largest), rounded to T before they meet V while their sum is not; updates top, total and shrink.
template <class L, class T>
static inline void weigh(const Chunk& c, const Block& b, int i, int64_t count, float unit) {
    const V units = set1(unit);
    float* s = b.s + i * W;
    V top = set1(-__builtin_inff());
    for (int64_t j = 0; j < count; ++j) top = max(top, load(s + j * LANES));
    const V before = load(c.top + i * W);
    top = max(before, top * units);  // rounded as each product below is, so that the largest one's exponent is exactly 0
    const V pivot = if_less(set1(-__builtin_inff()), top, top, zero());  // nothing seen yet: -inf - -inf would be NaN
    const V shrink = exp2_negative<float>(before - pivot);
    V sum = zero();
    const auto weight_of = [&](int64_t j) { return exp2_negative<T>(load(s + j * LANES) * units - pivot); };
    for (int64_t j = 0; j < count; j += L::PER_WORD) {
        const V weight = weight_of(j);
        sum = sum + weight;
        if constexpr (L::PER_WORD == 1) {
            store(s + j * LANES, round_to<T>(weight));
        } else {
            const V next = j + 1 < count ? weight_of(j + 1) : zero();
            sum = sum + next;
            store(s + j / 2 * LANES, L::round_pair(weight, next));
        }
    }
    store(c.top + i * W, top);
    store(b.shrink + i * W, shrink);
    store(c.total + i * W, fma(load(c.total + i * W), shrink, sum));
}

// What a call asks of every block.
struct Mask {
    int64_t left, right;  // -1: unlimited
    float low, high;
    bool plain;  // scaling is left to the exponential, in hidden blocks and others
};

// The keys of a block that vector i can see, as a count from the block's first; none if it is too far back.
static inline int64_t visible(const Chunk& c, const Mask& mask, int i, int64_t first, int64_t count) {
    if (mask.left >= 0 && first + count - 1 < c.lowest[i] - mask.left) return 0;
    return mask.right < 0 ? count : most(0, least(count, c.highest[i] + mask.right + 1 - first));
}

// A block of keys for QV vectors of queries, from the i-th on, that see `count` of them.
template <class T, class L, int QV>
__attribute__((noinline)) static void meet(const AttentionParams& p, Chunk& c, const Block& b, const Mask& mask, int i, int64_t first,
                                           int64_t count) {
    scores<L, QV>(c, b, i * W, count, p.K);
    if (!mask.plain) finish_scores(p, c, b, i, i + QV, first, count);
    for (int each = i; each < i + QV; ++each) {
        const bool all_left = mask.left < 0 || first >= c.highest[each] - mask.left;
        const int64_t clear = !all_left ? 0 : mask.right < 0 ? count : most(0, c.lowest[each] + mask.right + 1 - first);
        if (clear < count) hide(c, b.s + clear * LANES + each * W, each, first + clear, count - clear, mask.low, mask.high);
        weigh<L, T>(c, b, each, count, mask.plain ? p.scale * LOG2E : 1.0f);
    }
    values<L, QV>(c, b, i * W, count, p.K);
    for (int each = i; each < i + QV; ++each) c.more[each] = true;
}

// A block of keys for all vectors of a chunk: as many at a time as see about the same part of it, which is less work on a diagonal.
template <class T, class L>
static inline void meet_all(const AttentionParams& p, Chunk& c, const Block& b, const Mask& mask, int64_t first, int64_t count) {
    for (int i = 0, next; i < c.vectors; i = next) {
        const int64_t mine = visible(c, mask, i, first, count);
        int64_t seen = mine;
        for (next = i + 1; next < c.vectors && next < i + QMAX; ++next) {
            const int64_t other = visible(c, mask, next, first, count);
            if (other - mine > W / 2 || mine - other > W / 2 || c.more[next] != c.more[i]) break;
            seen = most(seen, other);
        }
        if (seen == 0) continue;
        switch (next - i) {
            case 1: meet<T, L, 1>(p, c, b, mask, i, first, seen); break;
            case 2: meet<T, L, 2>(p, c, b, mask, i, first, seen); break;
            case 3: meet<T, L, (QMAX > 2 ? 3 : 1)>(p, c, b, mask, i, first, seen); break;
            case 4: meet<T, L, (QMAX > 2 ? 4 : 1)>(p, c, b, mask, i, first, seen); break;
        }
    }
}

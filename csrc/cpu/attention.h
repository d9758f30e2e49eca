// Softmax attention within each sequence, in one pass over the keys (online softmax). Same contract as reference.attention.
//
// Queries lie across the lanes of a vector and keys and head dimensions are broadcast, so that nothing is ever summed across lanes:
// scores S[key][lane], then O[d][lane] += P[key][lane] * V[key][d]. A lane is one query of one head; the heads that share a key/value
// head share a chunk of LANES lanes. Since lanes never meet, keys come in blocks counted from the start of the sequence, and a hidden
// key adds exactly zero, a query's bits depend on its own sequence and position only: not on its tile, its neighbours or the threads.
//
// Work: 4 * K FLOPs per query and visible key, and about 15 instructions of softmax per 16 of them. Blocks no query of the tile can
// see are skipped.

constexpr int LANES = 64;
constexpr int KEYS = 64;    // keys of a block
constexpr int CHAIN = 64;   // products added up before they meet the rest of a score: shorter chains lose fewer bits
constexpr int ROUND = 8;    // K is rounded up to a multiple of this in scratch: what register blocks may overrun

// Rows that are broadcast against QV vectors of queries: enough independent sums to hide the latency of FMA, within the registers.
template <int QV>
constexpr int BROADCAST = QV <= 2 && W == 16 ? 8 : 4;

struct Chunk {       // scratch of one thread while it works on LANES lanes
    float* q;        // [K, LANES] words, each one element or (AVX512-BF16) two: layout L says
    float* k;        // [KEYS, Kp] words, Kp = K rounded up; columns beyond K hold anything
    float* v;        // [KEYS, Kp] words, two keys in one where L has two
    float* s;        // [KEYS, LANES] scores, then weights in words
    float* o;        // [Kp, LANES] weighted sum of values so far
    float* top;      // [LANES] largest score so far, in units of log2
    float* total;    // [LANES] sum of weights so far
    float* shrink;   // [LANES] what the block's new largest score does to earlier sums
    float* position; // [LANES] of the query
    float* row;      // [LANES] start of the head's row of the bias table
    int64_t Kp;
    int vectors;     // in use, LANES / W at most
    bool more;       // some block has been added to o
};

static inline Chunk chunk_scratch(int64_t K) {
    Chunk c{};
    c.Kp = (K + ROUND - 1) / ROUND * ROUND;
    float* at = scratch((2 * c.Kp + KEYS + 5) * LANES + 2 * KEYS * c.Kp);
    c.q = at;
    c.k = c.q + c.Kp * LANES;
    c.v = c.k + KEYS * c.Kp;
    c.s = c.v + KEYS * c.Kp;
    c.o = c.s + KEYS * LANES;
    c.top = c.o + c.Kp * LANES;
    c.total = c.top + LANES;
    c.shrink = c.total + LANES;
    c.position = c.shrink + LANES;
    c.row = c.position + LANES;
    return c;
}

// The keys or values of one text and head, by position: its prefix, then its own.
template <class T>
struct Source {
    const T *prefix, *own;
    int64_t prefix_stride, own_stride, shared;  // `shared` positions are the prefix
    int64_t ahead;  // to the next head, which is fetched ahead: rows are too far apart for the hardware to guess

    const T* row(int64_t position) const {
        return position < shared ? prefix + position * prefix_stride : own + (position - shared) * own_stride;
    }
};

template <class T>
static inline Source<T> source(const HeadRows& prefix, int64_t prefix_row, int64_t shared, const HeadRows& own, int64_t own_row,
                               int64_t g) {
    const T* at = shared == 0 ? nullptr : (const T*)prefix.data + prefix_row * prefix.token_stride + g * prefix.head_stride;
    const T* mine = (const T*)own.data + own_row * own.token_stride + g * own.head_stride;
    return Source<T>{at, mine, prefix.token_stride, own.token_stride, shared, own.head_stride};
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

// S[key][lane] = q . k over `count` words for BROADCAST keys and QV vectors of queries; added to what is there if `more`.
template <class L, int QV>
static inline void score_block(const float* q, const float* k, int64_t count, int64_t Kp, bool more, float* s) {
    constexpr int R = BROADCAST<QV>;
    V acc[R][QV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) acc[r][i] = zero();
    for (int64_t d = 0; d < count; ++d) {
        V x[QV];
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) x[i] = load(q + d * LANES + i * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const V y = set1(k[r * Kp + d]);
#pragma GCC unroll 4
            for (int i = 0; i < QV; ++i) acc[r][i] = L::multiply_add(x[i], y, acc[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) {
            float* at = s + r * LANES + i * W;
            store(at, more ? load(at) + acc[r][i] : acc[r][i]);
        }
}

// O[d][lane] = O * shrink + P . V for BROADCAST dimensions and QV vectors of queries; O is not read unless there is `more`.
template <class L, int QV>
static inline void value_block(const float* p, const float* v, int64_t count, int64_t Kp, const float* shrink, bool more, float* o) {
    constexpr int R = BROADCAST<QV>;
    V acc[R][QV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) acc[r][i] = zero();
    for (int64_t j = 0; j < count; ++j) {
        V x[QV];
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) x[i] = load(p + j * LANES + i * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const V y = set1(v[j * Kp + r]);
#pragma GCC unroll 4
            for (int i = 0; i < QV; ++i) acc[r][i] = L::multiply_add(x[i], y, acc[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < QV; ++i) {
            float* at = o + r * LANES + i * W;
            store(at, more ? fma(load(at), load(shrink + i * W), acc[r][i]) : acc[r][i]);
        }
}

template <class L, int QV>
static inline void scores(const Chunk& c, int lane, int64_t count, int64_t K) {
    const int64_t words = K / L::PER_WORD;
    for (int64_t j = 0; j < count; j += BROADCAST<QV>) {
        float* s = c.s + j * LANES + lane;
        for (int64_t d = 0; d < words; d += CHAIN) {
            score_block<L, QV>(c.q + d * LANES + lane, c.k + j * c.Kp + d, least(CHAIN, words - d), c.Kp, d > 0, s);
        }
    }
}
template <class L, int QV>
static inline void values(const Chunk& c, int lane, int64_t count, int64_t K) {
    const int64_t words = (count + L::PER_WORD - 1) / L::PER_WORD;
    for (int64_t d = 0; d < K; d += BROADCAST<QV>) {
        value_block<L, QV>(c.s + lane, c.v + d, words, c.Kp, c.shrink + lane, c.more, c.o + d * LANES + lane);
    }
}

// Calls scores or values for all vectors in use, QMAX at a time.
#define PYEMBED_FOR_LANES(FUNCTION)                                             \
    for (int i = 0; i < c.vectors; i += QMAX) {                                 \
        switch (least(QMAX, c.vectors - i)) {                                   \
            case 1: FUNCTION<L, 1>(c, i * W, count, K); break;                  \
            case 2: FUNCTION<L, 2>(c, i * W, count, K); break;                  \
            case 3: FUNCTION<L, (QMAX > 2 ? 3 : 1)>(c, i * W, count, K); break; \
            case 4: FUNCTION<L, (QMAX > 2 ? 4 : 1)>(c, i * W, count, K); break; \
        }                                                                       \
    }
template <class L>
static inline void all_scores(const Chunk& c, int64_t count, int64_t K) { PYEMBED_FOR_LANES(scores) }
template <class L>
static inline void all_values(const Chunk& c, int64_t count, int64_t K) { PYEMBED_FOR_LANES(values) }
#undef PYEMBED_FOR_LANES

constexpr float LOG2E = 1.44269504f;

// Scale, softcap and bias: raw products to scores in units of log2.
static inline void finish_scores(const AttentionParams& p, const Chunk& c, int64_t first, int64_t count) {
    const V scale = set1(p.softcap > 0 ? p.scale / p.softcap : p.scale * LOG2E), cap = set1(p.softcap * LOG2E);
    const V radius = set1(float(p.radius));
    for (int64_t j = 0; j < count; ++j) {
        for (int i = 0; i < c.vectors; ++i) {
            float* at = c.s + j * LANES + i * W;
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

// Hides the keys whose position minus the query's is below `low` or above `high`.
static inline void hide(const Chunk& c, int64_t first, int64_t count, float low, float high) {
    const V hidden = set1(-__builtin_inff());
    for (int64_t j = 0; j < count; ++j) {
        for (int i = 0; i < c.vectors; ++i) {
            float* at = c.s + j * LANES + i * W;
            const V distance = set1(float(first + j)) - load(c.position + i * W);
            store(at, if_less(distance, set1(low), hidden, if_less(set1(high), distance, hidden, load(at))));
        }
    }
}

// Scores to weights 2^(s * unit - largest), rounded to T before they meet V while their sum is not; updates top, total and shrink.
template <class L, class T>
static inline void weigh(const Chunk& c, int64_t count, float unit) {
    const V units = set1(unit);
    for (int i = 0; i < c.vectors; ++i) {
        float* s = c.s + i * W;
        V top = set1(-__builtin_inff());
        for (int64_t j = 0; j < count; ++j) top = max(top, load(s + j * LANES));
        const V before = load(c.top + i * W);
        top = max(before, top * units);  // rounded as each product below is, so that the largest one's exponent is exactly 0
        const V pivot = if_less(set1(-__builtin_inff()), top, top, zero());  // nothing seen yet: -inf - -inf would be NaN
        const V shrink = exp2_negative(before - pivot);
        V sum = zero();
        for (int64_t j = 0; j < count; j += L::PER_WORD) {
            const V weight = exp2_negative(load(s + j * LANES) * units - pivot);
            sum = sum + weight;
            if constexpr (L::PER_WORD == 1) {
                store(s + j * LANES, round_to<T>(weight));
            } else {
                const V next = j + 1 < count ? exp2_negative(load(s + (j + 1) * LANES) * units - pivot) : zero();
                sum = sum + next;
                store(s + j / 2 * LANES, L::round_pair(weight, next));
            }
        }
        store(c.top + i * W, top);
        store(c.shrink + i * W, shrink);
        store(c.total + i * W, fma(load(c.total + i * W), shrink, sum));
    }
}

// The queries of a tile, a group of heads at a time: lane after lane goes through the queries of one head, then of the next.
struct Span {
    int64_t token;     // row of q and out of the tile's first query
    int64_t queries;   // of the tile
    int64_t position;  // of the tile's first query
    int64_t query, head;  // of the chunk's first lane; `query` counts from the tile's first
    int64_t lanes;        // of the chunk

    void step() {
        if (++query == queries) {
            query = 0;
            ++head;
        }
    }
};

template <class L, class T>
static inline void load_queries(const AttentionParams& p, Span at, const Chunk& c) {
    const T* from[LANES];
    for (int64_t l = 0; l < c.vectors * W; ++l) {
        from[l] = (const T*)p.q.data + (at.token + at.query) * p.q.token_stride + at.head * p.q.head_stride;
        c.position[l] = float(at.position + at.query);
        c.row[l] = float(at.head * (2 * p.radius + 1));
        if (l + 1 < at.lanes) at.step();  // idle lanes repeat the last
    }
    for (int i = 0; i < c.vectors; ++i) {
        const int64_t words = p.K / L::PER_WORD;
        for (int64_t d = 0; d < words; d += W) {
            V rows[W];
            for (int l = 0; l < W; ++l) {
                __builtin_prefetch(from[i * W + l] + d * L::PER_WORD + p.q.head_stride);
                rows[l] = L::words(from[i * W + l], d, p.K);
            }
            transpose(rows);
            for (int64_t r = 0; r < least(W, words - d); ++r) store(c.q + (d + r) * LANES + i * W, rows[r]);
        }
    }
}

template <class T>
static inline void store_queries(const AttentionParams& p, Span at, const Chunk& c) {
    for (int i = 0; i < c.vectors; ++i) {
        const V total = load(c.total + i * W);
        const V inverse = set1(1.0f) / if_less(zero(), total, total, total + set1(1.0f));  // no key seen: 0 / 1
        T* to[W];
        const int64_t used = least(W, at.lanes - i * W);
        for (int64_t l = 0; l < used; ++l, at.step()) to[l] = (T*)p.out + ((at.token + at.query) * p.H + at.head) * p.K;
        for (int64_t d = 0; d < p.K; d += W) {
            V rows[W];
            for (int64_t r = 0; r < W; ++r) rows[r] = d + r < p.K ? load(c.o + (d + r) * LANES + i * W) * inverse : zero();
            transpose(rows);
            for (int64_t l = 0; l < used; ++l) store_row(to[l], d, p.K, round_to<T>(rows[l]));
        }
    }
}

template <class T, class L>
static void attend(const AttentionParams& p, int64_t n, int64_t tile, int64_t g) {
    const int64_t own = p.cu_k[n + 1] - p.cu_k[n], all_queries = p.cu_q[n + 1] - p.cu_q[n];
    const int64_t which = p.prefix_k.data ? p.prefix_of[n] : -1;
    const int64_t prefix_row = which < 0 ? 0 : p.cu_p[which], shared = which < 0 ? 0 : p.cu_p[which + 1] - prefix_row;
    const int64_t length = shared + own, start = p.q_start ? p.q_start[n] : length - all_queries;
    const int64_t group = p.H / p.G, skipped = tile * QUERY_TILE;

    Span span{};
    span.token = p.cu_q[n] + skipped;
    span.queries = least(QUERY_TILE, all_queries - skipped);
    span.query = 0;
    span.head = g * group;
    span.position = start + skipped;
    const int64_t last = span.position + span.queries - 1;
    const int64_t right = p.causal ? 0 : p.right;
    const int64_t seen_from = p.left < 0 ? 0 : most(0, span.position - p.left) / 2 * 2;  // even: the same keys make a pair in every tile
    const int64_t seen_to = right < 0 ? length : least(length, last + right + 1);
    const float low = p.left < 0 ? -__builtin_inff() : float(-p.left), high = right < 0 ? __builtin_inff() : float(right);
    const bool plain = p.softcap == 0 && !p.bias && p.scale > 0;  // then scaling is left to the exponential, in hidden blocks and others

    const Source<T> keys = source<T>(p.prefix_k, prefix_row, shared, p.k, p.cu_k[n], g);
    const Source<T> rows = source<T>(p.prefix_v, prefix_row, shared, p.v, p.cu_k[n], g);
    Chunk c = chunk_scratch(p.K);
    for (int64_t left = group * span.queries; left > 0; left -= LANES) {
        span.lanes = least(LANES, left);
        c.vectors = int((span.lanes + W - 1) / W);
        load_queries<L, T>(p, span, c);
        if (seen_from >= seen_to) {
            for (int64_t i = 0; i < c.Kp * LANES; i += W) store(c.o + i, zero());
        }
        for (int i = 0; i < LANES; i += W) {
            store(c.top + i, set1(-__builtin_inff()));
            store(c.total + i, zero());
        }
        for (int64_t first = seen_from, end; first < seen_to; first = end) {
            end = least(seen_to, (first / KEYS + 1) * KEYS);
            const int64_t count = end - first;
            pack_keys<L>(keys, first, count, p.K, c.k, c.Kp);
            pack_values<L>(rows, first, count, p.K, c.v, c.Kp);
            all_scores<L>(c, count, p.K);
            if (!plain) finish_scores(p, c, first, count);
            const bool partly = (p.left >= 0 && first < last - p.left) || (right >= 0 && end - 1 > span.position + right);
            if (partly) hide(c, first, count, low, high);
            weigh<L, T>(c, count, plain ? p.scale * LOG2E : 1.0f);
            c.more = first > seen_from;
            all_values<L>(c, count, p.K);
        }
        store_queries<T>(p, span, c);
        for (int64_t l = 0; l < span.lanes; ++l) span.step();
    }
}

template <class T, class L>
static void attend_all(const AttentionParams& p) {
    // a thread takes the heads of a tile together where there are tiles enough: their rows are neighbours in memory
    const int64_t items = p.num_tiles * p.G, together = most(1, least(p.G, items / (p.threads * 16)));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, together)
    for (int64_t item = 0; item < items; ++item) {
        const int32_t* entry = p.tiles + 2 * (item / p.G);
        attend<T, L>(p, entry[0], entry[1], item % p.G);
    }
}

static void attention(const AttentionParams& p) {
    ran(ISA);
    if (p.dtype == Dtype::f32) {
        attend_all<float, Singles<float>>(p);
    } else if (p.K % Narrow::PER_WORD == 0) {
        attend_all<bf16, Narrow>(p);
    } else {
        attend_all<bf16, Singles<bf16>>(p);
    }
}

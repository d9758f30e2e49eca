// Softmax attention within each sequence, in one pass over the keys (online softmax). Same contract as reference.attention.
//
// Queries lie across the lanes of a vector and keys and head dimensions are broadcast, so that nothing is ever summed across lanes:
// scores S[key][lane], then O[d][lane] += P[key][lane] * V[key][d]. A lane is one query of one head; the heads that share a key/value
// head share a chunk of LANES lanes. Since lanes never meet, keys come in blocks counted from the start of the sequence, and a hidden
// key adds exactly zero, a query's bits depend on its own sequence and position only: not on its tile, its neighbours or the threads.
//
// Work: 4 * K FLOPs per query and visible key, and about 20 instructions of softmax per 16 of them. Blocks that nobody in a
// chunk can see are skipped, and on a diagonal each vector of queries goes only as far as it sees. This file has the chunks of a text and
// who does them; attention_block.h is a chunk and a block of keys.

#include "attention_block.h"

// The queries of a tile, a group of heads at a time: lane after lane goes through the queries of one head, then of the next.
struct Span {
    int64_t token;     // row of q and out of the tile's first query
    int64_t queries;   // of the tile
    int64_t position;  // of the tile's first query
    int64_t query, head;  // of the chunk's first lane; `query` counts from the tile's first
    int64_t lanes;        // of the chunk

    // f(first, count) for each run of the next `count` lanes that belong to one head; goes beyond them.
    template <class F>
    void walk(int64_t count, const F& f) {
        for (int64_t lane = 0, run; lane < count; lane += run) {
            run = least(count - lane, queries - query);
            f(lane, run);
            query += run;
            if (query == queries) {
                query = 0;
                ++head;
            }
        }
    }
};

template <class L, class T>
static inline void load_queries(const AttentionParams& p, Span at, Chunk& c) {
    const int64_t words = p.K / L::PER_WORD, idle = (W - at.lanes % W) % W;
    c.vectors = int((at.lanes + idle) / W);
    for (int i = 0; i < c.vectors; ++i) {
        const int64_t end = at.query + (i + 1 < c.vectors ? W : W - idle);  // beyond the last query: some lanes are the next head's
        c.lowest[i] = at.position + (end <= at.queries ? at.query : 0);
        c.highest[i] = at.position + least(end, at.queries) - 1;
        c.more[i] = false;
        store(c.top + i * W, set1(-__builtin_inff()));
        store(c.total + i * W, zero());
        const T* from[W];
        float *position = c.position + i * W, *row = c.row + i * W;
        const int64_t used = least(W, at.lanes - i * W);
        at.walk(used, [&](int64_t lane, int64_t count) {
            const T* q = (const T*)p.q.data + (at.token + at.query) * p.q.token_stride + at.head * p.q.head_stride;
            for (int64_t l = 0; l < count; ++l, q += p.q.token_stride) {
                from[lane + l] = q;
                position[lane + l] = float(at.position + at.query + l);
                row[lane + l] = float(at.head * (2 * p.radius + 1));
            }
        });
        for (int64_t l = used; l < W; ++l) {  // idle lanes repeat the last
            from[l] = from[used - 1];
            position[l] = position[used - 1];
            row[l] = row[used - 1];
        }
        for (int64_t d = 0; d < words; d += W) {
            V rows[W];
#pragma GCC unroll 16
            for (int l = 0; l < W; ++l) {
                __builtin_prefetch(from[l] + d * L::PER_WORD + p.q.head_stride);
                rows[l] = L::words(from[l], d, p.K);
            }
            transpose(rows);
            for (int64_t r = 0; r < least(W, words - d); ++r) store(c.q + (d + r) * LANES + i * W, rows[r]);
        }
    }
}

template <class L, class T>
static inline void store_queries(const AttentionParams& p, Span at, const Chunk& c) {
    for (int i = 0; i < c.vectors; ++i) {
        const V total = load(c.total + i * W);
        const V inverse = set1(1.0f) / if_less(zero(), total, total, total + set1(1.0f));  // no key seen: 0 / 1
        for (int64_t d = 0; !c.more[i] && d < p.K; ++d) store(c.o + d * LANES + i * W, zero());
        T* to[W];
        const int64_t used = least(W, at.lanes - i * W);
        at.walk(used, [&](int64_t lane, int64_t count) {
            T* row = (T*)p.out + ((at.token + at.query) * p.H + at.head) * p.K;
            for (int64_t l = 0; l < count; ++l) to[lane + l] = row + l * p.H * p.K;
        });
        const auto result = [&](int64_t d) { return load(c.o + d * LANES + i * W) * inverse; };
        if constexpr (L::PER_WORD == 2) {  // pairs are rounded into words, of which half as many are transposed and stored
            int64_t d = 0;
            for (V rows[W]; d + 2 * W <= p.K && used == W; d += 2 * W) {
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) rows[r] = L::round_pair(result(d + 2 * r), result(d + 2 * r + 1));
                transpose(rows);
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) store((float*)(to[l] + d), rows[l]);
            }
            for (; d < p.K; d += 2 * W) {
                V rows[W];
                for (int64_t r = 0; r < W; ++r) {
                    rows[r] = d + 2 * r < p.K ? L::round_pair(result(d + 2 * r), result(d + 2 * r + 1)) : zero();
                }
                transpose(rows);
                for (int64_t l = 0; l < used; ++l) store_row((float*)to[l], d / 2, p.K / 2, rows[l]);
            }
            continue;
        }
        for (int64_t d = 0; d < p.K; d += W) {
            V rows[W];
            for (int64_t r = 0; r < W; ++r) rows[r] = d + r < p.K ? result(d + r) : zero();
            transpose(rows);
            for (int64_t l = 0; l < used; ++l) store_row(to[l], d, p.K, round_to<T>(rows[l]));
        }
    }
}

// `tiles` tiles of a sequence, one after the other, and all heads of a group. The chunks they make meet each block of keys together.
template <class T, class L>
static void attend(const AttentionParams& p, int64_t n, int64_t tile, int64_t tiles, int64_t g) {
    const int64_t own = p.cu_k[n + 1] - p.cu_k[n], all_queries = p.cu_q[n + 1] - p.cu_q[n];
    const int64_t which = p.prefix_k.data ? p.prefix_of[n] : -1;
    const int64_t prefix_row = which < 0 ? 0 : p.cu_p[which], shared = which < 0 ? 0 : p.cu_p[which + 1] - prefix_row;
    const int64_t length = shared + own, start = p.q_start ? p.q_start[n] : length - all_queries;
    const int64_t group = p.H / p.G, skipped = tile * QUERY_TILE;

    Span span{};
    span.token = p.cu_q[n] + skipped;
    span.queries = least(tiles * QUERY_TILE, all_queries - skipped);
    span.query = 0;
    span.head = g * group;
    span.position = start + skipped;
    const int64_t last = span.position + span.queries - 1;
    const int64_t right = p.causal ? 0 : p.right;
    const int64_t seen_from = p.left < 0 ? 0 : most(0, span.position - p.left) / 2 * 2;  // even: the same keys make a pair in every tile
    const int64_t seen_to = right < 0 ? length : least(length, last + right + 1);
    const Mask mask{p.left, right, p.left < 0 ? -__builtin_inff() : float(-p.left), right < 0 ? __builtin_inff() : float(right),
                    p.softcap == 0 && !p.bias && p.scale > 0};

    const bool many = length > 2 * KEYS;
    const Source<T> keys = source<T>(p.prefix_k, prefix_row, shared, p.k, p.cu_k[n], g, many);
    const Source<T> rows = source<T>(p.prefix_v, prefix_row, shared, p.v, p.cu_k[n], g, many);
    const int64_t Kp = (p.K + ROUND - 1) / ROUND * ROUND, lanes = group * span.queries;
    const int64_t at_once = least(CHUNKS, (lanes + LANES - 1) / LANES);
    float* memory = scratch(2 * KEYS * Kp + (KEYS + 1) * LANES + at_once * chunk_floats(Kp));
    const Block b{memory, memory + KEYS * Kp, memory + 2 * KEYS * Kp, memory + 2 * KEYS * Kp + KEYS * LANES, Kp};
    Chunk chunks[CHUNKS];
    for (int64_t i = 0; i < at_once; ++i) {
        float* at = b.shrink + LANES + i * chunk_floats(Kp);
        chunks[i].q = at;
        chunks[i].o = at + Kp * LANES;
        chunks[i].top = at + 2 * Kp * LANES;
        chunks[i].total = chunks[i].top + LANES;
        chunks[i].position = chunks[i].total + LANES;
        chunks[i].row = chunks[i].position + LANES;
    }
    for (int64_t left = lanes; left > 0;) {
        Span spans[CHUNKS];
        int64_t used = 0;
        for (; used < at_once && left > 0; ++used, left -= LANES) {
            span.lanes = least(LANES, left);
            spans[used] = span;
            load_queries<L, T>(p, span, chunks[used]);
            span.walk(span.lanes, [](int64_t, int64_t) {});
        }
        for (int64_t first = seen_from, end; first < seen_to; first = end) {
            end = least(seen_to, (first / KEYS + 1) * KEYS);
            pack_keys<L>(keys, first, end - first, p.K, b.k, Kp);
            pack_values<L>(rows, first, end - first, p.K, b.v, Kp);
            for (int64_t i = 0; i < used; ++i) meet_all<T, L>(p, chunks[i], b, mask, first, end - first);
        }
        for (int64_t i = 0; i < used; ++i) store_queries<L, T>(p, spans[i], chunks[i]);
    }
}

constexpr int64_t TILES = 4;  // of one sequence, at most so many are done together

template <class T, class L>
static void attend_all(const AttentionParams& p) {
    // Tiles of a long text share packed keys, and heads of a tile are neighbours in memory: a thread takes both together where that
    // leaves pieces enough for all threads. Longest texts come first in a schedule.
    int64_t many = 0;
    while (many < p.num_tiles && p.cu_q[p.tiles[2 * many] + 1] - p.cu_q[p.tiles[2 * many]] > QUERY_TILE) ++many;
    const int64_t run = most(1, least(TILES, p.num_tiles * p.G / (p.threads * 16))), runs = (many + run - 1) / run;
    const int64_t items = (runs + p.num_tiles - many) * p.G, together = most(1, least(p.G, items / (p.threads * 16)));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, together)
    for (int64_t item = 0; item < items; ++item) {
        const int64_t piece = item / p.G;
        const int64_t from = piece < runs ? piece * run : many + piece - runs, to = piece < runs ? least(many, from + run) : from + 1;
        for (int64_t i = from, next; i < to; i = next) {
            const int32_t* entry = p.tiles + 2 * i;
            for (next = i + 1; next < to; ++next) {
                if (p.tiles[2 * next] != entry[0] || p.tiles[2 * next + 1] != entry[1] + (next - i)) break;
            }
            attend<T, L>(p, entry[0], entry[1], next - i, item % p.G);
        }
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

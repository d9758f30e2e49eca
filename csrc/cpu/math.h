// Elementary functions on vectors, and rows of any length. Polynomials are minimax fits; errors are relative unless said otherwise.

// The first n < W or W elements at p + i of a row of length `end`.
template <class T>
static inline V load_row(const T* p, int64_t i, int64_t end) {
    return i + W <= end ? load(p + i) : load_n(p + i, end - i);
}
template <class T>
static inline void store_row(T* p, int64_t i, int64_t end, V v) {
    if (i + W <= end) {
        store(p + i, v);
    } else {
        store_n(p + i, v, end - i);
    }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Float32 rounded to the precision of T. Rounding is apart from `store`, so that what was rounded can be used further.
template <class T>
static inline V round_to(V v);
template <>
inline V round_to<float>(V v) { return v; }
template <>
inline V round_to<bf16>(V v) { return round_bf16(v); }

// Rounded to T and stored.
template <class T>
static inline void store_rounded(T* p, int64_t i, int64_t end, V v) {
#ifdef PYEMBED_PAIRS
    if constexpr (sizeof(T) == 2) {
        if (i + W <= end) {
            _mm256_storeu_si256((__m256i*)(p + i), (__m256i)_mm512_cvtneps_pbh(v));
            return;
        }
    }
#endif
    store_row(p, i, end, round_to<T>(v));
}

// 2^r for |r| <= 1/2, and exactly 1 at 0. Error 1e-7.
static inline V exp2_fraction(V r) {
    V p = set1(1.535336202522962e-4f);
    p = fma(p, r, set1(1.3398874650570672e-3f));
    p = fma(p, r, set1(9.61843735914081e-3f));
    p = fma(p, r, set1(5.5503324705357834e-2f));
    p = fma(p, r, set1(0.24022647913590464f));
    p = fma(p, r, set1(0.693147202855337f));
    return fma(p, r, set1(1.0f));
}

// 2^x for x <= 0. Far below it is 0, so that a hidden score of -inf weighs nothing at all; NaN stays NaN. Of what will be a bfloat16 the
// error is 1e-4, a twentieth of the rounding.
template <class T>
static inline V exp2_negative(V x) {
    if constexpr (sizeof(T) == 2) {
        const V r = above_floor(x);
        const V p = fma(fma(set1(0.078267470f), r, set1(0.22630836f)), r, set1(0.69542417f));
        return times_exp2_floor(fma(p, r, set1(1.0f)), x);
    } else {
        const V bounded = max(set1(-200.0f), x), n = round_even(bounded);
        return ldexp_or_zero(exp2_fraction(bounded - n), n);
    }
}

// e^x, clamped to [2^-126, 2^127]. x is reduced by n * ln 2 in two parts: x * log2(e) alone would lose the bits that matter.
static inline V exp(V x) {
    const V bounded = min(set1(88.0f), max(set1(-87.0f), x));
    const V n = round_even(bounded * set1(1.44269504f));
    const V r = fma(n, set1(-1.9082149292705877e-10f), fma(n, set1(-0.693147180369123816f), bounded));
    return ldexp(exp2_fraction(r * set1(1.44269504f)), n);
}

// tanh: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel. Error 2e-7.
static inline V tanh(V x) {
    const V size = abs(x), u = x * x;
    V p = set1(-5.515160999104964e-3f);
    p = fma(p, u, set1(2.0469417128205374e-2f));
    p = fma(p, u, set1(-5.368802219969591e-2f));
    p = fma(p, u, set1(0.13330830333693247f));
    p = fma(p, u, set1(-0.3333325984760808f));
    const V near = fma(x * u, p, x);
    const V far = set1(1.0f) - set1(2.0f) / (exp(size + size) + set1(1.0f));
    return if_less(size, set1(0.625f), near, with_sign(far, x));
}

// The normal distribution below -a, for a in [0, 13]: e^(-a^2 / 2) times a rational function. 1 + erf would cancel. Error 4e-7.
static inline V normal_tail(V a) {
    V p = set1(4.077661772509988e-3f);
    p = fma(p, a, set1(4.037289974941955e-2f));
    p = fma(p, a, set1(0.1824628431011423f));
    p = fma(p, a, set1(0.43725223225655245f));
    p = fma(p, a, set1(0.5f));
    V q = set1(1.0221053548451427e-2f);
    q = fma(q, a, set1(0.10120666164864585f));
    q = fma(q, a, set1(0.467431774795153f));
    q = fma(q, a, set1(1.199294897313071f));
    q = fma(q, a, set1(1.6723894596956221f));
    q = fma(q, a, set1(1.0f));
    return exp(set1(-0.5f) * a * a) * (p / q);
}

// W rows of W become their transpose: log2(W) rounds of interleaving row i with row i + W / 2.
static inline void transpose(V* rows) {
    V next[W];
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = zip_low(rows[i], rows[i + W / 2]);
            next[2 * i + 1] = zip_high(rows[i], rows[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = next[i];
    }
}

// Four floats by the compiler's own vector type: SSE2, NEON or whatever the baseline has.
//
// Every vec_*.h defines the same names. `max` and `min` return b where either is NaN; `if_less` is false there. load_n and store_n
// touch the first n < W elements only, and the other lanes read as zero. ldexp is a * 2^n for a normal result; ldexp_or_zero also takes a
// smaller n, down to -200, where the result is 0, or may be a denormal number above 2^-150. above_floor(x) and times_exp2_floor(a, x), for
// x <= 0, are x - floor(x) and a * 2^floor(x); for -infinity 0 <= above_floor <= 1 and the product is 0.

constexpr int W = 4;     // lanes
constexpr int QMAX = 2;  // vectors of queries that attention holds in registers at once

typedef float V __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));

static inline V set1(float x) { return V{x, x, x, x}; }
static inline V zero() { return set1(0.0f); }

static inline V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline V load_n(const float* p, int64_t n) {
    V v = zero();
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
}
static inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
static inline void store_n(float* p, V v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

static inline V load_n(const bf16* p, int64_t n) {
    VI bits = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; ++i) bits[i] = int32_t(uint32_t(p[i].bits) << 16);
    return (V)bits;
}
static inline V load(const bf16* p) { return load_n(p, W); }

static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V max(V a, V b) { return a > b ? a : b; }
static inline V min(V a, V b) { return a < b ? a : b; }
static inline V abs(V a) { return (V)((VI)a & 0x7fffffff); }
static inline V with_sign(V magnitude, V sign) { return (V)((VI)magnitude | ((VI)sign & INT32_MIN)); }
static inline V if_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
static inline V if_nan(V a, V yes, V no) { return a != a ? yes : no; }
static inline V round_even(V a) {  // |a| < 2^22
    const V magic = set1(12582912.0f);
    return (a + magic) - magic;
}
static inline V ldexp(V a, V n) { return (V)((VI)a + (__builtin_convertvector(n, VI) << 23)); }
static inline V ldexp_or_zero(V a, V n) { return if_less(n, set1(-126.0f), zero(), ldexp(a, n)); }
static inline V floor(V a) {
    const V n = round_even(a);
    return n > a ? n - 1.0f : n;
}
static inline V above_floor(V a) {
    const V bounded = max(set1(-200.0f), a);
    return bounded - floor(bounded);
}
static inline V times_exp2_floor(V a, V x) { return ldexp_or_zero(a, floor(max(set1(-200.0f), x))); }
static inline V gather(const float* table, V index) {
    const VI i = __builtin_convertvector(index, VI);
    return V{table[i[0]], table[i[1]], table[i[2]], table[i[3]]};
}
static inline V zip_low(V a, V b) { return __builtin_shuffle(a, b, VI{0, 4, 1, 5}); }
static inline V zip_high(V a, V b) { return __builtin_shuffle(a, b, VI{2, 6, 3, 7}); }
static inline V swap_pairs(V a) { return __builtin_shuffle(a, VI{1, 0, 3, 2}); }
static inline float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline float largest(V v) {
    float m = v[0];
    for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
    return m;
}

// Float32 rounded to bfloat16's precision, to nearest even; any NaN becomes the quiet one (its payload would not survive).
static inline V round_bf16(V v) {
    const VI bits = (VI)v;
    const VI rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & int32_t(0xffff0000);
    return v != v ? set1(__builtin_nanf("")) : (V)rounded;
}
static inline void store_n(bf16* p, V v, int64_t n) {  // v already has bfloat16's precision
    for (int64_t i = 0; i < n; ++i) p[i].bits = uint16_t(uint32_t(((VI)v)[i]) >> 16);
}
static inline void store(bf16* p, V v) { store_n(p, v, W); }

static inline VI set1_int(int32_t x) { return VI{x, x, x, x}; }
static inline VI load_int(const int32_t* p) {
    VI v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline VI as_int(V v) { return (VI)v; }      // the same bits
static inline V as_float(VI v) { return (V)v; }     // the same bits
static inline V to_float(VI v) { return __builtin_convertvector(v, V); }
static inline VI lower_half_up(VI v) { return v << 16; }
static inline VI upper_half(VI v) { return v & int32_t(0xffff0000); }
static inline VI minus_product(VI a, int32_t x, VI y) { return a - x * y; }
// Two bfloat16 in each word, in the order of memory: 2 W of them. in_order turns their bits to whole numbers of the same order.
typedef int16_t VH __attribute__((vector_size(16)));

static inline VI load_halves(const bf16* p) {
    VI v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline VI load_halves_n(const bf16* p, int64_t n) {  // zeros beyond the first n
    VI v = set1_int(0);
    __builtin_memcpy(&v, p, size_t(n) * sizeof(bf16));
    return v;
}
static inline VI in_order(VI v) { return (VI)((VH)v ^ (((VH)v >> 15) & 0x7fff)); }
static inline VI max_halves(VI a, VI b) { return (VI)((VH)a > (VH)b ? (VH)a : (VH)b); }
static inline VI min_halves(VI a, VI b) { return (VI)((VH)a < (VH)b ? (VH)a : (VH)b); }
static inline int32_t largest_half(VI v) {
    int16_t found = ((VH)v)[0];
    for (int i = 1; i < 2 * W; ++i) found = ((VH)v)[i] > found ? ((VH)v)[i] : found;
    return found;
}
static inline int32_t least_half(VI v) { return ~largest_half(~v); }
// Even and odd numbers, rounded to even, + shift, brought into [0, 255]; NaN is anything.
static inline void store_bytes(uint8_t* p, V even, V odd, int32_t shift) {
    const auto inside = [&](V v) { return min(max(round_even(v) + set1(float(shift)), zero()), set1(255.0f)); };
    const V first = inside(even), second = inside(odd);
    for (int i = 0; i < W; ++i) {
        p[2 * i] = uint8_t(first[i]);
        p[2 * i + 1] = uint8_t(second[i]);
    }
}
// sum + the four products of unsigned bytes of x and signed bytes of w in each word.
static inline VI dot_bytes(VI sum, VI x, VI w) {
    for (int shift = 0; shift < 32; shift += 8) sum += ((x >> shift) & 255) * ((w << (24 - shift)) >> 24);
    return sum;
}

// Eight floats with AVX2 and FMA. The names are explained in vec_generic.h.

constexpr int W = 8;
constexpr int QMAX = 2;

using V = __m256;
using VI = __m256i;

static inline V set1(float x) { return _mm256_set1_ps(x); }
static inline V zero() { return _mm256_setzero_ps(); }

static inline VI first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline V load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
static inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
static inline void store_n(float* p, V v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }

static inline V widen(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }
static inline V load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
static inline V load_n(const bf16* p, int64_t n) {
    alignas(16) bf16 part[W] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
}

static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V min(V a, V b) { return _mm256_min_ps(a, b); }
static inline V abs(V a) { return _mm256_andnot_ps(set1(-0.0f), a); }
static inline V with_sign(V magnitude, V sign) { return _mm256_or_ps(magnitude, _mm256_and_ps(set1(-0.0f), sign)); }
static inline V if_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
static inline V if_nan(V a, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
static inline V round_even(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V ldexp(V a, V n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
static inline V ldexp_or_zero(V a, V n) { return if_less(n, set1(-126.0f), zero(), ldexp(a, n)); }
static inline V above_floor(V a) {
    const V bounded = max(set1(-200.0f), a);
    return bounded - _mm256_floor_ps(bounded);
}
static inline V times_exp2_floor(V a, V x) { return ldexp_or_zero(a, _mm256_floor_ps(max(set1(-200.0f), x))); }
static inline V gather(const float* table, V index) { return _mm256_i32gather_ps(table, _mm256_cvtps_epi32(index), 4); }
static inline V zip_low(V a, V b) { return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20); }
static inline V zip_high(V a, V b) { return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31); }
static inline V swap_pairs(V a) { return _mm256_permute_ps(a, 0xb1); }
static inline float sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float largest(V v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline V round_bf16(V v) {
    const VI bits = _mm256_castps_si256(v);
    const VI even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const VI up = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    return if_nan(v, set1(__builtin_nanf("")), _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000)))));
}
static inline void store(bf16* p, V v) {
    const VI high = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
    const VI packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline void store_n(bf16* p, V v, int64_t n) {
    alignas(16) bf16 part[W];
    store(part, v);
    for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

static inline VI set1_int(int32_t x) { return _mm256_set1_epi32(x); }
static inline VI load_int(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline VI as_int(V v) { return _mm256_castps_si256(v); }
static inline V as_float(VI v) { return _mm256_castsi256_ps(v); }
static inline V to_float(VI v) { return _mm256_cvtepi32_ps(v); }
static inline VI lower_half_up(VI v) { return _mm256_slli_epi32(v, 16); }
static inline VI upper_half(VI v) { return _mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))); }
static inline VI minus_product(VI a, int32_t x, VI y) { return _mm256_sub_epi32(a, _mm256_mullo_epi32(_mm256_set1_epi32(x), y)); }
// Of 8 numbers with signs, by the instruction for the least of 8 without.
static inline int32_t largest_of_8(__m128i v) {
    const __m128i turned = _mm_minpos_epu16(_mm_xor_si128(v, _mm_set1_epi16(0x7fff)));
    return int16_t(_mm_extract_epi16(turned, 0) ^ 0x7fff);
}
static inline VI load_halves(const bf16* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline VI load_halves_n(const bf16* p, int64_t n) {
    alignas(32) bf16 part[2 * W] = {};
    __builtin_memcpy(part, p, size_t(n) * sizeof(bf16));
    return load_halves(part);
}
static inline VI in_order(VI v) { return _mm256_xor_si256(v, _mm256_srli_epi16(_mm256_srai_epi16(v, 15), 1)); }
static inline VI max_halves(VI a, VI b) { return _mm256_max_epi16(a, b); }
static inline VI min_halves(VI a, VI b) { return _mm256_min_epi16(a, b); }
static inline int32_t largest_half(VI v) { return largest_of_8(_mm_max_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1))); }
static inline int32_t least_half(VI v) { return ~largest_half(_mm256_xor_si256(v, _mm256_set1_epi32(-1))); }
static inline void store_bytes(uint8_t* p, V even, V odd, int32_t shift) {
    const VI high = _mm256_slli_epi32(_mm256_cvtps_epi32(odd), 16);
    const VI both = _mm256_add_epi16(_mm256_blend_epi16(_mm256_cvtps_epi32(even), high, 0xaa), _mm256_set1_epi16(int16_t(shift)));
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
}
// Even and odd bytes apart, as 16-bit numbers: the instruction for bytes would saturate.
static inline VI dot_bytes(VI sum, VI x, VI w) {
    const VI even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    const VI odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

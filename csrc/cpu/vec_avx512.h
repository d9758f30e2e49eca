// Sixteen floats with AVX-512 F, BW, DQ and VL. The names are explained in vec_generic.h.

constexpr int W = 16;
constexpr int QMAX = 4;

using V = __m512;
using VI = __m512i;

static inline V set1(float x) { return _mm512_set1_ps(x); }
static inline V zero() { return _mm512_setzero_ps(); }

static inline __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline V load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
static inline void store_n(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

static inline V widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
static inline V load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline V load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }

static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V abs(V a) { return _mm512_andnot_ps(set1(-0.0f), a); }
static inline V with_sign(V magnitude, V sign) { return _mm512_or_ps(magnitude, _mm512_and_ps(set1(-0.0f), sign)); }
static inline V if_less(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
static inline V if_nan(V a, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), no, yes); }
static inline V round_even(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V ldexp(V a, V n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
static inline V ldexp_or_zero(V a, V n) { return _mm512_scalef_ps(a, n); }
static inline V above_floor(V a) { return _mm512_reduce_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }  // 0 for infinity
static inline V times_exp2_floor(V a, V x) { return _mm512_scalef_ps(a, x); }
static inline V gather(const float* table, V index) { return _mm512_i32gather_ps(_mm512_cvtps_epi32(index), table, 4); }
static inline V zip_low(V a, V b) {
    const VI order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, order, b);
}
static inline V zip_high(V a, V b) {
    const VI order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, order, b);
}
static inline V swap_pairs(V a) { return _mm512_permute_ps(a, 0xb1); }
static inline float sum(V v) { return _mm512_reduce_add_ps(v); }
static inline float largest(V v) { return _mm512_reduce_max_ps(v); }

#ifdef PYEMBED_PAIRS
static inline V round_bf16(V v) { return widen((__m256i)_mm512_cvtneps_pbh(v)); }  // numbers below 2^-126 become 0
#else
static inline V round_bf16(V v) {
    const VI bits = _mm512_castps_si512(v);
    const VI even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const VI up = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    return if_nan(v, set1(__builtin_nanf("")), _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000)))));
}
#endif
static inline __m256i narrow(V v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)); }
static inline void store(bf16* p, V v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
static inline void store_n(bf16* p, V v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }

static inline VI set1_int(int32_t x) { return _mm512_set1_epi32(x); }
static inline VI load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
static inline VI as_int(V v) { return _mm512_castps_si512(v); }
static inline V as_float(VI v) { return _mm512_castsi512_ps(v); }
static inline V to_float(VI v) { return _mm512_cvtepi32_ps(v); }
static inline VI lower_half_up(VI v) { return _mm512_slli_epi32(v, 16); }
static inline VI upper_half(VI v) { return _mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))); }
static inline VI minus_product(VI a, int32_t x, VI y) { return _mm512_sub_epi32(a, _mm512_mullo_epi32(_mm512_set1_epi32(x), y)); }
// Of 8 numbers with signs, by the instruction for the least of 8 without.
static inline int32_t largest_of_8(__m128i v) {
    const __m128i turned = _mm_minpos_epu16(_mm_xor_si128(v, _mm_set1_epi16(0x7fff)));
    return int16_t(_mm_extract_epi16(turned, 0) ^ 0x7fff);
}
static inline VI load_halves(const bf16* p) { return _mm512_loadu_si512(p); }
static inline VI load_halves_n(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p); }
static inline VI in_order(VI v) { return _mm512_xor_si512(v, _mm512_srli_epi16(_mm512_srai_epi16(v, 15), 1)); }
static inline VI max_halves(VI a, VI b) { return _mm512_max_epi16(a, b); }
static inline VI min_halves(VI a, VI b) { return _mm512_min_epi16(a, b); }
static inline int32_t largest_half(VI v) {
    const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return largest_of_8(_mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
static inline int32_t least_half(VI v) { return ~largest_half(_mm512_xor_si512(v, _mm512_set1_epi32(-1))); }
static inline void store_bytes(uint8_t* p, V even, V odd, int32_t shift) {
    const VI high = _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 16);
    const VI both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_cvtps_epi32(even), high);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtusepi16_epi8(_mm512_add_epi16(both, _mm512_set1_epi16(int16_t(shift)))));
}
#ifdef PYEMBED_VNNI
static inline VI dot_bytes(VI sum, VI x, VI w) { return _mm512_dpbusd_epi32(sum, x, w); }
#else
static inline VI dot_bytes(VI sum, VI x, VI w) {
    const VI even = _mm512_madd_epi16(_mm512_and_si512(x, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
    const VI odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(w, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}
#endif

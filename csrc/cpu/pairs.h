// How attention's products read their factors with AVX512-BF16: two bfloat16 elements in each 32-bit word, multiplied and added at once.

struct Pairs {
    static constexpr int PER_WORD = 2;

    static inline V multiply_add(V x, V y, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
    // Words i .. of a row of K elements, K even.
    static inline V words(const bf16* row, int64_t i, int64_t K) { return load_row((const float*)row, i, K / 2); }
    // Two vectors of bfloat16 precision, `first` in the lower halves.
    static inline V merge(V first, V second) {
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second)));
    }
    // Two vectors of float32, rounded to bfloat16 as round_bf16 does.
    static inline V round_pair(V first, V second) {
        const VI order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                          23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (VI)_mm512_cvtne2ps_pbh(second, first)));
    }
};

using Narrow = Pairs;

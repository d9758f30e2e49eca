// How attention's products read their factors: here one element in each 32-bit word of scratch, as float32.

template <class T>
struct Singles {
    static constexpr int PER_WORD = 1;

    static inline V multiply_add(V x, V y, V sum) { return fma(x, y, sum); }
    // Words i .. of a row of K elements.
    static inline V words(const T* row, int64_t i, int64_t K) { return load_row(row, i, K); }
};

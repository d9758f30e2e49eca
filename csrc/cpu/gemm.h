// Rows of bfloat16 times a matrix of bfloat16 or int8: tiles of sums in registers. linear.h makes layers of them.
//
// One loop serves both: a 32-bit word holds two bfloat16 or four int8 of the inner dimension, and multiply-adds take whole words. Weights
// come in panels of PANEL columns, [panels, words, PANEL]; rows are packed in groups, [pieces, GROUP, PIECE], those for int8 weights
// quantised on the way. A tile is a group of rows times a panel, summed over all words at once, so that a row's bits depend on nothing
// but the row.

#ifdef PYEMBED_AMX
constexpr int GROUP = 32;  // rows of a tile: two of AMX's registers
#else
constexpr int GROUP = 12;  // rows of a tile: with two vectors of columns, 24 sums in registers
#endif
constexpr int PIECE = 16;  // words of a row that lie side by side: the 32 bfloat16 of a panel's columns, where they are a result

// How a word of a row meets W words of weights.
struct Halves {
    static constexpr int PER_WORD = 2;
    using Sum = V;
    static inline Sum none() { return zero(); }
    static inline void keep(float* at, Sum sum) { store(at, sum); }
#ifdef PYEMBED_PAIRS
    static inline V spread(const int32_t* word) { return as_float(set1_int(*word)); }
    static inline V weights(const int32_t* words) { return as_float(load_int(words)); }
    static inline Sum add(Sum sum, V x, V w) { return Pairs::multiply_add(x, w, sum); }
#else
    struct Both {
        V low, high;
    };
    static inline Both split(VI words) { return Both{as_float(lower_half_up(words)), as_float(upper_half(words))}; }
    static inline Both spread(const int32_t* word) { return split(set1_int(*word)); }
    static inline Both weights(const int32_t* words) { return split(load_int(words)); }
    static inline Sum add(Sum sum, Both x, Both w) { return fma(x.high, w.high, fma(x.low, w.low, sum)); }
#endif
};
struct Bytes {
    static constexpr int PER_WORD = 4;
    using Sum = V;  // the bits of whole numbers: gcc 12 keeps arrays of integer vectors in memory
    static inline Sum none() { return zero(); }
    static inline void keep(float* at, Sum sum) { store(at, sum); }
    static inline VI spread(const int32_t* word) { return set1_int(*word); }
    static inline VI weights(const int32_t* words) { return load_int(words); }
    static inline Sum add(Sum sum, VI x, VI w) { return as_float(dot_bytes(as_int(sum), x, w)); }
};

// A row of bfloat16 whose columns lie in runs of PANEL: one after the other in a tensor, GROUP * PANEL apart in a packed group.
struct Runs {
    bf16* data;
    int64_t row_stride, run_stride;
    bf16* at(int64_t row, int64_t column) const { return data + column / PANEL * run_stride + row * row_stride + column % PANEL; }
};

constexpr int32_t INFINITE = 0x7f80;  // the bits of a bfloat16

static inline float float_of_half(int32_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    __builtin_memcpy(&x, &word, sizeof x);
    return x;
}

static inline int64_t pieces_of(int64_t words) { return (words + PIECE - 1) / PIECE; }

// f(halves, column) for each 2 W columns of row [K]; the last ones may be fewer, and zeros.
template <class F>
static inline void each_two_vectors(const Runs& x, int64_t row, int64_t K, const F& f) {
    const bf16* run = x.at(row, 0);
    int64_t column = 0;
    for (; column + PANEL <= K; column += PANEL, run += x.run_stride) {
#pragma GCC unroll 4
        for (int i = 0; i < PANEL; i += 2 * W) f(load_halves(run + i), column + i);
    }
    for (int64_t i = 0; column + i < K; i += 2 * W) f(load_halves_n(run + i, least(2 * W, K - column - i)), column + i);
}

// Row [K] of group x to unsigned bytes, value = (byte - zero) * scale. A row that is not finite gets a scale of NaN.
static inline void quantise_row(const Runs& x, int64_t row, int64_t K, int32_t* to, float* scale, int32_t* zero_point) {
    VI least_yet = set1_int(0), most_yet = set1_int(0);  // of numbers in order of size
    each_two_vectors(x, row, K, [&](VI halves, int64_t) {
        const VI sized = in_order(halves);
        least_yet = min_halves(least_yet, sized);
        most_yet = max_halves(most_yet, sized);
    });
    const int32_t low = least_half(least_yet), high = largest_half(most_yet);
    const bool finite = high < INFINITE && low > -INFINITE - 1;
    const float below = -float_of_half(low < 0 ? low ^ 0x7fff : low), span = float_of_half(high) + below;
    const float bounded = span > 1e-30f ? span : 1e-30f, inverse = 255.0f / bounded;
    const float offset = (below * inverse + 12582912.0f) - 12582912.0f;  // rounded to even
    *scale = finite ? bounded / 255.0f + (bounded - bounded) : __builtin_nanf("");
    *zero_point = offset >= 0 && offset <= 255 ? int32_t(offset) : 0;
    const V factor = set1(inverse);
    const int32_t shift = *zero_point;
    each_two_vectors(x, row, K, [&](VI halves, int64_t column) {
        const uint64_t byte = uint64_t(column);
        uint8_t* at = (uint8_t*)(to + byte / (4 * PIECE) * GROUP * PIECE) + byte % (4 * PIECE);
        store_bytes(at, as_float(lower_half_up(halves)) * factor, as_float(upper_half(halves)) * factor, shift);
    });
}

// Row [K] as it is, wherever it starts: a float32 must not be read where only a bfloat16 is aligned.
static inline void copy_row(const Runs& x, int64_t row, int64_t K, int32_t* to) {
    for (int64_t i = 0; i < K; i += 2 * W) {
        int32_t* at = to + i / (2 * PIECE) * GROUP * PIECE + i / 2 % PIECE;
        if (i + 2 * W <= K) {
            __builtin_memcpy(at, x.at(row, i), 2 * W * sizeof(bf16));  // one load
        } else {
            __builtin_memcpy(at, x.at(row, i), size_t(K - i) * sizeof(bf16));
        }
    }
}

// Sums of R rows of a packed group and two vectors of columns. Not inlined: the registers are all its own.
template <class M, int R>
__attribute__((noinline)) static void tile(const int32_t* x, const int32_t* w, int64_t words, float* to) {
    typename M::Sum sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = M::none();
    for (; words > 0; words -= PIECE, x += GROUP * PIECE) {
        const int64_t count = least(PIECE, words);
        for (int64_t i = 0; i < count; ++i, w += PANEL) {
            const auto w0 = M::weights(w), w1 = M::weights(w + W);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const auto word = M::spread(x + r * PIECE + i);
                sums[r][0] = M::add(sums[r][0], word, w0);
                sums[r][1] = M::add(sums[r][1], word, w1);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        M::keep(to + r * PANEL, sums[r][0]);
        M::keep(to + r * PANEL + W, sums[r][1]);
    }
}

#ifdef PYEMBED_AMX
#include "amx.h"
#else
struct Registers {
    Registers() {}  // nothing to set
};

// Sums [rows, PANEL] of a packed group and a panel.
template <class M>
static inline void multiply_group(const int32_t* x, const int32_t* w, int64_t words, int64_t rows, float* to) {
    if constexpr (2 * W == PANEL) {
        switch ((rows + 1) / 2) {
            case 1: return tile<M, 2>(x, w, words, to);
            case 2: return tile<M, 4>(x, w, words, to);
            case 3: return tile<M, 6>(x, w, words, to);
            case 4: return tile<M, 8>(x, w, words, to);
            case 5: return tile<M, 10>(x, w, words, to);
            default: return tile<M, 12>(x, w, words, to);
        }
    } else {
        for (int c = 0; c < PANEL; c += 2 * W) {
            for (int r = 0; r < rows; r += 4) tile<M, 4>(x + r * PIECE, w + c, words, to + r * PANEL + c);
        }
    }
}
#endif

// Sums of gemm.h's tiles in AMX's registers. A piece of a packed group is 16 words of each of its rows, 64 bytes, and so two of these
// registers; a piece of a panel is 16 words of 32 columns, and two more; their four products are the sums of 32 rows and 32 columns. Bytes
// are multiplied exactly, bfloat16 pair by pair in the order of the words, so that here too a row's bits depend on nothing but the row.

// The shapes of the registers, all whole, for as long as this lives: other libraries set others in the same thread.
struct Registers {
    Registers() {
        struct alignas(64) Shapes {
            uint8_t palette = 1, unused[15] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Registers() { _tile_release(); }
};

template <class M, bool TWO>
__attribute__((noinline)) static void sum_pieces(const int32_t* x, const int32_t* w, int64_t pieces, bool begun, float* to) {
    constexpr int64_t x_stride = PIECE * 4, w_stride = PANEL * 4;
    __asm__ volatile("" ::: "memory");  // loads of registers do not say that they read memory
    if (begun) {
        _tile_loadd(0, to, w_stride);
        _tile_loadd(1, to + W, w_stride);
        if constexpr (TWO) {
            _tile_loadd(2, to + W * PANEL, w_stride);
            _tile_loadd(3, to + W * PANEL + W, w_stride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (; pieces > 0; --pieces, x += GROUP * PIECE, w += PIECE * PANEL) {
        _tile_loadd(4, x, x_stride);
        _tile_loadd(6, w, w_stride);
        _tile_loadd(7, w + W, w_stride);
        if constexpr (M::PER_WORD == 2) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        } else {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
        }
        if constexpr (TWO) {
            _tile_loadd(5, x + W * PIECE, x_stride);
            if constexpr (M::PER_WORD == 2) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_dpbusd(2, 5, 6);
                _tile_dpbusd(3, 5, 7);
            }
        }
    }
    _tile_stored(0, to, w_stride);
    _tile_stored(1, to + W, w_stride);
    if constexpr (TWO) {
        _tile_stored(2, to + W * PANEL, w_stride);
        _tile_stored(3, to + W * PANEL + W, w_stride);
    }
    __asm__ volatile("" ::: "memory");
}

// Sums [rows, PANEL] of a packed group and a panel. The words that fill no piece come first, and the rest is added to their sums.
template <class M>
static inline void multiply_group(const int32_t* x, const int32_t* w, int64_t words, int64_t rows, float* to) {
    const int64_t pieces = words / PIECE, rest = words % PIECE;
    for (int64_t r = 0; rest && r < rows; r += 8) {
        tile<M, 8>(x + pieces * GROUP * PIECE + r * PIECE, w + pieces * PIECE * PANEL, rest, to + r * PANEL);
    }
    if (pieces == 0) return;
    rows > W ? sum_pieces<M, true>(x, w, pieces, rest, to) : sum_pieces<M, false>(x, w, pieces, rest, to);
}

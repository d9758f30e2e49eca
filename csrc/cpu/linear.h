// Layers of gemm.h's tiles: act(x W^T + b), perhaps a second layer on that, perhaps residual sum and norm, block by block of rows, so that
// what lies between is in cache. Same contract as the ops one after the other, with one rounding less before an activation.
//
// Threads take blocks of rows, or, of few rows, ranges of panels. Work: 2 * in * out FLOPs a row and layer; weights are read once a block.

constexpr int64_t BLOCK = 240 / GROUP;      // groups of rows of one layer that a thread takes at once: packed, of up to 2,048 inputs they stay in the second-level cache
constexpr int64_t PAIR_BLOCK = 96 / GROUP;  // of two layers, with the first one's results
constexpr int64_t FEW = 256;       // rows of one layer up to which threads divide its columns

// Scratch of a thread: where a block of rows lies packed, `in` to a row of the widest layer.
struct BlockScratch {
    float* tile;     // [GROUP, PANEL] sums of a tile
    float* scale;    // [rows] of quantised rows
    int32_t* zero;   // [rows] what stands for 0
    int32_t* words;  // [groups, pieces, GROUP, PIECE]
    bf16* between;   // [groups, runs, GROUP, PANEL] results of the first of two layers
};

static inline int64_t words_of(const Matrix& m) { return m.eight_bits ? (m.in + 3) / 4 : m.in / 2; }
static inline int64_t group_words(int64_t in) { return pieces_of((in + 1) / 2) * GROUP * PIECE; }

static inline BlockScratch block_scratch(const LinearParams& p, int64_t groups) {
    const int64_t rows = (groups * GROUP + 15) / 16 * 16, between = p.second.words ? groups * group_words(p.first.out) : 0;
    const int64_t widest = p.second.words ? most(p.first.in, p.second.in) : p.first.in;
    float* at = scratch(GROUP * PANEL + 2 * rows + groups * group_words(widest) + between);
    BlockScratch s{};
    s.tile = at;
    s.scale = s.tile + GROUP * PANEL;
    s.zero = (int32_t*)(s.scale + rows);
    s.words = s.zero + rows;
    s.between = (bf16*)(s.words + groups * group_words(widest));
    return s;
}

// A tile's sums, W columns of its rows: `at` in the tile, `column` among the weights, `i` among the results.
template <class M, Act ACT>
static inline void finish_columns(const Matrix& m, const BlockScratch& from, int64_t row, int64_t rows, int at, int64_t column,
                                  const Runs& to, int64_t i) {
    constexpr bool quantised = M::PER_WORD == 4, gated = is_gated(ACT);
    constexpr int UP = PANEL / 2;  // from a gate to its value
    const auto floats = [&](const float* p, bool want) { return want && p ? load(p) : zero(); };
    const auto ints = [&](const int32_t* p, bool want) { return want ? load_int(p) : set1_int(0); };
    const float* bias = m.bias ? m.bias + column : nullptr;
    const V factor = floats(m.scale + column, quantised), up_factor = floats(m.scale + column + UP, quantised && gated);
    const VI sums = ints(m.sums + column, quantised), up_sums = ints(m.sums + column + UP, quantised && gated);
    const V shift = floats(bias, true), up_shift = floats(bias ? bias + UP : nullptr, gated);
    const auto value = [&](int64_t r, V sum, V factor, VI sums, V shift) {
        if constexpr (quantised) {
            const VI whole = minus_product(as_int(sum), from.zero[row + r], sums);
            sum = to_float(whole) * (set1(from.scale[row + r]) * factor);
        }
        return sum + shift;
    };
    bf16* out = to.at(0, i) - i;
    for (int64_t r = 0; r < rows; ++r, out += to.row_stride) {
        V y = activated<bf16, ACT>(value(r, load(from.tile + r * PANEL + at), factor, sums, shift));
        if constexpr (gated) y = y * value(r, load(from.tile + r * PANEL + at + UP), up_factor, up_sums, up_shift);
        store_rounded(out, i, m.out, y);
    }
}

template <class M, Act ACT>
static inline void finish_tile(const Matrix& m, const BlockScratch& from, int64_t row, int64_t rows, int64_t column, const Runs& to) {
    const int64_t first = is_gated(ACT) ? column / 2 : column;
    for (int i = 0; i < (is_gated(ACT) ? PANEL / 2 : PANEL) && first + i < m.out; i += W) {
        finish_columns<M, ACT>(m, from, row, rows, i, column + i, to, first + i);
    }
}

// Rows [rows, in] of x, whose groups lie `apart` elements from each other, packed for the layer.
static inline void pack_row(const Matrix& m, const Runs& x, int64_t apart, int64_t row, const BlockScratch& s) {
    const int64_t words = words_of(m), group = pieces_of(words) * GROUP * PIECE;
    const Runs source{x.data + row / GROUP * apart, x.row_stride, x.run_stride};
    int32_t* to = s.words + row / GROUP * group + row % GROUP * PIECE;
    if (m.eight_bits) {
        quantise_row(source, row % GROUP, m.in, to, s.scale + row, s.zero + row);
    } else {
        copy_row(source, row % GROUP, m.in, to);
    }
}

// Panels `panel` to `end` of a layer on packed rows; groups of results lie `apart` elements from each other.
template <class M>
static inline void panels_of(const Matrix& m, const int32_t* from, int64_t rows, const Runs& y, int64_t apart, int64_t panel,
                             int64_t end, const BlockScratch& s) {
    const int64_t words = words_of(m), group = pieces_of(words) * GROUP * PIECE;
    const Registers registers;
    for (; panel < end; ++panel) {
        for (int64_t r = 0; r < rows; r += GROUP) {
            const int64_t count = least(GROUP, rows - r), column = panel * PANEL;
            const Runs to{y.data + r / GROUP * apart, y.row_stride, y.run_stride};
            multiply_group<M>(from + r / GROUP * group, m.words + panel * words * PANEL, words, count, s.tile);
            switch (m.act) {
                case Act::none: finish_tile<M, Act::none>(m, s, r, count, column, to); break;
                case Act::relu: finish_tile<M, Act::relu>(m, s, r, count, column, to); break;
                case Act::swiglu: finish_tile<M, Act::swiglu>(m, s, r, count, column, to); break;
                case Act::geglu_erf: finish_tile<M, Act::geglu_erf>(m, s, r, count, column, to); break;
                case Act::geglu_tanh: finish_tile<M, Act::geglu_tanh>(m, s, r, count, column, to); break;
                case Act::gelu_erf: finish_tile<M, Act::gelu_erf>(m, s, r, count, column, to); break;
                case Act::gelu_tanh: finish_tile<M, Act::gelu_tanh>(m, s, r, count, column, to); break;
            }
        }
    }
}

static inline void multiply(const Matrix& m, const int32_t* from, int64_t rows, const Runs& y, int64_t apart, int64_t panel, int64_t end,
                            const BlockScratch& s) {
    m.eight_bits ? panels_of<Bytes>(m, from, rows, y, apart, panel, end, s) : panels_of<Halves>(m, from, rows, y, apart, panel, end, s);
}

// One layer on a block of rows.
static inline void layer(const Matrix& m, const Runs& x, int64_t x_apart, int64_t rows, const Runs& y, int64_t y_apart,
                         const BlockScratch& s) {
    const bool packed = !m.eight_bits && x.run_stride == GROUP * PANEL;  // results of another layer, as they lie
    for (int64_t r = 0; r < rows && !packed; ++r) pack_row(m, x, x_apart, r, s);
    multiply(m, packed ? (const int32_t*)x.data : s.words, rows, y, y_apart, 0, m.panels, s);
}

// Few rows: packed once for all threads, which take panels, so that the weights are read once.
static void linear_few(const LinearParams& p) {
    const Matrix& m = p.first;
    const BlockScratch shared = block_scratch(p, (p.T + GROUP - 1) / GROUP);
    const Runs x{(bf16*)p.x, p.x_stride, PANEL}, y{(bf16*)p.y, m.out, PANEL};
    const int64_t slices = least(m.panels, 4 * p.threads);
#pragma omp parallel num_threads(p.threads)
    {
        float tile[GROUP * PANEL];
        BlockScratch s = shared;
        s.tile = tile;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < p.T; ++t) pack_row(m, x, GROUP * p.x_stride, t, s);
#pragma omp for schedule(dynamic, 1)
        for (int64_t slice = 0; slice < slices; ++slice) {
            multiply(m, s.words, p.T, y, GROUP * m.out, slice * m.panels / slices, (slice + 1) * m.panels / slices, s);
        }
        if (p.norm.norm.given) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < p.T; ++t) norm_row<bf16>(p.norm, t);
        }
    }
}

// Many rows: threads take blocks of them, from packing to norm.
static void linear_many(const LinearParams& p) {
    const bool pair = p.second.words != nullptr;
    const Matrix& last = pair ? p.second : p.first;
    const int64_t groups = (p.T + GROUP - 1) / GROUP, biggest = pair ? PAIR_BLOCK : BLOCK;
    const int64_t turns = most((groups + p.threads * biggest - 1) / (p.threads * biggest), least(4, groups / p.threads));
    const int64_t blocks = most(1, turns) * p.threads;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * groups / blocks, to = (block + 1) * groups / blocks;
        const int64_t first = from * GROUP, rows = least(p.T, to * GROUP) - first;
        const BlockScratch s = block_scratch(p, to - from);
        const Runs x{(bf16*)p.x + first * p.x_stride, p.x_stride, PANEL}, y{(bf16*)p.y + first * last.out, last.out, PANEL};
        if (pair) {
            const Runs between{s.between, PANEL, GROUP * PANEL};
            const int64_t apart = 2 * group_words(p.first.out);
            layer(p.first, x, GROUP * p.x_stride, rows, between, apart, s);
            layer(p.second, between, apart, rows, y, GROUP * last.out, s);
        } else {
            layer(p.first, x, GROUP * p.x_stride, rows, y, GROUP * last.out, s);
        }
        for (int64_t t = first; p.norm.norm.given && t < first + rows; ++t) norm_row<bf16>(p.norm, t);
    }
}

static void linear(const LinearParams& p) {
    ran(ISA);
    if (p.T == 0) return;
    p.second.words == nullptr && p.T <= FEW ? linear_few(p) : linear_many(p);
}

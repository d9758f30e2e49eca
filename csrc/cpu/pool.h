// One float32 vector per text. A text belongs to one thread, and its rows are added in blocks of fixed size, in order, so that its
// bits depend on nothing else.

constexpr int64_t POOL_BLOCK = 32;  // rows added up before they meet the total: shorter chains lose fewer bits

static inline void pool_fill(float* row, int64_t n, V value) {
    for (int64_t i = 0; i < n; i += W) store_row(row, i, n, value);
}

// part [dim] over rows first .. end, each weighted with its number in the text in a weighted mean.
template <class T>
static inline void pool_block(const PoolParams& p, int64_t start, int64_t first, int64_t end, float* row, float* part) {
    for (int64_t t = first; t < end; ++t) {
        const T* x = (const T*)p.x + t * p.x_stride;
        const int64_t width = p.norm.given ? p.D : p.dim;
        for (int64_t i = 0; i < width; i += W) store_row(row, i, width, load_row(x, i, width));
        if (p.norm.given) normalise<float>(row, p.D, p.norm);  // not rounded to the activation dtype
        const V weight = set1(p.mode == Pool::weightedmean ? float(t - start + 1) : 1.0f);
        for (int64_t i = 0; i < p.dim; i += W) {
            const V v = load_row(row, i, p.dim), sum = load_row(part, i, p.dim);
            V next = fma(v, weight, sum);
            if (p.mode == Pool::max) next = if_nan(sum, sum, max(sum, v));
            store_row(part, i, p.dim, next);
        }
    }
}

template <class T>
static void pool_texts(const PoolParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (int64_t n = 0; n < p.N; ++n) {
        int64_t first = p.spans[2 * n], end = p.spans[2 * n + 1];
        const int64_t start = p.cu_seqlens[n];
        float* out = p.out + n * p.dim;
        const bool max_mode = p.mode == Pool::max, empty = first >= end;
        const V identity = set1(max_mode && !empty ? -__builtin_inff() : 0.0f);
        pool_fill(out, p.dim, identity);
        if (empty) continue;
        if (p.mode == Pool::cls) end = first + 1;
        if (p.mode == Pool::lasttoken) first = end - 1;
        float* row = scratch(p.D + p.dim);
        float* part = row + p.D;
        for (int64_t block = first; block < end; block += POOL_BLOCK) {
            pool_fill(part, p.dim, identity);
            pool_block<T>(p, start, block, least(block + POOL_BLOCK, end), row, part);
            for (int64_t i = 0; i < p.dim; i += W) {
                const V total = load_row(out, i, p.dim), v = load_row(part, i, p.dim);
                store_row(out, i, p.dim, max_mode ? if_nan(total, total, max(total, v)) : total + v);
            }
        }
        const double count = double(end - first);
        double divisor = max_mode ? 1.0 : count;
        if (p.mode == Pool::mean_sqrt_len_tokens) divisor = __builtin_sqrt(count);
        if (p.mode == Pool::weightedmean) divisor = count * (double(first - start + 1) + double(end - start)) / 2.0;
        for (int64_t i = 0; i < p.dim; i += W) store_row(out, i, p.dim, load_row(out, i, p.dim) / set1(float(divisor)));
        if (!p.normalize) continue;
        const float length = __builtin_sqrtf(squares_around(out, p.dim, zero()));
        for (int64_t i = 0; i < p.dim; i += W) {
            store_row(out, i, p.dim, load_row(out, i, p.dim) / set1(length < 1e-12f ? 1e-12f : length));
        }
    }
}

static void pool(const PoolParams& p) {
    ran(ISA);
    p.dtype == Dtype::f32 ? pool_texts<float>(p) : pool_texts<bf16>(p);
}

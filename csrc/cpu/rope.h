// RMSNorm of each query and key head, rounded, then the rotation of its first R dimensions, in place.
//
// out[j] = x[j] * c[j] + x[partner of j] * s[j], the sign of the sine in s; both tables are spread to R entries once a token.

static inline void spread_tables(const RopeParams& p, int64_t t, float* c, float* s) {
    const float* cos = p.cos + p.rows[t] * p.cos_stride;
    const float* sin = p.sin + p.rows[t] * p.sin_stride;
    const int64_t half = p.R / 2;
    for (int64_t i = 0; i < half; ++i) {
        const int64_t a = p.interleaved ? 2 * i : i, b = p.interleaved ? 2 * i + 1 : i + half;
        c[a] = c[b] = cos[i];
        s[a] = -sin[i];
        s[b] = sin[i];
    }
}

// head [R] += its rotation; `head` is written to `out`, the rounded row.
template <class T>
static inline void rotate(const float* head, T* out, const float* c, const float* s, int64_t R, bool interleaved) {
    if (interleaved) {
        for (int64_t i = 0; i < R; i += W) {
            const V x = load_row(head, i, R);
            store_row(out, i, R, round_to<T>(fma(x, load_row(c, i, R), swap_pairs(x) * load_row(s, i, R))));
        }
        return;
    }
    const int64_t half = R / 2;
    for (int64_t i = 0; i < half; i += W) {
        const V a = load_row(head, i, half), b = load_row(head + half, i, half);
        const V first = fma(a, load_row(c, i, half), b * load_row(s, i, half));
        const V second = fma(b, load_row(c + half, i, half), a * load_row(s + half, i, half));
        store_row(out, i, half, round_to<T>(first));
        store_row(out + half, i, half, round_to<T>(second));
    }
}

template <class T>
static void rope_rows(const RopeParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.T; ++t) {
        float* head = scratch(p.K + 2 * p.R);
        float *c = head + p.K, *s = c + p.R;
        if (p.cos) spread_tables(p, t, c, s);
        for (int64_t h = 0; h < p.H + p.G; ++h) {
            T* x = (T*)p.qkv + t * p.stride + h * p.K;
            const NormParams& norm = h < p.H ? p.q_norm : p.k_norm;
            for (int64_t i = 0; i < p.K; i += W) store_row(head, i, p.K, load_row(x, i, p.K));
            if (norm.given) {
                normalise<T>(head, p.K, norm);
                for (int64_t i = 0; i < p.K; i += W) {
                    const V rounded = round_to<T>(load_row(head, i, p.K));
                    store_row(head, i, p.K, rounded);
                    store_row(x, i, p.K, rounded);
                }
            }
            if (p.cos) rotate(head, x, c, s, p.R, p.interleaved);
        }
    }
}

static void rope(const RopeParams& p) {
    ran(ISA);
    p.dtype == Dtype::f32 ? rope_rows<float>(p) : rope_rows<bf16>(p);
}

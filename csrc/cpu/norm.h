// Norms, and what they share with other ops: normalising a row in float32 and writing a row out, quantised or not.

static inline float row_sum(const float* row, int64_t D) {
    V a = zero(), b = zero();
    int64_t i = 0;
    for (; i + 2 * W <= D; i += 2 * W) {
        a = a + load(row + i);
        b = b + load(row + i + W);
    }
    for (; i < D; i += W) a = a + load_row(row, i, D);
    return sum(a + b);
}

// The sum of squares of row - mean, which then stands in row.
static inline float squares_around(float* row, int64_t D, V mean) {
    V a = zero(), b = zero();
    int64_t i = 0;
    for (; i + 2 * W <= D; i += 2 * W) {
        const V x = load(row + i) - mean, y = load(row + i + W) - mean;
        store(row + i, x);
        store(row + i + W, y);
        a = fma(x, x, a);
        b = fma(y, y, b);
    }
    for (; i < D; i += W) {
        store_row(row, i, D, load_row(row, i, D) - mean);
        const V x = load_row(row, i, D);
        a = fma(x, x, a);
    }
    return sum(a + b);
}

// The norm of row [D], in place and in float32; a `round_first` norm rounds to T before its weight.
template <class T>
static inline void normalise(float* row, int64_t D, const NormParams& norm) {
    const float squares = squares_around(row, D, set1(norm.layer ? row_sum(row, D) / float(D) : 0.0f));
    const V factor = set1(1.0f / __builtin_sqrtf(squares / float(D) + norm.eps));
    for (int64_t i = 0; i < D; i += W) {
        V y = load_row(row, i, D) * factor;
        if (norm.round_first) y = round_to<T>(y);
        if (norm.weight) y = y * load_row(norm.weight, i, D);
        if (norm.bias) y = y + load_row(norm.bias, i, D);
        store_row(row, i, D, y);
    }
}

// Round to nearest even; the row's scale has brought |x| to at most 448, the largest float8_e4m3fn.
static inline uint8_t to_fp8(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    const float magnitude = __builtin_fabsf(x);
    const uint32_t normal = (size + 0x7ffff + (size >> 20 & 1)) >> 20;  // exponent and three bits of mantissa
    const float magic = 12582912.0f;                                    // rounds to an integer: subnormals are multiples of 2^-9
    const uint32_t subnormal = uint32_t((magnitude * 512.0f + magic) - magic);
    const uint32_t number = magnitude < 0.015625f ? subnormal : normal - (120u << 3);
    return uint8_t(sign | (size > 0x7f800000 ? 0x7f : number));
}

// Row t of the result: row [D] holds float32 that is rounded to T here, and then to eight bits if asked.
template <class T>
static inline void write_row(float* row, int64_t D, int64_t t, const RowsOut& out) {
    if (out.quant == Quant::none) {
        T* y = (T*)out.values + t * D;
        for (int64_t i = 0; i < D; i += W) store_rounded(y, i, D, load_row(row, i, D));
        return;
    }
    V top = zero(), poison = zero();  // max() drops NaN: a row that is not finite must not look finite in eight bits
    for (int64_t i = 0; i < D; i += W) {
        const V y = round_to<T>(load_row(row, i, D));
        store_row(row, i, D, y);
        top = max(top, abs(y));
        poison = fma(y, zero(), poison);
    }
    const float absmax = largest(top), limit = out.quant == Quant::fp8 ? 448.0f : 127.0f;
    const float scale = (absmax < 1e-12f ? 1e-12f : absmax) / limit + sum(poison);
    out.scale[t] = scale;
    const V divisor = set1(scale);
    for (int64_t i = 0; i < D; i += W) store_row(row, i, D, load_row(row, i, D) / divisor);
    if (out.quant == Quant::fp8) {
        uint8_t* y = (uint8_t*)out.values + t * D;
        for (int64_t i = 0; i < D; ++i) y[i] = to_fp8(row[i]);
    } else {
        int8_t* y = (int8_t*)out.values + t * D;
        for (int64_t i = 0; i < D; ++i) y[i] = int8_t(int32_t((row[i] + 12582912.0f) - 12582912.0f));
    }
}

template <class T>
static inline void norm_row(const NormRowsParams& p, int64_t t) {
    const T* x = (const T*)p.x + t * p.x_stride;
    T* residual = p.residual ? (T*)p.residual + t * p.residual_stride : nullptr;
    float* row = scratch(p.D);
    for (int64_t i = 0; i < p.D; i += W) {
        V v = load_row(x, i, p.D);
        if (residual) {
            v = round_to<T>(v + load_row(residual, i, p.D));
            store_row(residual, i, p.D, v);
        }
        store_row(row, i, p.D, v);
    }
    normalise<T>(row, p.D, p.norm);
    write_row<T>(row, p.D, t, p.out);
}

template <class T>
static void norm_rows(const NormRowsParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.T; ++t) norm_row<T>(p, t);
}

static void norm(const NormRowsParams& p) {
    ran(ISA);
    p.dtype == Dtype::f32 ? norm_rows<float>(p) : norm_rows<bf16>(p);
}

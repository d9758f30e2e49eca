// act(gate) * up on the merged projection [gate | up], or gelu(x); float32 inside, one rounding.

// e^-x is clamped rather than infinite, which moves silu only where it is below 1e-36.
static inline V silu(V x) { return x / (set1(1.0f) + exp(zero() - x)); }
static inline V gelu_erf(V x) {
    const V a = min(set1(13.0f), abs(x)), tail = normal_tail(a);
    return if_less(x, zero(), x * tail, x - a * tail);
}
static inline V gelu_tanh(V x) {
    const V inner = set1(0.79788456f) * fma(x * x * x, set1(0.044715f), x);
    return x * set1(0.5f) * (set1(1.0f) + tanh(inner));
}

template <class T, Act ACT>
static void activation_rows(const ActivationParams& p) {
    constexpr bool gated = ACT == Act::swiglu || ACT == Act::geglu_erf || ACT == Act::geglu_tanh;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.T; ++t) {
        const T* x = (const T*)p.x + t * p.x_stride;
        float* row = scratch(p.F);
        for (int64_t i = 0; i < p.F; i += W) {
            V y = load_row(x, i, p.F);
            if constexpr (ACT == Act::swiglu) y = silu(y);
            if constexpr (ACT == Act::geglu_erf || ACT == Act::gelu_erf) y = gelu_erf(y);
            if constexpr (ACT == Act::geglu_tanh || ACT == Act::gelu_tanh) y = gelu_tanh(y);
            if constexpr (gated) y = y * load_row(x + p.F, i, p.F);
            store_row(row, i, p.F, y);
        }
        write_row<T>(row, p.F, t, p.out);
    }
}

template <class T>
static void activation_of(const ActivationParams& p) {
    switch (p.act) {
        case Act::swiglu: return activation_rows<T, Act::swiglu>(p);
        case Act::geglu_erf: return activation_rows<T, Act::geglu_erf>(p);
        case Act::geglu_tanh: return activation_rows<T, Act::geglu_tanh>(p);
        case Act::gelu_erf: return activation_rows<T, Act::gelu_erf>(p);
        case Act::gelu_tanh: return activation_rows<T, Act::gelu_tanh>(p);
    }
}

static void activation(const ActivationParams& p) {
    ran(ISA);
    p.dtype == Dtype::f32 ? activation_of<float>(p) : activation_of<bf16>(p);
}

// act(gate) * up on the merged projection [gate | up], or gelu(x); float32 inside, one rounding.

// What is rounded to bfloat16 need not be exact to float32's last bit: there the approximations are shorter. They are wrong by at most
// 1e-4, absolutely for gelu and relatively for silu, a twentieth of what bfloat16 loses of a number near 1.

// x * (1/2 + clamped x * p(clamped x^2)), p [8] from the highest power; at the clamp it meets x and 0.
static inline V gelu_by(const float* p, float clamp, V x) {
    const V above = max(set1(-clamp), x), bounded = min(set1(clamp), above), u = bounded * bounded;
    V y = set1(p[0]);
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) y = fma(y, u, set1(p[i]));
    return above * fma(bounded, y, set1(0.5f));  // times x it would be some 1e-6 x far below
}

template <class T>
static inline V gelu_erf(V x) {
    if constexpr (sizeof(T) == 2) {
        constexpr float P[] = {-8.460372402652183e-10f, 7.57080726998538e-8f,    -2.9387952054094058e-6f, 6.552699051098898e-5f,
                               -9.404468000866473e-4f,  9.257820434868336e-3f,   -6.545349210500717e-2f,  0.3984200358390808f};
        return gelu_by(P, 4.25f, x);
    } else {
        const V a = min(set1(13.0f), abs(x)), tail = normal_tail(a);
        return if_less(x, zero(), x * tail, x - a * tail);
    }
}
template <class T>
static inline V gelu_tanh(V x) {
    if constexpr (sizeof(T) == 2) {
        constexpr float P[] = {-1.1368080921059232e-9f, 9.562985781030875e-8f,  -3.492263886073488e-6f, 7.349095540121198e-5f,
                               -1.0028267279267311e-3f, 9.508137591183186e-3f,  -6.58515989780426e-2f,  0.39847850799560547f};
        return gelu_by(P, 4.0f, x);
    } else {
        const V inner = set1(0.79788456f) * fma(x * x * x, set1(0.044715f), x);
        return x * set1(0.5f) * (set1(1.0f) + tanh(inner));
    }
}
// x is clamped rather than e^-x infinite, which moves silu only where it is below 1e-35.
template <class T>
static inline V silu(V x) {
    if constexpr (sizeof(T) == 2) {
        const V above = max(set1(-87.3f), x), bounded = max(set1(-126.0f), above * set1(-1.44269504f));
        const V n = round_even(bounded), r = bounded - n;
        const V p = fma(fma(fma(set1(0.05500894412398338f), r, set1(0.24221116304397583f)), r, set1(0.693282961845398f)), r, set1(1.0f));
        return above / (set1(1.0f) + ldexp(p, n));
    } else {
        return x / (set1(1.0f) + exp(zero() - x));
    }
}
// The activation of x, rounded to T afterwards; none where there is none.
template <class T, Act ACT>
static inline V activated(V x) {
    if constexpr (ACT == Act::relu) return max(zero(), x);  // in this order NaN stays
    if constexpr (ACT == Act::swiglu) return silu<T>(x);
    if constexpr (ACT == Act::geglu_erf || ACT == Act::gelu_erf) return gelu_erf<T>(x);
    if constexpr (ACT == Act::geglu_tanh || ACT == Act::gelu_tanh) return gelu_tanh<T>(x);
    return x;
}
constexpr bool is_gated(Act act) { return act == Act::swiglu || act == Act::geglu_erf || act == Act::geglu_tanh; }

template <class T, Act ACT>
static void activation_rows(const ActivationParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.T; ++t) {
        const T* x = (const T*)p.x + t * p.x_stride;
        float* row = scratch(p.F);
        for (int64_t i = 0; i < p.F; i += W) {
            V y = activated<T, ACT>(load_row(x, i, p.F));
            if constexpr (is_gated(ACT)) y = y * load_row(x + p.F, i, p.F);
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
        default: return;  // the wrapper asks for no other
    }
}

static void activation(const ActivationParams& p) {
    ran(ISA);
    p.dtype == Dtype::f32 ? activation_of<float>(p) : activation_of<bf16>(p);
}

// What each op is given: addresses, sizes and strides (in elements; the last dimension always has stride one). No torch here: the
// Python wrapper has checked dtypes, shapes and strides, so that a struct describes memory that is really there.
//
// T tokens, N sequences, D hidden size, H query heads, G key/value heads, K head dimension, F MLP width, R rotary dimensions.
#pragma once

#include <cstdint>

namespace pyembed {

enum class Dtype : int { f32 = 0, bf16 = 1 };
enum class Quant : int { none = 0, int8 = 1, fp8 = 2 };
enum class Act : int { swiglu = 0, geglu_erf = 1, geglu_tanh = 2, gelu_erf = 3, gelu_tanh = 4, relu = 5, none = 6 };
enum class Pool : int { cls = 0, max = 1, mean = 2, mean_sqrt_len_tokens = 3, weightedmean = 4, lasttoken = 5 };

struct NormParams {
    const float* weight;  // [D] or null
    const float* bias;    // [D] or null
    float eps;
    bool layer;        // LayerNorm instead of RMSNorm
    bool round_first;  // round to the activation dtype before the weight
    bool given;        // false: no norm at all (ops in which it is optional)
};

// Where a row of activations goes: as it is, or in eight bits with one scale.
struct RowsOut {
    void* values;  // [T, D] contiguous, activation dtype; int8 or float8_e4m3fn when quantised
    float* scale;  // [T], quantised only
    Quant quant;
};

struct EmbedParams {
    const int64_t* ids;  // [T]
    int64_t T, D;
    const void* tokens;  // [V, D]
    int64_t token_stride;
    float scale;
    const int64_t* positions;     // [T] or null
    const void* position_table;  // [positions, D] or null
    int64_t position_stride;
    const void* type_row;  // [D] or null
    NormParams norm;
    void* out;  // [T, D] contiguous
    Dtype dtype;
    int threads;
};

struct NormRowsParams {
    const void* x;  // [T, D]
    int64_t T, D, x_stride;
    void* residual;  // [T, D] or null, overwritten with residual + x
    int64_t residual_stride;
    NormParams norm;
    RowsOut out;
    Dtype dtype;
    int threads;
};

struct RopeParams {
    void* qkv;  // [T, (H + 2 G) * K], overwritten
    int64_t T, stride, H, G, K;
    const float* cos;  // [positions, R / 2] or null: no rotation
    const float* sin;  // [positions, R / 2]
    int64_t cos_stride, sin_stride, R;
    const int64_t* rows;  // [T]
    bool interleaved;
    NormParams q_norm, k_norm;  // weight [K]
    Dtype dtype;
    int threads;
};

// Rows of keys or values: token t, head g at data + t * token_stride + g * head_stride.
struct HeadRows {
    const void* data;  // [tokens, heads, K]
    int64_t token_stride, head_stride;
};

struct AttentionParams {
    HeadRows q;           // [Tq, H, K]
    HeadRows k, v;        // [Tk, G, K]
    int64_t H, G, K;
    const int32_t* cu_q;  // [N + 1]
    const int32_t* cu_k;  // [N + 1]
    const int32_t* tiles;  // [tiles, 2]: sequence, and which QUERY_TILE of its queries
    int64_t num_tiles;
    bool causal;
    int64_t left, right;  // window; -1: unlimited
    float scale;
    float softcap;            // 0: none
    const float* bias;        // [H, 2 * radius + 1] contiguous, or null
    int64_t radius;
    HeadRows prefix_k, prefix_v;  // [P, G, K]; data null: no prefix
    const int32_t* cu_p;          // [M + 1]
    const int32_t* prefix_of;     // [N], -1: none
    const int32_t* q_start;       // [N] or null: queries are the last positions
    void* out;                    // [Tq, H, K] contiguous
    Dtype dtype;
    int threads;
};

constexpr int QUERY_TILE = 64;     // queries of a sequence in one entry of a schedule
constexpr int64_t EXACT = 1 << 24;  // integers up to here are exact in float32, in which attention keeps positions and columns of the bias

struct ActivationParams {
    const void* x;  // [T, 2 F] = [gate | up], or [T, F] for gelu
    int64_t T, F, x_stride;
    Act act;
    RowsOut out;  // [T, F]
    Dtype dtype;
    int threads;
};

constexpr int PANEL = 32;  // columns of a panel of weights

// Weights of a linear layer, in panels: a 32-bit word holds two bfloat16 or four int8 of a column's inputs.
struct Matrix {
    const int32_t* words;  // [panels, words, PANEL]; null: no layer
    int64_t in, out, panels;  // `out`: columns of the result, half of those of the weights where `act` is gated
    bool eight_bits;
    const float* scale;   // [panels * PANEL], int8 only
    const int32_t* sums;  // [panels * PANEL] of a column's int8 weights
    const float* bias;    // [panels * PANEL] or null
    Act act;              // a gated one takes the first half of each panel's columns as gates of the second half
};

struct LinearParams {
    const void* x;  // [T, in] bfloat16
    int64_t T, x_stride;
    Matrix first, second;  // the second takes what the first gives
    NormRowsParams norm;   // of y, in place
    void* y;               // [T, out] contiguous bfloat16
    int threads;
};

struct PoolParams {
    const void* x;  // [T, D]
    int64_t D, x_stride;
    const int32_t* cu_seqlens;  // [N + 1]
    const int32_t* spans;       // [N, 2] contiguous
    int64_t N, dim;
    Pool mode;
    NormParams norm;
    bool normalize;
    float* out;  // [N, dim] contiguous
    Dtype dtype;
    int threads;
};

}  // namespace pyembed

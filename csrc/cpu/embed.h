// tokens[id] * scale + position_table[position] + type_row, then the norm; float32 inside, one rounding at the end.

template <class T>
static void embed_rows(const EmbedParams& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.T; ++t) {
        const T* token = (const T*)p.tokens + p.ids[t] * p.token_stride;
        const T* position = p.position_table ? (const T*)p.position_table + p.positions[t] * p.position_stride : nullptr;
        float* row = scratch(p.D);
        for (int64_t i = 0; i < p.D; i += W) {
            V v = load_row(token, i, p.D) * set1(p.scale);
            if (position) v = v + load_row(position, i, p.D);
            if (p.type_row) v = v + load_row((const T*)p.type_row, i, p.D);
            store_row(row, i, p.D, v);
        }
        if (p.norm.given) normalise<T>(row, p.D, p.norm);
        write_row<T>(row, p.D, t, RowsOut{p.out, nullptr, Quant::none});
    }
}

static void embed(const EmbedParams& p) {
    ran(ISA);
    p.dtype == Dtype::f32 ? embed_rows<float>(p) : embed_rows<bf16>(p);
}

/* The products of thin_linear.c for one generation of processors, included once for each, with
 *   NAME(x)   the names of this generation's functions and types
 *   LANES     floats in a register
 *   OUT, TOK  outputs and tokens whose sums stay in registers together
 *   BYTES(p), HALVES(p)  LANES int8 or uint16 numbers at `p`, as int32
 *
 * Each sum is made of LANES partial sums over the inputs, which are added up in halves, and a tail: in the same order
 * whatever the number of tokens, outputs and threads, and whatever the weights are stored in.
 */
typedef float NAME(floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t NAME(words) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE four NAME(quarter)(NAME(floats) value) { /* the halves added until four are left */
#if LANES == 16
    typedef float eight __attribute__((vector_size(32), aligned(4)));
    eight low = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7);
    eight high = __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
    low += high;
    return __builtin_shufflevector(low, low, 0, 1, 2, 3) + __builtin_shufflevector(low, low, 4, 5, 6, 7);
#elif LANES == 8
    return __builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 4, 5, 6, 7);
#else
    return value;
#endif
}

INLINE NAME(floats) NAME(load)(const void *from, int64_t at, int storage, float scale) {
    if (storage == INT8)
        return __builtin_convertvector((NAME(words))BYTES((const int8_t *)from + at), NAME(floats)) * scale;
    if (storage == BFLOAT16) return (NAME(floats))((NAME(words))HALVES((const uint16_t *)from + at) << 16);
    return *(const NAME(floats) *)((const float *)from + at);
}

/* Four sums of LANES floats each: halves added to halves, down to one. */
INLINE four NAME(totals)(NAME(floats) a, NAME(floats) b, NAME(floats) c, NAME(floats) d) {
    return folded(NAME(quarter)(a), NAME(quarter)(b), NAME(quarter)(c), NAME(quarter)(d));
}

/* The products of `num_out` outputs and `num_tok` tokens, both known when this is compiled. */
INLINE void NAME(block)(const Linear *task, const void *weight, const uint16_t *scales, int64_t output, int64_t token,
                        int num_out, int num_tok, int storage) {
    const int64_t inputs = task->inputs, groups = inputs / GROUP;
    const float *rows = task->rows + token * inputs;
    NAME(floats) sums[OUT][TOK];
    UNROLLED for (int o = 0; o < num_out; o++)
        UNROLLED for (int t = 0; t < num_tok; t++) sums[o][t] = (NAME(floats)){0};
    const int64_t whole = inputs / LANES * LANES, step = storage == INT8 ? GROUP : LANES;
    int64_t at = 0;
    while (at < whole) {
        float scale[OUT];
        UNROLLED for (int o = 0; o < num_out; o++) scale[o] = storage == INT8 ? widened(scales[o * groups + at / GROUP]) : 1;
        for (int64_t end = at + step; at < end; at += LANES) {
            NAME(floats) row[TOK];
            UNROLLED for (int t = 0; t < num_tok; t++) row[t] = NAME(load)(rows, t * inputs + at, FLOAT32, 1);
            UNROLLED for (int o = 0; o < num_out; o++) {
                __builtin_prefetch((const char *)weight + (o * inputs + at) * SIZES[storage] + PREFETCH);
                NAME(floats) column = NAME(load)(weight, o * inputs + at, storage, scale[o]);
                UNROLLED for (int t = 0; t < num_tok; t++) sums[o][t] += row[t] * column;
            }
        }
    }
    UNROLLED for (int t = 0; t < num_tok; t++) {
        four sum = NAME(totals)(sums[0][t], sums[num_out > 1][t], sums[num_out > 2 ? 2 : 0][t], sums[num_out > 3 ? 3 : 0][t]);
        if (whole < inputs)
            for (int o = 0; o < num_out; o++)
                for (int64_t rest = whole; rest < inputs; rest++)
                    sum[o] += rows[t * inputs + rest] * one_weight(weight, o * inputs + rest, storage);
        put(task, token + t, output, num_out, sum);
    }
}

INLINE void NAME(tokens)(const Linear *task, const void *weight, const uint16_t *scales, int64_t output, int num_out,
                         int storage) {
    int64_t token = 0;
    for (; token + TOK <= task->tokens; token += TOK)
        NAME(block)(task, weight, scales, output, token, num_out, TOK, storage);
    switch (task->tokens - token) {
#if TOK > 5
    case 5: NAME(block)(task, weight, scales, output, token, num_out, 5, storage); break;
    case 4: NAME(block)(task, weight, scales, output, token, num_out, 4, storage); break;
#endif
#if TOK > 3
    case 3: NAME(block)(task, weight, scales, output, token, num_out, 3, storage); break;
#endif
    case 2: NAME(block)(task, weight, scales, output, token, num_out, 2, storage); break;
    case 1: NAME(block)(task, weight, scales, output, token, num_out, 1, storage); break;
    }
}

/* Outputs `first` to `last` - 1 of all tokens; weights that several blocks use are widened once, to `scratch`. */
INLINE void NAME(outputs)(const Linear *task, int64_t first, int64_t last, float *scratch, int storage) {
    const int64_t inputs = task->inputs, groups = inputs / GROUP;
    for (int64_t output = first; output < last; output += OUT) {
        const void *weight = (const char *)task->weight + output * inputs * SIZES[storage];
        const uint16_t *scales = storage == INT8 ? task->scales + output * groups : NULL;
        int is_widened = storage != FLOAT32 && task->tokens > TOK;
        int num_out = last - output < OUT ? (int)(last - output) : OUT;
        if (is_widened) {
            int64_t whole = inputs / LANES * LANES;
            UNROLLED for (int o = 0; o < num_out; o++) {
                for (int64_t at = 0; at < whole; at += LANES) {
                    float scale = storage == INT8 ? widened(scales[o * groups + at / GROUP]) : 1;
                    NAME(floats) column = NAME(load)(weight, o * inputs + at, storage, scale);
                    *(NAME(floats) *)(scratch + o * inputs + at) = column;
                }
                for (int64_t at = whole; at < inputs; at++)
                    scratch[o * inputs + at] = one_weight(weight, o * inputs + at, storage);
            }
            weight = scratch;
        }
        if (num_out == OUT && is_widened) NAME(tokens)(task, weight, NULL, output, OUT, FLOAT32);
        else if (num_out == OUT) NAME(tokens)(task, weight, scales, output, OUT, storage);
        else
            UNROLLED for (int o = 0; o < num_out; o++) {
                const char *one = (const char *)weight + o * inputs * SIZES[is_widened ? FLOAT32 : storage];
                if (is_widened) NAME(tokens)(task, one, NULL, output + o, 1, FLOAT32);
                else NAME(tokens)(task, one, scales + o * groups, output + o, 1, storage);
            }
    }
}

static void NAME(float32)(const Linear *task, int64_t first, int64_t last, float *scratch) {
    NAME(outputs)(task, first, last, scratch, FLOAT32);
}

static void NAME(bfloat16)(const Linear *task, int64_t first, int64_t last, float *scratch) {
    NAME(outputs)(task, first, last, scratch, BFLOAT16);
}

static void NAME(int8)(const Linear *task, int64_t first, int64_t last, float *scratch) {
    NAME(outputs)(task, first, last, scratch, INT8);
}

static const Kernel NAME(kernels)[] = {NAME(float32), NAME(bfloat16), NAME(int8)};

#undef NAME
#undef LANES
#undef OUT
#undef TOK
#undef BYTES
#undef HALVES

/* Products of few rows with a frozen weight, for processors: out[t, o] = sum of rows[t, i] * weight[o, i] (+ bias[o]).
 *
 * Libraries make such products by the blocks of large ones, and read a weight of some rows at half of the memory's rate
 * or less. Here each weight is read once, in the order in which it lies, and is stored in float32, bfloat16 or int8
 * (groups of 32 inputs with a bfloat16 scale each, as in llama.cpp's Q8_0); sums are float32 in every case. An int8
 * weight gives the same bits as its dequantised float32 weight does.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

#define UNROLLED _Pragma("GCC unroll 8")
#define GROUP 32 /* inputs that share a scale */
#define PANEL 24 /* outputs that a thread computes at once, a multiple of OUT */

#define PREFETCH 8192 /* bytes ahead; the processor's own prefetching ends with each page */

enum { FLOAT32, BFLOAT16, INT8 };
static const int64_t SIZES[] = {4, 2, 1};

typedef struct {
    int64_t tokens, inputs, outputs;
    int64_t is_bfloat16;    /* bias and out; else float32 */
    const float *rows;      /* [tokens, inputs] */
    const void *weight;     /* [outputs, inputs] */
    const uint16_t *scales; /* [outputs, inputs / GROUP] bfloat16, of an int8 weight */
    const void *bias;       /* [outputs] or NULL */
    void *out;              /* [tokens, outputs] */
} Linear;

typedef void (*Kernel)(const Linear *, int64_t, int64_t, float *);

INLINE float one_weight(const void *from, int64_t at, int storage) { /* int8 weights have no tail */
    return storage == BFLOAT16 ? widened(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

/* The totals of four vectors of four: first and third, second and fourth, then both. */
INLINE four folded(four a, four b, four c, four d) {
    four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

/* The products of a token and `count` outputs, one or OUT, with their bias. */
INLINE void put(const Linear *task, int64_t token, int64_t output, int count, four sum) {
    int64_t at = token * task->outputs + output;
    if (task->is_bfloat16) {
        for (int o = 0; o < count; o++) {
            float bias = task->bias ? widened(((const uint16_t *)task->bias)[output + o]) : 0;
            ((uint16_t *)task->out)[at + o] = rounded(sum[o] + bias);
        }
        return;
    }
    if (count == 4) {
        four bias = {0};
        if (task->bias) bias = *(const four *)((const float *)task->bias + output);
        *(four *)((float *)task->out + at) = sum + bias;
    } else {
        ((float *)task->out)[at] = sum[0] + (task->bias ? ((const float *)task->bias)[output] : 0);
    }
}

#define NAME(x) any_##x
#define LANES 4
#define OUT 4
#define TOK 3
#define BYTES(p) {(p)[0], (p)[1], (p)[2], (p)[3]}
#define HALVES(p) {(p)[0], (p)[1], (p)[2], (p)[3]}
#include "thin_linear_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_GENERATIONS
#include <immintrin.h> /* for the conversions: GCC 12 makes them of vectors one number at a time */
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) avx2_##x
#define LANES 8
#define OUT 4
#define TOK 3
#define BYTES(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i_u *)(p)))
#define HALVES(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u *)(p)))
#include "thin_linear_kernel.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define NAME(x) avx512_##x
#define LANES 16
#define OUT 4
#define TOK 6
#define BYTES(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)(p)))
#define HALVES(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u *)(p)))
#include "thin_linear_kernel.h"
#pragma GCC pop_options
#endif

static Kernel kernel_of(int64_t storage, int64_t generation) {
#ifdef HAS_GENERATIONS
    if (generation > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return avx512_kernels[storage];
    if (generation > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels[storage];
#endif
    return any_kernels[storage];
}

/* 0, or 1 where there was no memory for a panel of widened weights, or for rows. */
int softprompt_thin_linear(int64_t tokens, int64_t inputs, int64_t outputs, int64_t storage, int64_t is_bfloat16,
                           int64_t generation, const void *rows, const void *weight, const void *scales,
                           const void *bias, void *out) {
    float *wide = NULL;
    if (is_bfloat16) {
        wide = malloc((size_t)(tokens * inputs) * sizeof(float));
        if (wide == NULL) return 1;
        for (int64_t at = 0; at < tokens * inputs; at++) wide[at] = widened(((const uint16_t *)rows)[at]);
    }
    const Linear task = {tokens, inputs, outputs, is_bfloat16, wide ? wide : rows, weight, scales, bias, out};
    const Kernel kernel = kernel_of(storage, generation);
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *scratch = storage == FLOAT32 ? NULL : malloc((size_t)(PANEL * inputs) * sizeof(float));
        int is_ready = storage == FLOAT32 || scratch != NULL;
        failed |= !is_ready;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; panel++) {
            int64_t first = panel * PANEL, last = first + PANEL;
            if (is_ready) kernel(&task, first, last < outputs ? last : outputs, scratch);
        }
        free(scratch);
    }
    free(wide);
    return failed;
}

/* Attention of single tokens over cached keys and values, for processors.
 *
 * The same sums as cached_attention.py, which the tests compare it with: softmax(scale * q.K + bias) V, in float32
 * whatever the buffers hold, each score and weight once, no position read that a token does not see. The softmax is
 * that of one pass over the scores of one head (they fit a processor's cache).
 *
 * A buffer is [R rows, k key heads, C positions, d], dense; a token is q [h, d], k [k, d], v [k, dv] with strides.
 * Plain C with GCC's vector extension: it compiles for any processor, and on x86 for three generations at once.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

#define LANES 16
typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t half_vec __attribute__((vector_size(32), aligned(2)));
typedef uint32_t word_vec __attribute__((vector_size(64)));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

typedef struct { /* `_Task` of cached_attention.py, field by field */
    int64_t is_bfloat16;      /* else float32: tokens, buffers and out */
    int64_t num_tokens, num_heads, num_key_heads, width, value_width;
    int64_t capacity;         /* C */
    int64_t window;           /* positions that a token sees, itself included; 0: all */
    int64_t query_token, query_head, key_token, key_head, value_token, value_head, bias_head; /* strides in numbers */
    float scale, softcap;     /* softcap 0: none */
    const int64_t *tokens;    /* [num_tokens] which of the forward's tokens */
    const int64_t *rows;      /* [num_tokens] of the buffer */
    const int64_t *positions; /* [num_tokens] of the token in its row */
    const void *query, *key, *value;
    const float *bias;        /* [h, at least C] or NULL */
    void *keys, *values;      /* the buffer */
    void *out;                /* [S, h, dv] */
} Task;

INLINE vec load(const void *from, int64_t index, int is_bfloat16) {
    vec out;
    if (is_bfloat16) {
        half_vec halves;
        memcpy(&halves, (const uint16_t *)from + index, sizeof halves);
        word_vec words = __builtin_convertvector(halves, word_vec) << 16;
        memcpy(&out, &words, sizeof out);
    } else {
        memcpy(&out, (const float *)from + index, sizeof out);
    }
    return out;
}

INLINE float load_one(const void *from, int64_t index, int is_bfloat16) {
    return is_bfloat16 ? widened(((const uint16_t *)from)[index]) : ((const float *)from)[index];
}

#if defined(__clang__) || __GNUC__ >= 12
INLINE float total(vec value) { /* halves added to halves; sums of many positions overlap */
    value += __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    value += __builtin_shufflevector(value, value, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    value += __builtin_shufflevector(value, value, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    value += __builtin_shufflevector(value, value, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return value[0];
}
#else
INLINE float total(vec value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}
#endif

INLINE float product(const float *query, const void *key, int64_t first, int64_t width, int is_bfloat16) {
    vec even = {0}, odd = {0};
    int64_t at = 0;
    for (; at + 2 * LANES <= width; at += 2 * LANES) {
        vec left, right;
        memcpy(&left, query + at, sizeof left);
        memcpy(&right, query + at + LANES, sizeof right);
        even += left * load(key, first + at, is_bfloat16);
        odd += right * load(key, first + at + LANES, is_bfloat16);
    }
    for (; at + LANES <= width; at += LANES) {
        vec left;
        memcpy(&left, query + at, sizeof left);
        even += left * load(key, first + at, is_bfloat16);
    }
    float sum = total(even + odd);
    for (; at < width; at++) sum += query[at] * load_one(key, first + at, is_bfloat16);
    return sum;
}

INLINE float sum_of(const float *numbers, int64_t count) {
    vec sums = {0};
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) sums += load(numbers, at, 0);
    float sum = total(sums);
    for (; at < count; at++) sum += numbers[at];
    return sum;
}

/* exp of numbers up to 0, to 2 units in the last place (Cephes' polynomial); -inf gives 0. */
INLINE float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float turns = bounded * 1.44269504088896341f + 12582912.0f;
    float whole = turns - 12582912.0f;
    float rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : power * scale;
}

INLINE void put(const Task *task, int64_t number) {
    size_t size = task->is_bfloat16 ? 2 : 4;
    int64_t token = task->tokens[number], row = task->rows[number] * task->num_key_heads;
    for (int64_t head = 0; head < task->num_key_heads; head++) {
        int64_t slot = (row + head) * task->capacity + task->positions[number];
        memcpy((char *)task->keys + slot * task->width * size,
               (const char *)task->key + (token * task->key_token + head * task->key_head) * size, task->width * size);
        memcpy((char *)task->values + slot * task->value_width * size,
               (const char *)task->value + (token * task->value_token + head * task->value_head) * size,
               task->value_width * size);
    }
}

/* The weighted sum of `count` times 16 numbers of each value. */
INLINE void add_up(const Task *task, int64_t first_slot, int64_t first, int64_t last, int64_t at, int count,
                   const float *shares, float *sums, int is_bfloat16) {
    vec sum[4] = {{0}, {0}, {0}, {0}};
    for (int64_t pos = first; pos <= last; pos++)
        for (int part = 0; part < count; part++)
            sum[part] += shares[pos - first] *
                         load(task->values, (first_slot + pos) * task->value_width + at + part * LANES, is_bfloat16);
    memcpy(sums + at, sum, (size_t)count * sizeof(vec));
}

INLINE void score_all(const Task *task, int64_t first_slot, int64_t first, int64_t last, int64_t head,
                      const float *restrict query, float *restrict scores, int is_bfloat16) {
    const void *keys = task->keys;
    const float scale = task->scale, softcap = task->softcap;
    const float *bias = task->bias ? task->bias + head * task->bias_head + first : NULL;
    const int64_t width = task->width, count = last - first + 1, start = first_slot + first;
    if (width == 4 * LANES) /* the usual width, for which the compiler keeps the query in registers */
        for (int64_t at = 0; at < count; at++)
            scores[at] = product(query, keys, (start + at) * 4 * LANES, 4 * LANES, is_bfloat16) * scale;
    else
        for (int64_t at = 0; at < count; at++)
            scores[at] = product(query, keys, (start + at) * width, width, is_bfloat16) * scale;
    if (softcap != 0)
        for (int64_t at = 0; at < count; at++) scores[at] = tanhf(scores[at] / softcap) * softcap;
    if (bias)
        for (int64_t at = 0; at < count; at++) scores[at] += bias[at];
}

INLINE void attend_head(const Task *task, int64_t number, int64_t head, float *scratch, int is_bfloat16) {
    int64_t token = task->tokens[number], last = task->positions[number];
    int64_t first = task->window && last + 1 > task->window ? last + 1 - task->window : 0;
    int64_t key_head = head / (task->num_heads / task->num_key_heads);
    int64_t first_slot = (task->rows[number] * task->num_key_heads + key_head) * task->capacity;
    float *query = scratch, *sums = query + task->width, *scores = sums + task->value_width;
    for (int64_t at = 0; at < task->width; at++)
        query[at] = load_one(task->query, token * task->query_token + head * task->query_head + at, is_bfloat16);
    score_all(task, first_slot, first, last, head, query, scores, is_bfloat16);
    float largest = -INFINITY;
    for (int64_t at = 0; at <= last - first; at++)
        largest = scores[at] > largest || isnan(scores[at]) ? scores[at] : largest;
    int64_t count = last - first + 1;
    for (int64_t at = 0; at < count; at++) scores[at] = exponential(scores[at] - largest);
    float mass = sum_of(scores, count);
    int64_t at = 0;
    for (; at + 4 * LANES <= task->value_width; at += 4 * LANES)
        add_up(task, first_slot, first, last, at, 4, scores, sums, is_bfloat16);
    for (; at + LANES <= task->value_width; at += LANES)
        add_up(task, first_slot, first, last, at, 1, scores, sums, is_bfloat16);
    for (; at < task->value_width; at++) {
        sums[at] = 0;
        for (int64_t pos = first; pos <= last; pos++)
            sums[at] += scores[pos - first] * load_one(task->values, (first_slot + pos) * task->value_width + at, is_bfloat16);
    }
    int64_t out_at = (token * task->num_heads + head) * task->value_width;
    for (at = 0; at < task->value_width; at++) {
        float value = isnan(largest) ? NAN : sums[at] / mass;
        if (is_bfloat16) ((uint16_t *)task->out)[out_at + at] = rounded(value);
        else ((float *)task->out)[out_at + at] = value;
    }
}

/* Cloned for each generation of processors; what OpenMP makes of a parallel region is not, so these stand outside. */
FOR_EACH_PROCESSOR void softprompt_head_float32(const Task *task, int64_t number, int64_t head, float *scratch) {
    attend_head(task, number, head, scratch, 0);
}

FOR_EACH_PROCESSOR void softprompt_head_bfloat16(const Task *task, int64_t number, int64_t head, float *scratch) {
    attend_head(task, number, head, scratch, 1);
}

int softprompt_version(void) { return 3; } /* as `VERSION` of native.py */

/* 0, or 1 where there was no memory for the scores of a head. */
int softprompt_attend(const Task *task) {
    int64_t pieces = task->num_tokens * task->num_heads;
    size_t bytes = (size_t)(task->width + task->value_width + task->capacity + LANES) * sizeof(float);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *scratch = malloc(bytes);
        failed |= scratch == NULL;
#pragma omp for schedule(static)
        for (int64_t number = 0; number < task->num_tokens; number++) put(task, number);
#pragma omp for schedule(dynamic, 4)
        for (int64_t piece = 0; piece < pieces; piece++) {
            if (scratch == NULL) continue;
            if (task->is_bfloat16)
                softprompt_head_bfloat16(task, piece / task->num_heads, piece % task->num_heads, scratch);
            else
                softprompt_head_float32(task, piece / task->num_heads, piece % task->num_heads, scratch);
        }
        free(scratch);
    }
    return failed;
}

/* RMSNorm of few rows in float32: out = weight * (row * 1 / sqrt(mean of the row's squares + epsilon)).
 *
 * A step of generation normalises a row per running sequence twice in each layer, and the six elementwise operations of
 * which the formula is made take longer to call than to compute.
 */
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define LANES 16

FOR_EACH_PROCESSOR void softprompt_rms_norm(int64_t num_rows, int64_t width, float epsilon, const float *rows,
                                            const float *weight, float *out) {
    for (int64_t row = 0; row < num_rows; row++, rows += width, out += width) {
        float parts[LANES] = {0};
        int64_t at = 0;
        for (; at + LANES <= width; at += LANES)
            for (int lane = 0; lane < LANES; lane++) parts[lane] += rows[at + lane] * rows[at + lane];
        for (; at < width; at++) parts[at % LANES] += rows[at] * rows[at];
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += parts[lane];
        float scale = 1.0f / sqrtf(sum / (float)width + epsilon);
        for (at = 0; at < width; at++) out[at] = weight[at] * (rows[at] * scale);
    }
}

/* bfloat16 numbers, for the C files of this folder. */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float widened(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float out;
    memcpy(&out, &word, 4);
    return out;
}

INLINE uint16_t rounded(float value) { /* to the nearest bfloat16, ties to even */
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

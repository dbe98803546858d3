#include "base64_kernel.h"

#ifdef SIMD_NEON_BUILT

#include <arm_neon.h>

/*
 * 64 characters at a time. vld4 deals them out to four registers, so that
 * each holds the same place of 16 groups; vst3 gathers the bytes again and
 * stores exactly the 48 that were made.
 */
#define STEP 64

struct table {
    uint8x16x4_t low, high; /* six bits of characters 0 to 63, 64 to 127 */
};

/* What is not in the alphabet wraps round to 255. */
static uint8x16x4_t load_values(const uint8_t *values)
{
    const uint8x16_t one = vdupq_n_u8(1);
    uint8x16x4_t result;
    result.val[0] = vsubq_u8(vld1q_u8(values), one);
    result.val[1] = vsubq_u8(vld1q_u8(values + 16), one);
    result.val[2] = vsubq_u8(vld1q_u8(values + 32), one);
    result.val[3] = vsubq_u8(vld1q_u8(values + 48), one);
    return result;
}

/* Six bits, or a byte above 63 for what is not in the alphabet. */
static inline uint8x16_t look_up(struct table table, uint8x16_t text)
{
    /* An index outside a table of 64 gives 0: the halves add up, and a
     * character from 128 on keeps its own top bit. */
    uint8x16_t other = veorq_u8(text, vdupq_n_u8(64));
    uint8x16_t high = vandq_u8(text, vdupq_n_u8(128));
    return vorrq_u8(vorrq_u8(vqtbl4q_u8(table.low, text),
                             vqtbl4q_u8(table.high, other)),
                    high);
}

size_t base64_bulk_neon(bool url, const uint8_t *src, size_t n, uint8_t *dst)
{
    const struct table table = {load_values(base64_values[url]),
                                load_values(base64_values[url] + 64)};
    size_t i = 0;
    while (n - i >= STEP) {
        uint8x16x4_t text = vld4q_u8(src + i);
        uint8x16_t a = look_up(table, text.val[0]);
        uint8x16_t b = look_up(table, text.val[1]);
        uint8x16_t c = look_up(table, text.val[2]);
        uint8x16_t d = look_up(table, text.val[3]);
        uint8x16_t all = vorrq_u8(vorrq_u8(a, b), vorrq_u8(c, d));
        if (vmaxvq_u8(all) > 63) {
            break;
        }
        uint8x16x3_t bytes;
        bytes.val[0] = vorrq_u8(vshlq_n_u8(a, 2), vshrq_n_u8(b, 4));
        bytes.val[1] = vorrq_u8(vshlq_n_u8(b, 4), vshrq_n_u8(c, 2));
        bytes.val[2] = vorrq_u8(vshlq_n_u8(c, 6), d);
        vst3q_u8(dst, bytes);
        i += STEP;
        dst += STEP / 4 * 3;
    }
    return i;
}

#endif

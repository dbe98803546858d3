#include "normalize_kernel.h"

#ifdef SIMD_NEON_BUILT

#include <arm_neon.h>

#define STEP 16 /* pixels; vld3 deals the channels out */

static inline float32x4_t map_values(uint16x4_t values, float scale,
                                     float bias)
{
    float32x4_t value = vcvtq_f32_u32(vmovl_u16(values));
    /* Not vfmaq: a fused sum rounds once and differs from other levels. */
    return vaddq_f32(vmulq_n_f32(value, scale), vdupq_n_f32(bias));
}

static inline void map_channel(uint8x16_t values, float scale, float bias,
                               float *dst)
{
    uint16x8_t low = vmovl_u8(vget_low_u8(values));
    uint16x8_t high = vmovl_u8(vget_high_u8(values));
    vst1q_f32(dst, map_values(vget_low_u16(low), scale, bias));
    vst1q_f32(dst + 4, map_values(vget_high_u16(low), scale, bias));
    vst1q_f32(dst + 8, map_values(vget_low_u16(high), scale, bias));
    vst1q_f32(dst + 12, map_values(vget_high_u16(high), scale, bias));
}

size_t normalize_neon(const struct normalize_map *map, const uint8_t *src,
                      size_t pixels, float *dst)
{
    size_t i = 0;
    for (; pixels - i >= STEP; i += STEP) {
        uint8x16x3_t rgb = vld3q_u8(src + i * 3);
        for (size_t c = 0; c < 3; c++) {
            map_channel(rgb.val[c], map->scale[c], map->bias[c],
                        dst + c * pixels + i);
        }
    }
    return i;
}

#endif

#include "resize_kernel.h"

#ifdef SIMD_NEON_BUILT

#include <arm_neon.h>
#include <string.h>

/* --- vertical: 16 columns at a time -------------------------------------- */

#define COLUMNS 16

static inline void add_row(const uint8_t *row, int16_t weight,
                           int32x4_t sums[4])
{
    uint8x16_t bytes = vld1q_u8(row);
    int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(bytes)));
    sums[0] = vmlal_n_s16(sums[0], vget_low_s16(low), weight);
    sums[1] = vmlal_n_s16(sums[1], vget_high_s16(low), weight);
    sums[2] = vmlal_n_s16(sums[2], vget_low_s16(high), weight);
    sums[3] = vmlal_n_s16(sums[3], vget_high_s16(high), weight);
}

static inline void store_columns(const int32x4_t sums[4], int32x4_t shift,
                                 int16_t *line)
{
    for (size_t i = 0; i < 4; i++) {
        vst1_s16(line + i * 4, vmovn_s32(vshlq_s32(sums[i], shift)));
    }
}

void resize_vertical_neon(const struct resize_rows *rows, size_t n,
                          int16_t *line)
{
    if (n < COLUMNS) {
        resize_vertical_portable(rows, n, line);
        return;
    }
    const struct resize_rows r = *rows;
    const int32x4_t half = vdupq_n_s32((int32_t)1 << r.shift >> 1);
    const int32x4_t shift = vdupq_n_s32(-r.shift); /* to the right */
    for (size_t at = 0; at < n; at += COLUMNS) {
        /* The last block does columns again rather than read behind a row. */
        at = at < n - COLUMNS ? at : n - COLUMNS;
        int32x4_t sums[4] = {half, half, half, half};
        for (size_t k = 0; k < r.n_taps; k++) {
            add_row(r.src + k * r.pitch + at, r.weights[k], sums);
        }
        store_columns(sums, shift, line + at);
    }
}

/* --- horizontal: a pixel is r g b and one value too many ------------------ */

static inline int16x4_t resize_pixel(const struct resize_axis *axis, size_t x,
                                     const int16_t *line, int32x4_t half,
                                     int32x4_t shift)
{
    const int16_t *weights = axis->weights + x * axis->stride;
    const int16_t *pixel = line + (size_t)axis->first[x] * 3;
    int32x4_t sum = half;
    for (size_t k = 0; k < axis->n_taps; k++) {
        sum = vmlal_n_s16(sum, vld1_s16(pixel + k * 3), weights[k]);
    }
    return vqmovn_s32(vshlq_s32(sum, shift));
}

static void resize_line(const struct resize_lines *lines, const int16_t *line,
                        uint8_t *dst)
{
    static const uint8_t rgb[8] = {0, 1, 2, 4, 5, 6, 255, 255};
    static const uint8_t bgr[8] = {2, 1, 0, 6, 5, 4, 255, 255};
    const uint8x8_t order = vld1_u8(lines->swap ? bgr : rgb);
    const int32x4_t half = vdupq_n_s32((int32_t)1 << lines->shift >> 1);
    const int32x4_t shift = vdupq_n_s32(-lines->shift);
    const struct resize_axis axis = *lines->axis;
    const size_t n = axis.span.n_out;
    for (size_t x = 0; x < n; x += 2) {
        /* Of an odd number of pixels, the last one is done alone. */
        size_t next = x + 1 < n ? x + 1 : x;
        int16x4_t left = resize_pixel(&axis, x, line, half, shift);
        int16x4_t right = resize_pixel(&axis, next, line, half, shift);
        uint8x8_t bytes = vqmovun_s16(vcombine_s16(left, right));
        uint8_t pixels[8];
        vst1_u8(pixels, vtbl1_u8(bytes, order));
        memcpy(dst + x * 3, pixels, next > x ? 6 : 3);
    }
}

void resize_horizontal_neon(const struct resize_lines *lines, uint8_t *dst)
{
    for (size_t i = 0; i < lines->n_lines; i++) {
        resize_line(lines, lines->src + i * lines->pitch,
                    dst + i * lines->dst_pitch);
    }
}

#endif

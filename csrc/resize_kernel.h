/*
 * The two passes of a resize, and the variants of each; for resize*.c only.
 *
 * Vertical: n bytes of n_taps rows, `pitch` bytes apart, become one line of
 * n int16 values, (sum + half) >> shift. It reads no byte outside the rows and
 * may write RESIZE_LINE_SLACK values behind the line.
 *
 * Horizontal: lines of interleaved RGB become as many rows of
 * axis.span.n_out pixels. It may read RESIZE_LINE_SLACK values behind each
 * line, and writes nothing outside the rows.
 */
#ifndef EVMP_RESIZE_KERNEL_H
#define EVMP_RESIZE_KERNEL_H

#include "resize_axis.h"

#define RESIZE_LINE_SLACK 64
#define RESIZE_LINES 4 /* lines in the workspace */

struct resize_rows {
    const uint8_t *src;
    size_t pitch;
    const int16_t *weights; /* of n_taps made even */
    size_t n_taps;
    int shift;
};

struct resize_lines {
    const int16_t *src; /* pixel 0 of the input of `axis` */
    size_t pitch;       /* in values */
    size_t n_lines;     /* 1 to RESIZE_LINES */
    const struct resize_axis *axis;
    int shift;
    bool swap;
    size_t dst_pitch; /* in bytes */
};

typedef void resize_vertical(const struct resize_rows *rows, size_t n,
                             int16_t *line);
typedef void resize_horizontal(const struct resize_lines *lines,
                               uint8_t *dst);

resize_vertical resize_vertical_portable;
resize_vertical resize_vertical_avx2;
resize_vertical resize_vertical_neon;
resize_horizontal resize_horizontal_portable;
resize_horizontal resize_horizontal_avx2;
resize_horizontal resize_horizontal_neon;

static inline uint8_t resize_clip(int32_t value)
{
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

#endif

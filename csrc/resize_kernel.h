/*
 * The two passes of a resize, and the variants of each; for resize*.c only.
 *
 * Vertical: n bytes of n_taps rows become one line of n values, each
 * (sum + half) >> shift. Nothing outside the rows and the line is touched.
 *
 * Horizontal: lines of interleaved RGB become as many rows of pixels. Up to
 * RESIZE_LINE_SLACK values behind a line are read, and do not matter; nothing
 * outside the rows is written.
 */
#ifndef EVMP_RESIZE_KERNEL_H
#define EVMP_RESIZE_KERNEL_H

#include "resize_axis.h"

#define RESIZE_LINES 4 /* lines that the horizontal pass takes at a time */
#define RESIZE_LINE_SLACK 16
#define RESIZE_PAIR_BYTES 64 /* scratch for each two pixels of a line */

struct resize_rows {
    const uint8_t *src;
    size_t pitch;           /* bytes from row to row */
    const int16_t *weights; /* n_taps, and a zero behind an odd number */
    size_t n_taps;
    int shift;
};

struct resize_lines {
    const int16_t *src; /* pixel 0 of the first line */
    size_t pitch;       /* values from line to line */
    size_t n_lines;     /* 1 to RESIZE_LINES */
    const struct resize_axis *axis; /* aligned to 2 pixels */
    int shift;
    bool swap;
    size_t dst_pitch; /* bytes from row to row */
    void *scratch;    /* RESIZE_PAIR_BYTES per pair, aligned to 64 bytes */
};

typedef void resize_vertical(const struct resize_rows *rows, size_t n,
                             int16_t *line);
typedef void resize_horizontal(const struct resize_lines *lines,
                               uint8_t *dst);

resize_vertical resize_vertical_portable;
resize_vertical resize_vertical_neon;
resize_vertical resize_vertical_avx2;
resize_vertical resize_vertical_avx512;
resize_horizontal resize_horizontal_portable;
resize_horizontal resize_horizontal_neon;
resize_horizontal resize_horizontal_avx2;
resize_horizontal resize_horizontal_avx512;

/* The input pixels [first, last) that the outputs of an axis look at. */
static inline size_t resize_first(const struct resize_axis *axis)
{
    return axis->first[0];
}

static inline size_t resize_last(const struct resize_axis *axis)
{
    return axis->first[axis->span.n_out - 1] + axis->n_taps;
}

#endif

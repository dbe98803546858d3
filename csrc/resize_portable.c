#include <string.h>

#include "resize_kernel.h"

/*
 * Columns whose sums stay in the cache. Compilers turn a loop over so many
 * into vectors; one over 16 they would first unroll, and then see none in it.
 */
#define BLOCK 64

static void add_block(const struct resize_rows *rows, size_t at, size_t n,
                      int32_t *sums)
{
    for (size_t k = 0; k < rows->n_taps; k++) {
        const int16_t weight = rows->weights[k];
        const uint8_t *row = rows->src + k * rows->pitch + at;
        for (size_t i = 0; i < n; i++) {
            sums[i] += weight * row[i];
        }
    }
}

void resize_vertical_portable(const struct resize_rows *rows, size_t n,
                              int16_t *line)
{
    const int32_t half = (int32_t)1 << rows->shift >> 1;
    for (size_t at = 0; at < n; at += BLOCK) {
        int32_t sums[BLOCK];
        size_t n_block = n - at < BLOCK ? n - at : BLOCK;
        for (size_t i = 0; i < BLOCK; i++) {
            sums[i] = half;
        }
        /* A constant number of columns leaves vectors no remainder. */
        if (n_block == BLOCK) {
            add_block(rows, at, BLOCK, sums);
        } else {
            add_block(rows, at, n_block, sums);
        }
        for (size_t i = 0; i < n_block; i++) {
            line[at + i] = (int16_t)(sums[i] >> rows->shift);
        }
    }
}

static uint8_t clip(int32_t value)
{
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/*
 * The lines side by side, each pixel's values of all of them in a row: what
 * the weights are multiplied with is then what a vector loads. The last few
 * values of a row are nothing, and zero.
 */
#define SIDE 16
_Static_assert(3 * RESIZE_LINES <= SIDE &&
                   2 * SIDE * sizeof(int16_t) <= RESIZE_PAIR_BYTES,
               "the scratch holds a row for each pixel");

static void interleave(const struct resize_lines *lines, int16_t *values)
{
    const size_t first = resize_first(lines->axis);
    const size_t last = resize_last(lines->axis);
    memset(values + first * SIDE, 0, (last - first) * SIDE * sizeof *values);
    for (size_t i = 0; i < lines->n_lines; i++) {
        const int16_t *line = lines->src + i * lines->pitch;
        for (size_t x = first; x < last; x++) {
            memcpy(values + x * SIDE + i * 3, line + x * 3, 3 * sizeof *line);
        }
    }
}

static void add_side(int16_t weight, const int16_t *values, int32_t *sums)
{
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 1 /* or it is unrolled before it can become vectors */
#endif
    for (size_t i = 0; i < SIDE; i++) {
        sums[i] += weight * values[i];
    }
}

void resize_horizontal_portable(const struct resize_lines *lines,
                                uint8_t *dst)
{
    const struct resize_axis axis = *lines->axis;
    const int32_t half = (int32_t)1 << lines->shift >> 1;
    const size_t red = lines->swap ? 2 : 0;
    int16_t *values = lines->scratch;
    interleave(lines, values);
    for (size_t x = 0; x < axis.span.n_out; x++) {
        const int16_t *weights = axis.weights + x * axis.stride;
        const int16_t *pixel = values + (size_t)axis.first[x] * SIDE;
        int32_t sums[SIDE];
        for (size_t i = 0; i < SIDE; i++) {
            sums[i] = half;
        }
        for (size_t k = 0; k < axis.n_taps; k++) {
            add_side(weights[k], pixel + k * SIDE, sums);
        }
        for (size_t i = 0; i < lines->n_lines; i++) {
            uint8_t *to = dst + i * lines->dst_pitch + x * 3;
            to[red] = clip(sums[i * 3] >> lines->shift);
            to[1] = clip(sums[i * 3 + 1] >> lines->shift);
            to[2 - red] = clip(sums[i * 3 + 2] >> lines->shift);
        }
    }
}

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

static void resize_line(struct resize_axis axis, int shift, bool swap,
                        const int16_t *src, uint8_t *dst)
{
    const int32_t half = (int32_t)1 << shift >> 1;
    const size_t red = swap ? 2 : 0;
    for (size_t x = 0; x < axis.span.n_out; x++, dst += 3) {
        const int16_t *weights = axis.weights + x * axis.stride;
        const int16_t *pixel = src + (size_t)axis.first[x] * 3;
        int32_t sums[3] = {half, half, half};
        for (size_t k = 0; k < axis.n_taps; k++, pixel += 3) {
            sums[0] += weights[k] * pixel[0];
            sums[1] += weights[k] * pixel[1];
            sums[2] += weights[k] * pixel[2];
        }
        dst[red] = clip(sums[0] >> shift);
        dst[1] = clip(sums[1] >> shift);
        dst[2 - red] = clip(sums[2] >> shift);
    }
}

void resize_horizontal_portable(const struct resize_lines *lines,
                                uint8_t *dst)
{
    for (size_t i = 0; i < lines->n_lines; i++) {
        resize_line(*lines->axis, lines->shift, lines->swap,
                    lines->src + i * lines->pitch, dst + i * lines->dst_pitch);
    }
}

/*
 * The weights of one axis of a resize, as integers.
 *
 * Output i is the sum over k < n_taps of
 *
 *     weights[i * stride + k] * input[first[i] + k]  /  2 ** bits
 *
 * Every window lies inside the input: first[i] + n_taps <= n_in. The stride
 * is n_taps made even, the weight behind an odd n_taps is zero. The weights
 * of an output add up to exactly 2 ** bits, so a flat image stays flat.
 */
#ifndef EVMP_RESIZE_AXIS_H
#define EVMP_RESIZE_AXIS_H

#include "resize.h"

struct resize_span {
    double start, stop; /* in input pixels, 0 <= start < stop <= n_in */
    size_t n_in, n_out;
    enum resize_filter filter;
    int max_bits;
};

/* A block of memory that grows and is used again. */
struct resize_block {
    void *data; /* aligned to 64 bytes */
    size_t bytes;
};

struct resize_axis {
    struct resize_span span; /* what the weights below are for */
    size_t n_taps, stride;
    int bits;
    double gain; /* the largest sum of |weights| of an output / 2 ** bits */
    uint32_t *first;  /* n_out */
    int16_t *weights; /* n_out * stride */
    struct resize_block integers, exact; /* exact: weights before rounding */
};

/* Compute the weights, unless the axis holds them. False: out of memory. */
bool resize_axis_set(struct resize_axis *axis, const struct resize_span *span);
void resize_axis_clear(struct resize_axis *axis);

/* Make a block at least `bytes` long; the contents are lost if it grows. */
bool resize_block_grow(struct resize_block *block, size_t bytes);

#endif

/*
 * The weights of one axis of a resize, as integers.
 *
 * Output i is the sum over k < n_taps of
 *
 *     weights[i * stride + k] * input[first[i] + k]  /  2 ** bits
 *
 * first[i] and n_taps are multiples of `align`, first[] never falls, and
 * first[i] + n_taps is at most n_in, rounded up to a multiple of align. The
 * stride is n_taps made even; what lies behind an odd n_taps, as every weight
 * that alignment adds, is zero. The weights of an output add up to exactly
 * 2 ** bits, so a flat image stays flat.
 */
#ifndef EVMP_RESIZE_AXIS_H
#define EVMP_RESIZE_AXIS_H

#include "resize.h"

struct resize_span {
    double start, stop; /* in input pixels, 0 <= start < stop <= n_in */
    size_t n_in, n_out;
    size_t align; /* 1 or 2 */
    enum resize_filter filter;
    int max_bits;
};

/* Memory that grows and is used again. */
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

/* Make a block at least `bytes` long; if it grows, all of it is zero. */
bool resize_block_grow(struct resize_block *block, size_t bytes);

#endif

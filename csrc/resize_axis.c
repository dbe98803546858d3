#include "resize_axis.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LINE 64 /* the widest vector, and a cache line */

bool resize_block_grow(struct resize_block *block, size_t bytes)
{
    if (bytes <= block->bytes) {
        return true;
    }
    free(block->data);
    size_t rounded = (bytes + LINE - 1) / LINE * LINE;
    block->data = aligned_alloc(LINE, rounded);
    block->bytes = block->data == NULL ? 0 : rounded;
    return block->data != NULL;
}

static double weigh(enum resize_filter filter, double x)
{
    x = fabs(x);
    if (filter == RESIZE_BILINEAR) {
        return x < 1.0 ? 1.0 - x : 0.0;
    }
    if (x < 1.0) {
        return (1.5 * x - 2.5) * x * x + 1.0;
    }
    return x < 2.0 ? ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 : 0.0;
}

/* How the filter lies over the input. */
struct geometry {
    double step;  /* input pixels between two outputs */
    double scale; /* input pixels per unit of the filter, at least one */
    double reach; /* half the filter's width in input pixels */
};

static struct geometry geometry_of(const struct resize_span *span)
{
    double step = (span->stop - span->start) / (double)span->n_out;
    double scale = step > 1.0 ? step : 1.0;
    double support = span->filter == RESIZE_BICUBIC ? 2.0 : 1.0;
    return (struct geometry){step, scale, support * scale};
}

/* The input pixels [first, last) under the filter of output i. */
struct window {
    double centre;
    size_t first, last;
};

static struct window window_of(const struct resize_span *span,
                               const struct geometry *geometry, size_t i)
{
    double centre = span->start + ((double)i + 0.5) * geometry->step;
    double low = centre - geometry->reach + 0.5;
    double high = centre + geometry->reach + 0.5;
    size_t first = low > 0.0 ? (size_t)low : 0;
    size_t last = high < (double)span->n_in ? (size_t)high : span->n_in;
    assert(first < last);
    return (struct window){centre, first, last};
}

static size_t most_taps(const struct resize_span *span,
                        const struct geometry *geometry)
{
    size_t most = 1;
    for (size_t i = 0; i < span->n_out; i++) {
        struct window window = window_of(span, geometry, i);
        size_t n_taps = window.last - window.first;
        most = n_taps > most ? n_taps : most;
    }
    return most;
}

/*
 * Write the n_taps weights of output i, adding up to one, and where they
 * begin. A window at the right edge moves left, behind leading zeros, so that
 * n_taps always fit. Returns the largest weight.
 */
static double weigh_output(struct resize_axis *axis,
                           const struct geometry *geometry, size_t i,
                           double *exact)
{
    const struct resize_span *span = &axis->span;
    struct window window = window_of(span, geometry, i);
    size_t first = window.first < span->n_in - axis->n_taps
                       ? window.first
                       : span->n_in - axis->n_taps;
    axis->first[i] = (uint32_t)first;
    double sum = 0.0;
    for (size_t k = 0; k < axis->n_taps; k++) {
        size_t at = first + k;
        double x = ((double)at + 0.5 - window.centre) / geometry->scale;
        bool is_inside = at >= window.first && at < window.last;
        exact[k] = is_inside ? weigh(span->filter, x) : 0.0;
        sum += exact[k];
    }
    double largest = 0.0;
    for (size_t k = 0; k < axis->n_taps; k++) {
        exact[k] /= sum;
        largest = exact[k] > largest ? exact[k] : largest;
    }
    return largest;
}

/* As many bits as the largest weight and the sums of the pass allow. */
static int choose_bits(const struct resize_axis *axis, double largest)
{
    /* Rounding moves at most half a unit per tap onto one weight. */
    double slack = 1.0 + 0.5 * (double)axis->n_taps;
    int bits = 1;
    while (bits < axis->span.max_bits &&
           ldexp(largest, bits + 1) + slack <= INT16_MAX) {
        bits++;
    }
    return bits;
}

/* Round the weights of one output; the largest takes what is left over. */
static double round_output(const struct resize_axis *axis,
                           const double *exact, int16_t *weights)
{
    int32_t left = (int32_t)1 << axis->bits;
    double gain = 0.0;
    size_t largest = 0;
    for (size_t k = 0; k < axis->n_taps; k++) {
        double scaled = ldexp(exact[k], axis->bits);
        weights[k] = (int16_t)(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5);
        left -= weights[k];
        largest = exact[k] > exact[largest] ? k : largest;
    }
    weights[largest] = (int16_t)(weights[largest] + left);
    for (size_t k = 0; k < axis->n_taps; k++) {
        gain += fabs((double)weights[k]);
    }
    for (size_t k = axis->n_taps; k < axis->stride; k++) {
        weights[k] = 0;
    }
    return ldexp(gain, -axis->bits);
}

static bool reserve(struct resize_axis *axis)
{
    size_t n_out = axis->span.n_out;
    size_t integers;
    size_t exact;
    if (__builtin_mul_overflow(n_out, axis->stride * sizeof(double), &exact) ||
        __builtin_add_overflow(exact, n_out * sizeof(uint32_t), &integers)) {
        return false;
    }
    if (!resize_block_grow(&axis->exact, exact) ||
        !resize_block_grow(&axis->integers, integers)) {
        return false;
    }
    axis->first = axis->integers.data;
    axis->weights = (int16_t *)(axis->first + n_out);
    return true;
}

static bool is_same(const struct resize_span *a, const struct resize_span *b)
{
    return a->start == b->start && a->stop == b->stop && a->n_in == b->n_in &&
           a->n_out == b->n_out && a->filter == b->filter &&
           a->max_bits == b->max_bits;
}

bool resize_axis_set(struct resize_axis *axis, const struct resize_span *span)
{
    if (is_same(&axis->span, span)) {
        return true;
    }
    struct geometry geometry = geometry_of(span);
    axis->span = *span;
    axis->n_taps = most_taps(span, &geometry);
    axis->stride = (axis->n_taps + 1) & ~(size_t)1;
    if (!reserve(axis)) {
        axis->span = (struct resize_span){0};
        return false;
    }
    double *exact = axis->exact.data;
    double largest = 0.0;
    for (size_t i = 0; i < span->n_out; i++) {
        double most = weigh_output(axis, &geometry, i, exact + i * axis->stride);
        largest = most > largest ? most : largest;
    }
    axis->bits = choose_bits(axis, largest);
    axis->gain = 0.0;
    for (size_t i = 0; i < span->n_out; i++) {
        size_t at = i * axis->stride;
        double gain = round_output(axis, exact + at, axis->weights + at);
        axis->gain = gain > axis->gain ? gain : axis->gain;
    }
    return true;
}

void resize_axis_clear(struct resize_axis *axis)
{
    free(axis->integers.data);
    free(axis->exact.data);
    memset(axis, 0, sizeof *axis);
}

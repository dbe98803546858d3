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
    if (block->data != NULL) {
        memset(block->data, 0, rounded);
    }
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
    double scale; /* units of the filter per input pixel, at most one */
    double reach; /* half the filter's width in input pixels */
};

static struct geometry geometry_of(const struct resize_span *span)
{
    double step = (span->stop - span->start) / (double)span->n_out;
    double stretch = step > 1.0 ? step : 1.0;
    double support = span->filter == RESIZE_BICUBIC ? 2.0 : 1.0;
    return (struct geometry){step, 1.0 / stretch, support * stretch};
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

/* floor() without a call, for what an int32 holds. */
static int32_t floor_to_int(double x)
{
    int32_t n = (int32_t)x;
    return n - (x < (double)n);
}

static size_t round_down(size_t n, size_t align)
{
    return n - n % align;
}

static size_t round_up(size_t n, size_t align)
{
    return round_down(n + align - 1, align);
}

static size_t most_taps(const struct resize_span *span,
                        const struct geometry *geometry)
{
    size_t most = 1;
    for (size_t i = 0; i < span->n_out; i++) {
        struct window window = window_of(span, geometry, i);
        size_t n_taps = window.last - round_down(window.first, span->align);
        most = n_taps > most ? n_taps : most;
    }
    return round_up(most, span->align);
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
    const struct window window = window_of(span, geometry, i);
    size_t first = round_down(window.first, span->align);
    size_t limit = round_up(span->n_in, span->align) - axis->n_taps;
    first = first < limit ? first : limit;
    axis->first[i] = (uint32_t)first;
    double sum = 0.0;
    double largest = 0.0;
    memset(exact, 0, axis->n_taps * sizeof *exact);
    for (size_t at = window.first; at < window.last; at++) {
        double x = ((double)at + 0.5 - window.centre) * geometry->scale;
        double weight = weigh(span->filter, x);
        exact[at - first] = weight;
        sum += weight;
        largest = weight > largest ? weight : largest;
    }
    double unit = 1.0 / sum;
    for (size_t k = 0; k < axis->n_taps; k++) {
        exact[k] *= unit;
    }
    return largest * unit;
}

/* As many bits as the largest weight, rounded up, leaves in an int16. */
static int choose_bits(const struct resize_axis *axis, double largest)
{
    int bits = 1;
    while (bits < axis->span.max_bits &&
           ldexp(largest, bits + 1) + 1.0 <= INT16_MAX) {
        bits++;
    }
    return bits;
}

/*
 * Round the weights of one output. It is their running sum that is rounded,
 * so the sum is exact, and so are, nearly, the sums over any part: errors of
 * neighbours cancel out. Returns the sum of the absolute values.
 */
static int32_t round_output(const struct resize_axis *axis,
                            const double *exact, int16_t *weights)
{
    const double one = (double)((int32_t)1 << axis->bits);
    double sum = 0.5;
    int32_t before = 0;
    int32_t gain = 0;
    memset(weights, 0, axis->stride * sizeof *weights);
    for (size_t k = 0; k < axis->n_taps; k++) {
        sum += exact[k] * one;
        int32_t rounded = floor_to_int(sum);
        weights[k] = (int16_t)(rounded - before);
        gain += abs(weights[k]);
        before = rounded;
    }
    return gain;
}

static bool reserve(struct resize_axis *axis)
{
    size_t n_out = axis->span.n_out;
    size_t exact;
    size_t integers;
    if (__builtin_mul_overflow(n_out, axis->stride * sizeof(double), &exact) ||
        __builtin_mul_overflow(n_out,
                               axis->stride * sizeof(int16_t) +
                                   sizeof(uint32_t), &integers)) {
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

static void compute(struct resize_axis *axis, const struct geometry *geometry)
{
    double *exact = axis->exact.data;
    double largest = 0.0;
    for (size_t i = 0; i < axis->span.n_out; i++) {
        double most =
            weigh_output(axis, geometry, i, exact + i * axis->stride);
        largest = most > largest ? most : largest;
    }
    axis->bits = choose_bits(axis, largest);
    int32_t gain = 0;
    for (size_t i = 0; i < axis->span.n_out; i++) {
        size_t at = i * axis->stride;
        int32_t sum = round_output(axis, exact + at, axis->weights + at);
        gain = sum > gain ? sum : gain;
    }
    axis->gain = ldexp((double)gain, -axis->bits);
}

static bool is_same(const struct resize_span *a, const struct resize_span *b)
{
    return a->start == b->start && a->stop == b->stop && a->n_in == b->n_in &&
           a->n_out == b->n_out && a->align == b->align &&
           a->filter == b->filter && a->max_bits == b->max_bits;
}

bool resize_axis_set(struct resize_axis *axis, const struct resize_span *span)
{
    if (is_same(&axis->span, span)) {
        return true;
    }
    const struct geometry geometry = geometry_of(span);
    axis->span = *span;
    axis->n_taps = most_taps(span, &geometry);
    axis->stride = round_up(axis->n_taps, 2);
    if (!reserve(axis)) {
        axis->span = (struct resize_span){0};
        return false;
    }
    compute(axis, &geometry);
    return true;
}

void resize_axis_clear(struct resize_axis *axis)
{
    free(axis->integers.data);
    free(axis->exact.data);
    memset(axis, 0, sizeof *axis);
}

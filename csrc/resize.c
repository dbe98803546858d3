/*
 * Note [Fixed point]
 *
 * The vertical pass comes first: it is the one that vectors do best, and then
 * no image is kept in between, only RESIZE_LINES lines. A value is
 *
 *     uint8 --vertical--> int16 with `fraction` bits --horizontal--> uint8
 *
 * Weights have as many bits as int16 holds, so those of wide filters, which
 * are small, have more. The int32 sums must hold
 * 255 * gain * 2**fraction * gain * 2**bits, where a gain is 1 (bilinear) to
 * 1.3 (bicubic), which leaves 22 bits for fraction and horizontal weights.
 *
 * Errors before the last rounding, in grey levels: 0.5 * 2**-fraction for a
 * line, and for the weights of a pass with n taps 127.5 * n * 2**-bits, as no
 * part of the weights of an output is off by more than half a unit. These are
 * the limits, for images that alternate between 0 and 255 against the filter;
 * in noise the errors are ten times smaller.
 */
#include "resize.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "resize_kernel.h"

#define SUM_MAX ((double)INT32_MAX)
#define VERTICAL_MAX_BITS 22   /* 255 * gain * 2**22 fits, for a gain < 2 */
#define HORIZONTAL_MAX_BITS 17 /* leaves 5 bits for the fraction */

struct resize_workspace {
    struct resize_axis vertical, horizontal;
    struct resize_block lines, scratch;
};

struct kernels {
    resize_vertical *vertical;
    resize_horizontal *horizontal;
};

static struct kernels kernels_for(enum simd_level level)
{
    switch (level) {
#ifdef SIMD_X86
    case SIMD_AVX2:
        return (struct kernels){resize_vertical_avx2, resize_horizontal_avx2};
    case SIMD_AVX512:
        return (struct kernels){resize_vertical_avx512,
                                resize_horizontal_avx512};
#endif
#ifdef SIMD_NEON_BUILT
    case SIMD_NEON:
        return (struct kernels){resize_vertical_neon, resize_horizontal_neon};
#endif
    default:
        return (struct kernels){resize_vertical_portable,
                                resize_horizontal_portable};
    }
}

struct resize_workspace *resize_workspace_new(void)
{
    return calloc(1, sizeof(struct resize_workspace));
}

void resize_workspace_free(struct resize_workspace *workspace)
{
    if (workspace != NULL) {
        resize_axis_clear(&workspace->vertical);
        resize_axis_clear(&workspace->horizontal);
        free(workspace->lines.data);
        free(workspace->scratch.data);
        free(workspace);
    }
}

size_t resize_workspace_bytes(const struct resize_workspace *workspace)
{
    return workspace->vertical.integers.bytes +
           workspace->vertical.exact.bytes +
           workspace->horizontal.integers.bytes +
           workspace->horizontal.exact.bytes + workspace->lines.bytes +
           workspace->scratch.bytes;
}

static void fill_pixels(uint8_t *dst, size_t n, const uint8_t pixel[3])
{
    for (size_t i = 0; i < n; i++) {
        memcpy(dst + i * 3, pixel, 3);
    }
}

/* Fill dst around the rectangle. */
static void fill_around(const struct resize_request *r)
{
    const uint8_t swapped[3] = {r->fill[2], r->fill[1], r->fill[0]};
    const uint8_t *pixel = r->swap ? swapped : r->fill;
    const size_t right = r->into_left + r->into_width;
    const size_t bottom = r->into_top + r->into_height;
    fill_pixels(r->dst, r->into_top * r->dst_width, pixel);
    for (size_t y = r->into_top; y < bottom; y++) {
        uint8_t *row = r->dst + y * r->dst_width * 3;
        fill_pixels(row, r->into_left, pixel);
        fill_pixels(row + right * 3, r->dst_width - right, pixel);
    }
    fill_pixels(r->dst + bottom * r->dst_width * 3,
                (r->dst_height - bottom) * r->dst_width, pixel);
}

/* The bits behind the point of a line: the most that int16 and int32 hold. */
static int choose_fraction(const struct resize_axis *vertical,
                           const struct resize_axis *horizontal)
{
    int fraction = 0;
    for (int more = 1; more <= 7; more++) {
        double line = 255.0 * vertical->gain * (double)(1 << more);
        double sum = line * horizontal->gain *
                     (double)((int32_t)1 << horizontal->bits);
        double half = (double)((int32_t)1 << (more + horizontal->bits));
        if (line + 1.0 <= INT16_MAX && sum + half <= SUM_MAX) {
            fraction = more;
        }
    }
    return fraction;
}

static bool set_axes(struct resize_workspace *workspace,
                     const struct resize_request *r)
{
    const struct resize_span vertical = {
        .start = r->top,
        .stop = r->bottom,
        .n_in = r->src_height,
        .n_out = r->into_height,
        .align = 1,
        .filter = r->filter,
        .max_bits = VERTICAL_MAX_BITS,
    };
    const struct resize_span horizontal = {
        .start = r->left,
        .stop = r->right,
        .n_in = r->src_width,
        .n_out = r->into_width,
        .align = 2,
        .filter = r->filter,
        .max_bits = HORIZONTAL_MAX_BITS,
    };
    return resize_axis_set(&workspace->vertical, &vertical) &&
           resize_axis_set(&workspace->horizontal, &horizontal);
}

/* Values from line to line: whole pairs of pixels, slack, whole vectors. */
static size_t line_pitch(size_t width)
{
    return ((width + 1) * 3 + RESIZE_LINE_SLACK + 31) / 32 * 32;
}

static bool reserve(struct resize_workspace *workspace, size_t width)
{
    return resize_block_grow(&workspace->lines,
                             line_pitch(width) * RESIZE_LINES *
                                 sizeof(int16_t)) &&
           resize_block_grow(&workspace->scratch,
                             (width + 1) / 2 * RESIZE_PAIR_BYTES);
}

static void run(struct kernels kernels, struct resize_workspace *workspace,
                const struct resize_request *r)
{
    const struct resize_axis *vertical = &workspace->vertical;
    const struct resize_axis *horizontal = &workspace->horizontal;
    const int fraction = choose_fraction(vertical, horizontal);
    const size_t src_pitch = r->src_width * 3;
    const size_t dst_pitch = r->dst_width * 3;
    struct resize_rows rows = {
        .pitch = src_pitch,
        .n_taps = vertical->n_taps,
        .shift = vertical->bits - fraction,
    };
    struct resize_lines lines = {
        .src = workspace->lines.data,
        .pitch = line_pitch(r->src_width),
        .axis = horizontal,
        .shift = horizontal->bits + fraction,
        .swap = r->swap,
        .dst_pitch = dst_pitch,
        .scratch = workspace->scratch.data,
    };
    /* Only the columns that are looked at; the last pair may lack one. */
    const size_t first = resize_first(horizontal) * 3;
    const size_t end = resize_last(horizontal) * 3;
    const size_t n_values = (end < src_pitch ? end : src_pitch) - first;
    int16_t *line = (int16_t *)workspace->lines.data + first;
    uint8_t *dst = r->dst + r->into_top * dst_pitch + r->into_left * 3;
    for (size_t y = 0; y < r->into_height; y += lines.n_lines) {
        size_t left = r->into_height - y;
        lines.n_lines = left < RESIZE_LINES ? left : RESIZE_LINES;
        for (size_t i = 0; i < lines.n_lines; i++) {
            rows.src = r->src + vertical->first[y + i] * src_pitch + first;
            rows.weights = vertical->weights + (y + i) * vertical->stride;
            kernels.vertical(&rows, n_values, line + i * lines.pitch);
        }
        kernels.horizontal(&lines, dst + y * dst_pitch);
    }
}

bool resize(enum simd_level level, struct resize_workspace *workspace,
            const struct resize_request *request)
{
    assert(simd_is_supported(level));
    if (!set_axes(workspace, request) ||
        !reserve(workspace, request->src_width)) {
        return false;
    }
    fill_around(request);
    run(kernels_for(level), workspace, request);
    return true;
}

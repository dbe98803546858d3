/*
 * Note [Fixed point]
 *
 * The vertical pass comes first: it is the one that vectors do best, and then
 * no image is kept in between, only RESIZE_LINES lines. A value is
 *
 *     uint8 --vertical--> int16 with `fraction` bits --horizontal--> uint8
 *
 * Weights have as many bits as int16 holds, so wide filters, whose weights
 * are small, have more of them. int32 sums must hold
 * 255 * gain * 2**fraction * gain * 2**bits, which leaves 22 bits for
 * fraction and the horizontal weights together. Errors, in grey levels, of a
 * pass with n taps: at most 0.5 * 2**-fraction for the line, and for the
 * weights 127.5 * n * 2**-(bits + 1), as each is off by half a unit and the
 * sum by none.
 */
#include "resize.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "resize_kernel.h"

#define SUM_MAX ((double)INT32_MAX)
#define VERTICAL_MAX_BITS 22   /* 255 * gain * 2**22 fits, for a gain < 2 */
#define HORIZONTAL_MAX_BITS 18 /* leaves 4 bits for the fraction */

struct resize_workspace {
    struct resize_axis vertical, horizontal;
    struct resize_block lines;
};

struct kernels {
    resize_vertical *vertical;
    resize_horizontal *horizontal;
};

static struct kernels kernels_for(enum simd_level level)
{
    (void)level;
    return (struct kernels){resize_vertical_portable,
                            resize_horizontal_portable};
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
        free(workspace);
    }
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
        r->top, r->bottom, r->src_height, r->into_height, r->filter,
        VERTICAL_MAX_BITS,
    };
    const struct resize_span horizontal = {
        r->left, r->right, r->src_width, r->into_width, r->filter,
        HORIZONTAL_MAX_BITS,
    };
    return resize_axis_set(&workspace->vertical, &vertical) &&
           resize_axis_set(&workspace->horizontal, &horizontal);
}

/* The source columns that the horizontal pass looks at: [first, last). */
static void columns_of(const struct resize_axis *axis, size_t *first,
                       size_t *last)
{
    *first = axis->first[0];
    *last = axis->first[axis->span.n_out - 1] + axis->n_taps;
}

static void run(struct kernels kernels, struct resize_workspace *workspace,
                const struct resize_request *r, size_t line_pitch)
{
    const struct resize_axis *vertical = &workspace->vertical;
    const struct resize_axis *horizontal = &workspace->horizontal;
    const int fraction = choose_fraction(vertical, horizontal);
    const size_t src_pitch = r->src_width * 3;
    const size_t dst_pitch = r->dst_width * 3;
    int16_t *lines = workspace->lines.data;
    size_t first;
    size_t last;
    columns_of(horizontal, &first, &last);
    struct resize_rows rows = {
        .pitch = src_pitch,
        .n_taps = vertical->n_taps,
        .shift = vertical->bits - fraction,
    };
    struct resize_lines block = {
        .src = lines,
        .pitch = line_pitch,
        .axis = horizontal,
        .shift = horizontal->bits + fraction,
        .swap = r->swap,
        .dst_pitch = dst_pitch,
    };
    uint8_t *dst = r->dst + r->into_top * dst_pitch + r->into_left * 3;
    for (size_t y = 0; y < r->into_height; y += block.n_lines) {
        size_t left = r->into_height - y;
        block.n_lines = left < RESIZE_LINES ? left : RESIZE_LINES;
        for (size_t i = 0; i < block.n_lines; i++) {
            rows.src = r->src + vertical->first[y + i] * src_pitch + first * 3;
            rows.weights = vertical->weights + (y + i) * vertical->stride;
            kernels.vertical(&rows, (last - first) * 3,
                             lines + i * line_pitch + first * 3);
        }
        kernels.horizontal(&block, dst + y * dst_pitch);
    }
}

bool resize(enum simd_level level, struct resize_workspace *workspace,
            const struct resize_request *request)
{
    assert(simd_is_supported(level));
    size_t line_pitch =
        (request->src_width * 3 + RESIZE_LINE_SLACK + 63) / 64 * 64;
    if (!set_axes(workspace, request) ||
        !resize_block_grow(&workspace->lines, line_pitch * RESIZE_LINES *
                                                  sizeof(int16_t))) {
        return false;
    }
    fill_around(request);
    run(kernels_for(level), workspace, request, line_pitch);
    return true;
}

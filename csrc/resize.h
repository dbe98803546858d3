/*
 * Antialiased resizing of (H, W, 3) uint8 images: a box of the source, in
 * source pixels and fractions of them, fills a rectangle of the destination;
 * the rest of the destination gets one colour. Stretching, short side and
 * centre crop, and letterboxing are all one call.
 *
 * The weights are those of Pillow: the filter is as wide as the step between
 * two output pixels where that is more than one source pixel, is centred at
 * box start + (x + 0.5) * step, is cut at the edges of the image (not of the
 * box), and its weights add up to one.
 *
 * The result is the exact value, off by RESIZE_ERROR at most, and rounded.
 * All arithmetic but that of the weights is in integers, so every level of
 * simd.h gives the same bytes; see Note [Fixed point] in resize.c. Nothing is
 * clipped between the two passes, as Pillow and torch do with uint8: where a
 * bicubic filter overshoots, at hard edges, theirs may be some levels off.
 */
#ifndef EVMP_RESIZE_H
#define EVMP_RESIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "simd.h"

#define RESIZE_MAX_SIDE ((size_t)1 << 24)
/* Grey levels: the limit for steps of up to 12 source pixels; in practice the
 * error is below 0.02 for any step. */
#define RESIZE_ERROR 0.1

enum resize_filter {
    RESIZE_BILINEAR, /* triangle, one step to each side */
    RESIZE_BICUBIC,  /* a = -0.5, two steps to each side */
};

struct resize_request {
    const uint8_t *src; /* (src_height, src_width, 3), C-contiguous */
    size_t src_height, src_width;
    double left, top, right, bottom; /* the box, inside the source */
    uint8_t *dst; /* (dst_height, dst_width, 3), C-contiguous */
    size_t dst_height, dst_width;
    size_t into_left, into_top, into_width, into_height; /* inside dst */
    uint8_t fill[3]; /* in the order of the source's channels */
    bool swap;       /* write channel 2 1 0: RGB to BGR, or back */
    enum resize_filter filter;
};

/* Weights and lines, kept and grown between calls; one call at a time. */
struct resize_workspace;

struct resize_workspace *resize_workspace_new(void);
void resize_workspace_free(struct resize_workspace *workspace);
size_t resize_workspace_bytes(const struct resize_workspace *workspace);

/*
 * Fill all of dst, which src must not overlap. Sides are 1 to
 * RESIZE_MAX_SIDE, the box and the rectangle are not empty. Returns false,
 * with dst untouched, where memory is short; allocates only where the
 * workspace must grow.
 */
bool resize(enum simd_level level, struct resize_workspace *workspace,
            const struct resize_request *request);

#endif

/*
 * The variants of normalize for one image; for normalize*.c only. A vector
 * variant returns the pixels it did, from the left; the caller does the rest.
 */
#ifndef EVMP_NORMALIZE_KERNEL_H
#define EVMP_NORMALIZE_KERNEL_H

#include "normalize.h"

typedef size_t normalize_image(const struct normalize_map *map,
                               const uint8_t *src, size_t pixels, float *dst);

normalize_image normalize_avx2;
normalize_image normalize_neon;

#endif

/*
 * uint8 images as a network wants them: (n, pixels, 3) uint8, interleaved,
 * becomes (n, 3, pixels) float32, planar, by dst = src * scale[c] + bias[c],
 * rounded after the product and after the sum, so that every level of simd.h
 * gives the same bits.
 */
#ifndef EVMP_NORMALIZE_H
#define EVMP_NORMALIZE_H

#include <stddef.h>
#include <stdint.h>

#include "simd.h"

struct normalize_map {
    float scale[3], bias[3]; /* mean and std: 1 / (255 std), -mean / std */
};

void normalize(enum simd_level level, const struct normalize_map *map,
               const uint8_t *src, size_t n, size_t pixels, float *dst);

#endif

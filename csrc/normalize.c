#include "normalize.h"

#include <assert.h>

#include "normalize_kernel.h"

static size_t normalize_nothing(const struct normalize_map *map,
                                const uint8_t *src, size_t pixels, float *dst)
{
    (void)map, (void)src, (void)pixels, (void)dst;
    return 0;
}

static normalize_image *kernel_for(enum simd_level level)
{
    switch (level) {
#ifdef SIMD_X86
    case SIMD_AVX2:
    case SIMD_AVX512:
        return normalize_avx2;
#endif
#ifdef SIMD_NEON_BUILT
    case SIMD_NEON:
        return normalize_neon;
#endif
    default:
        return normalize_nothing;
    }
}

static void normalize_from(size_t first, const struct normalize_map *map,
                           const uint8_t *src, size_t pixels, float *dst)
{
    for (size_t c = 0; c < 3; c++) {
        for (size_t i = first; i < pixels; i++) {
            dst[c * pixels + i] =
                (float)src[i * 3 + c] * map->scale[c] + map->bias[c];
        }
    }
}

void normalize(enum simd_level level, const struct normalize_map *map,
               const uint8_t *src, size_t n, size_t pixels, float *dst)
{
    assert(simd_is_supported(level));
    normalize_image *kernel = kernel_for(level);
    for (size_t i = 0; i < n; i++) {
        size_t at = i * pixels * 3;
        size_t done = kernel(map, src + at, pixels, dst + at);
        normalize_from(done, map, src + at, pixels, dst + at);
    }
}

#include "normalize_kernel.h"

#ifdef SIMD_X86

#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))
#define STEP 8      /* pixels: 24 bytes, 12 in each half of a register */
#define READ_BYTES 28 /* the right half is loaded as 16 bytes */

/* For each of four pixels, channel c as a 32-bit number. */
TARGET static __m256i channel_mask(int c)
{
    const __m256i first = _mm256_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9);
    return _mm256_add_epi32(first,
                            _mm256_set1_epi32((int)0x80808000 + c));
}

TARGET static inline __m256 map_channel(__m256i pixels, __m256i mask,
                                        __m256 scale, __m256 bias)
{
    __m256 value = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(pixels, mask));
    return _mm256_add_ps(_mm256_mul_ps(value, scale), bias);
}

TARGET size_t normalize_avx2(const struct normalize_map *map,
                             const uint8_t *src, size_t pixels, float *dst)
{
    __m256i mask[3];
    __m256 scale[3];
    __m256 bias[3];
    for (int c = 0; c < 3; c++) {
        mask[c] = channel_mask(c);
        scale[c] = _mm256_set1_ps(map->scale[c]);
        bias[c] = _mm256_set1_ps(map->bias[c]);
    }
    size_t i = 0;
    for (; (pixels - i) * 3 >= READ_BYTES; i += STEP, src += STEP * 3) {
        __m128i left = _mm_loadu_si128((const __m128i *)src);
        __m128i right = _mm_loadu_si128((const __m128i *)(src + 12));
        __m256i both =
            _mm256_inserti128_si256(_mm256_castsi128_si256(left), right, 1);
        for (size_t c = 0; c < 3; c++) {
            _mm256_storeu_ps(dst + c * pixels + i,
                             map_channel(both, mask[c], scale[c], bias[c]));
        }
    }
    return i;
}

#endif

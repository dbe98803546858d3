#include "base64_kernel.h"

#ifdef SIMD_X86

#include <immintrin.h>

/*
 * 32 characters at a time, after Mula and Lemire (arXiv 1704.00605).
 *
 * A character is looked up by its two halves; it is in the alphabet where the
 * classes of both have no bit in common:
 *
 * | high | characters | bit  | low halves that it refuses         |
 * |------|------------|------|------------------------------------|
 * | 2    | + /        | 0x01 | all but b f                        |
 * | 3    | 0 to 9     | 0x02 | a to f                             |
 * | 4, 6 | A-O, a-o   | 0x04 | 0                                  |
 * | 5, 7 | P-Z, p-z   | 0x08 | b to f                             |
 * | rest |            | 0x10 | all                                |
 *
 * Its six bits are the character plus an offset that depends on the high half
 * alone, but for '/', which takes the otherwise unused entry 1.
 */
#define TARGET __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline))
#define STEP 32 /* characters; they make 24 bytes, but 32 are stored */
#define SLACK 16 /* characters behind them make the 8 bytes too many */

TARGET INLINE __m256i twice(__m128i half)
{
    return _mm256_broadcastsi128_si256(half);
}

/* '-' and '_' as '+' and '/'; these two as something outside the alphabet. */
TARGET INLINE __m256i from_url(__m256i text)
{
    __m256i plus = _mm256_set1_epi8('+');
    __m256i slash = _mm256_set1_epi8('/');
    __m256i is_wrong = _mm256_or_si256(_mm256_cmpeq_epi8(text, plus),
                                       _mm256_cmpeq_epi8(text, slash));
    __m256i is_minus = _mm256_cmpeq_epi8(text, _mm256_set1_epi8('-'));
    __m256i is_under = _mm256_cmpeq_epi8(text, _mm256_set1_epi8('_'));
    text = _mm256_blendv_epi8(text, plus, is_minus);
    text = _mm256_blendv_epi8(text, slash, is_under);
    return _mm256_or_si256(text, is_wrong);
}

/* Characters to their six bits; false where one is not in the alphabet. */
TARGET INLINE bool to_values(__m256i text, __m256i *values)
{
    const __m256i refused_by_low = twice(_mm_setr_epi8(
        0x15, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x13,
        0x1A, 0x1B, 0x1B, 0x1B, 0x1A));
    const __m256i class_of_high = twice(_mm_setr_epi8(
        0x10, 0x10, 0x01, 0x02, 0x04, 0x08, 0x04, 0x08, 0x10, 0x10, 0x10,
        0x10, 0x10, 0x10, 0x10, 0x10));
    const __m256i offset_of_high = twice(_mm_setr_epi8(
        0, 16, 19, 4, -65, -65, -71, -71, 0, 0, 0, 0, 0, 0, 0, 0));
    /* A shuffle looks at bits 0 to 3 and 7 of an index: 0x2F keeps it small
     * and is a constant that the comparison with '/' needs as well. */
    const __m256i mask = _mm256_set1_epi8(0x2F);
    __m256i high = _mm256_and_si256(_mm256_srli_epi32(text, 4), mask);
    __m256i low = _mm256_and_si256(text, mask);
    __m256i refused = _mm256_shuffle_epi8(refused_by_low, low);
    __m256i class = _mm256_shuffle_epi8(class_of_high, high);
    if (!_mm256_testz_si256(refused, class)) {
        return false;
    }
    __m256i is_slash = _mm256_cmpeq_epi8(text, mask);
    __m256i offset = _mm256_shuffle_epi8(offset_of_high,
                                         _mm256_add_epi8(is_slash, high));
    *values = _mm256_add_epi8(text, offset);
    return true;
}

/* Four six-bit values to three bytes, eight times; 8 bytes of zeros follow. */
TARGET INLINE __m256i pack(__m256i values)
{
    const __m256i order = twice(_mm_setr_epi8(2, 1, 0, 6, 5, 4, 10, 9, 8, 14,
                                              13, 12, -1, -1, -1, -1));
    __m256i pairs = _mm256_maddubs_epi16(values, _mm256_set1_epi32(0x01400140));
    __m256i groups = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00011000));
    __m256i bytes = _mm256_shuffle_epi8(groups, order);
    return _mm256_permutevar8x32_epi32(
        bytes, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7));
}

TARGET INLINE size_t decode(bool url, const uint8_t *src, size_t n,
                            uint8_t *dst)
{
    size_t i = 0;
    while (n - i >= STEP + SLACK) {
        __m256i text = _mm256_loadu_si256((const __m256i *)(src + i));
        __m256i values;
        if (!to_values(url ? from_url(text) : text, &values)) {
            break;
        }
        _mm256_storeu_si256((__m256i *)dst, pack(values));
        i += STEP;
        dst += STEP / 4 * 3;
    }
    return i;
}

TARGET size_t base64_bulk_avx2(bool url, const uint8_t *src, size_t n,
                               uint8_t *dst)
{
    return url ? decode(true, src, n, dst) : decode(false, src, n, dst);
}

#endif

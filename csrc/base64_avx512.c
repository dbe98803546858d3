#include "base64_kernel.h"

#ifdef SIMD_X86

#include <immintrin.h>

/*
 * 64 characters at a time, after Mula and Lemire (arXiv 1910.05109): one
 * permutation looks all of them up in a table of 128, in which what is not
 * in the alphabet has the top bit, as have the characters from 128 on.
 */
#define TARGET __attribute__((target("avx512bw,avx512vbmi")))
#define STEP 64 /* characters; they make 48 bytes, but 64 are stored */
#define SLACK 24 /* characters behind them make the 16 bytes too many */

TARGET size_t base64_bulk_avx512(bool url, const uint8_t *src, size_t n,
                                 uint8_t *dst)
{
    const __m512i one = _mm512_set1_epi8(1);
    const uint8_t *table = base64_values[url];
    const __m512i low = _mm512_sub_epi8(_mm512_loadu_si512(table), one);
    const __m512i high = _mm512_sub_epi8(_mm512_loadu_si512(table + 64), one);
    /* Bytes 2 1 0, 6 5 4, ... of the 16 groups. */
    static const uint8_t order_bytes[64] = {
        2,  1,  0,  6,  5,  4,  10, 9,  8,  14, 13, 12, 18, 17, 16, 22,
        21, 20, 26, 25, 24, 30, 29, 28, 34, 33, 32, 38, 37, 36, 42, 41,
        40, 46, 45, 44, 50, 49, 48, 54, 53, 52, 58, 57, 56, 62, 61, 60,
    };
    const __m512i order = _mm512_loadu_si512(order_bytes);
    size_t i = 0;
    while (n - i >= STEP + SLACK) {
        __m512i text = _mm512_loadu_si512(src + i);
        __m512i values = _mm512_permutex2var_epi8(low, text, high);
        if (_mm512_movepi8_mask(_mm512_or_si512(text, values)) != 0) {
            break;
        }
        __m512i pairs =
            _mm512_maddubs_epi16(values, _mm512_set1_epi32(0x01400140));
        __m512i groups =
            _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00011000));
        _mm512_storeu_si512(dst, _mm512_permutexvar_epi8(order, groups));
        i += STEP;
        dst += STEP / 4 * 3;
    }
    return i;
}

#endif

#include "resize_kernel.h"

#ifdef SIMD_X86

#include <immintrin.h>
#include <string.h>

/*
 * As resize_avx2.c, which explains it, but with 64 columns and four lines at
 * a time, and an instruction that adds its sums to others.
 */
#define TARGET __attribute__((target("avx512bw,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))

TARGET INLINE __m512i load_weights(const int16_t *two)
{
    int32_t pair;
    memcpy(&pair, two, sizeof pair);
    return _mm512_set1_epi32(pair);
}

/* --- vertical ------------------------------------------------------------ */

#define COLUMNS 64

TARGET INLINE void add_rows(const uint8_t *a, const uint8_t *b,
                            __m512i weights, __m512i sums[4])
{
    const __m512i zero = _mm512_setzero_si512();
    const __m512i row_a = _mm512_loadu_si512(a);
    const __m512i row_b = _mm512_loadu_si512(b);
    const __m512i low = _mm512_unpacklo_epi8(row_a, row_b);
    const __m512i high = _mm512_unpackhi_epi8(row_a, row_b);
    const __m512i pairs[4] = {
        _mm512_unpacklo_epi8(low, zero),
        _mm512_unpackhi_epi8(low, zero),
        _mm512_unpacklo_epi8(high, zero),
        _mm512_unpackhi_epi8(high, zero),
    };
    for (int i = 0; i < 4; i++) {
        sums[i] = _mm512_dpwssd_epi32(sums[i], pairs[i], weights);
    }
}

TARGET INLINE void store_columns(__m512i sums[4], __m128i shift, int16_t *line)
{
    const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int i = 0; i < 4; i++) {
        sums[i] = _mm512_sra_epi32(sums[i], shift);
    }
    __m512i even = _mm512_packs_epi32(sums[0], sums[1]);
    __m512i odd = _mm512_packs_epi32(sums[2], sums[3]);
    _mm512_storeu_si512(line, _mm512_permutex2var_epi64(even, front, odd));
    _mm512_storeu_si512(line + 32, _mm512_permutex2var_epi64(even, back, odd));
}

TARGET void resize_vertical_avx512(const struct resize_rows *rows, size_t n,
                                   int16_t *line)
{
    if (n < COLUMNS) {
        resize_vertical_avx2(rows, n, line);
        return;
    }
    const struct resize_rows r = *rows;
    const __m512i half = _mm512_set1_epi32((int32_t)1 << r.shift >> 1);
    const __m128i shift = _mm_cvtsi32_si128(r.shift);
    for (size_t at = 0; at < n; at += COLUMNS) {
        at = at < n - COLUMNS ? at : n - COLUMNS;
        __m512i sums[4] = {half, half, half, half};
        const uint8_t *row = r.src + at;
        size_t k = 0;
        for (; k + 1 < r.n_taps; k += 2, row += 2 * r.pitch) {
            add_rows(row, row + r.pitch, load_weights(r.weights + k), sums);
        }
        if (k < r.n_taps) {
            add_rows(row, row, load_weights(r.weights + k), sums);
        }
        store_columns(sums, shift, line + at);
    }
}

/* --- horizontal ---------------------------------------------------------- */

#define PIXELS 4

/* The four lines and rows of the pass; behind the last it stands again. */
struct four {
    const int16_t *src[RESIZE_LINES];
    uint8_t *dst[RESIZE_LINES];
};

static struct four four_of(const struct resize_lines *lines, uint8_t *dst)
{
    struct four four;
    for (size_t i = 0; i < RESIZE_LINES; i++) {
        size_t line = i < lines->n_lines ? i : lines->n_lines - 1;
        four.src[i] = lines->src + line * lines->pitch;
        four.dst[i] = dst + line * lines->dst_pitch;
    }
    return four;
}

TARGET INLINE __m256i load_two(const int16_t *a, const int16_t *b)
{
    __m128i left = _mm_loadu_si128((const __m128i *)a);
    __m128i right = _mm_loadu_si128((const __m128i *)b);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(left), right, 1);
}

TARGET INLINE void pair_pixels(const struct resize_lines *lines,
                               struct four four, __m512i *pairs)
{
    const __m128i rgb = _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11,
                                      -1, -1, -1, -1);
    const __m128i bgr = _mm_setr_epi8(4, 5, 10, 11, 2, 3, 8, 9, 0, 1, 6, 7,
                                      -1, -1, -1, -1);
    const __m512i order = _mm512_broadcast_i32x4(lines->swap ? bgr : rgb);
    const size_t last = resize_last(lines->axis) / 2;
    for (size_t i = resize_first(lines->axis) / 2; i < last; i++) {
        __m256i front = load_two(four.src[0] + i * 6, four.src[1] + i * 6);
        __m256i back = load_two(four.src[2] + i * 6, four.src[3] + i * 6);
        __m512i all =
            _mm512_inserti64x4(_mm512_castsi256_si512(front), back, 1);
        _mm512_store_si512(pairs + i, _mm512_shuffle_epi8(all, order));
    }
}

struct pass {
    const __m512i *pairs;
    const uint32_t *first;
    const int16_t *weights;
    size_t n_out;
    __m512i half;
    __m128i shift;
    uint8_t *dst[RESIZE_LINES];
};

TARGET INLINE void store_pixels(__m128i pixels, bool is_last, uint8_t *dst)
{
    if (is_last) {
        int32_t end = _mm_extract_epi32(pixels, 2);
        _mm_storel_epi64((__m128i *)dst, pixels);
        memcpy(dst + 8, &end, sizeof end);
    } else {
        _mm_storeu_si128((__m128i *)dst, pixels);
    }
}

TARGET INLINE void resize_pixels(struct pass pass, size_t n_pairs, size_t x,
                                 bool is_last)
{
    const __m512i compact = _mm512_broadcast_i32x4(_mm_setr_epi8(
        0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const int16_t *weights = pass.weights + x * n_pairs * 2;
    __m512i sums[PIXELS] = {pass.half, pass.half, pass.half, pass.half};
    const __m512i *pairs[PIXELS];
    for (size_t i = 0; i < PIXELS; i++) {
        pairs[i] = pass.pairs + pass.first[x + i] / 2;
    }
    for (size_t k = 0; k < n_pairs; k++) {
        for (size_t i = 0; i < PIXELS; i++) {
            __m512i two = load_weights(weights + (i * n_pairs + k) * 2);
            sums[i] = _mm512_dpwssd_epi32(sums[i], two, pairs[i][k]);
        }
    }
    for (size_t i = 0; i < PIXELS; i++) {
        sums[i] = _mm512_sra_epi32(sums[i], pass.shift);
    }
    __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(sums[0], sums[1]),
                                        _mm512_packs_epi32(sums[2], sums[3]));
    bytes = _mm512_shuffle_epi8(bytes, compact);
    store_pixels(_mm512_castsi512_si128(bytes), is_last, pass.dst[0] + x * 3);
    store_pixels(_mm512_extracti32x4_epi32(bytes, 1), is_last,
                 pass.dst[1] + x * 3);
    store_pixels(_mm512_extracti32x4_epi32(bytes, 2), is_last,
                 pass.dst[2] + x * 3);
    store_pixels(_mm512_extracti32x4_epi32(bytes, 3), is_last,
                 pass.dst[3] + x * 3);
}

TARGET INLINE void resize_rows_of(struct pass pass, size_t n_pairs)
{
    size_t x = 0;
    for (; x + PIXELS + 2 <= pass.n_out; x += PIXELS) {
        resize_pixels(pass, n_pairs, x, false);
    }
    for (; x < pass.n_out; x += PIXELS) {
        x = x < pass.n_out - PIXELS ? x : pass.n_out - PIXELS;
        resize_pixels(pass, n_pairs, x, true);
    }
}

TARGET void resize_horizontal_avx512(const struct resize_lines *lines,
                                     uint8_t *dst)
{
    const struct resize_axis *axis = lines->axis;
    if (axis->span.n_out < PIXELS) {
        resize_horizontal_portable(lines, dst);
        return;
    }
    const struct four four = four_of(lines, dst);
    const struct pass pass = {
        .pairs = lines->scratch,
        .first = axis->first,
        .weights = axis->weights,
        .n_out = axis->span.n_out,
        .half = _mm512_set1_epi32((int32_t)1 << lines->shift >> 1),
        .shift = _mm_cvtsi32_si128(lines->shift),
        .dst = {four.dst[0], four.dst[1], four.dst[2], four.dst[3]},
    };
    pair_pixels(lines, four, lines->scratch);
    switch (axis->stride / 2) {
    case 1:
        resize_rows_of(pass, 1);
        break;
    case 2:
        resize_rows_of(pass, 2);
        break;
    case 3:
        resize_rows_of(pass, 3);
        break;
    default:
        resize_rows_of(pass, axis->stride / 2);
    }
}

#endif

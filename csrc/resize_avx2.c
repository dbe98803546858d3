#include "resize_kernel.h"

#ifdef SIMD_X86

#include <immintrin.h>
#include <string.h>

/*
 * Both passes rest on one instruction, the multiply-add of pairs: products of
 * 16-bit numbers, of which each two neighbours are added to 32 bits. The
 * neighbours are two taps, so weights are loaded two at a time, and what they
 * belong to is brought side by side first.
 */
#define TARGET __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline))

TARGET INLINE __m256i load_weights(const int16_t *two)
{
    int32_t pair;
    memcpy(&pair, two, sizeof pair);
    return _mm256_set1_epi32(pair);
}

/* --- vertical: 32 columns of two rows at a time -------------------------- */

#define COLUMNS 32

/*
 * Rows a and b are interleaved to a0 b0 a1 b1 ... and widened to 16 bits. The
 * unpacks work within the halves of a register, so sums[0] holds columns 0-3
 * and 16-19, sums[1] 4-7 and 20-23, sums[2] 8-11 and 24-27, sums[3] the rest.
 */
TARGET INLINE void add_rows(const uint8_t *a, const uint8_t *b,
                            __m256i weights, __m256i sums[4])
{
    const __m256i zero = _mm256_setzero_si256();
    const __m256i row_a = _mm256_loadu_si256((const __m256i *)a);
    const __m256i row_b = _mm256_loadu_si256((const __m256i *)b);
    const __m256i low = _mm256_unpacklo_epi8(row_a, row_b);
    const __m256i high = _mm256_unpackhi_epi8(row_a, row_b);
    const __m256i pairs[4] = {
        _mm256_unpacklo_epi8(low, zero),
        _mm256_unpackhi_epi8(low, zero),
        _mm256_unpacklo_epi8(high, zero),
        _mm256_unpackhi_epi8(high, zero),
    };
    for (int i = 0; i < 4; i++) {
        sums[i] =
            _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs[i], weights));
    }
}

TARGET INLINE void store_columns(__m256i sums[4], __m128i shift, int16_t *line)
{
    for (int i = 0; i < 4; i++) {
        sums[i] = _mm256_sra_epi32(sums[i], shift);
    }
    __m256i even = _mm256_packs_epi32(sums[0], sums[1]);
    __m256i odd = _mm256_packs_epi32(sums[2], sums[3]);
    _mm256_storeu_si256((__m256i *)line,
                        _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)(line + 16),
                        _mm256_permute2x128_si256(even, odd, 0x31));
}

TARGET void resize_vertical_avx2(const struct resize_rows *rows, size_t n,
                                 int16_t *line)
{
    if (n < COLUMNS) {
        resize_vertical_portable(rows, n, line);
        return;
    }
    const struct resize_rows r = *rows;
    const __m256i half = _mm256_set1_epi32((int32_t)1 << r.shift >> 1);
    const __m128i shift = _mm_cvtsi32_si128(r.shift);
    for (size_t at = 0; at < n; at += COLUMNS) {
        /* The last block does columns again rather than read behind a row. */
        at = at < n - COLUMNS ? at : n - COLUMNS;
        __m256i sums[4] = {half, half, half, half};
        const uint8_t *row = r.src + at;
        size_t k = 0;
        for (; k + 1 < r.n_taps; k += 2, row += 2 * r.pitch) {
            add_rows(row, row + r.pitch, load_weights(r.weights + k), sums);
        }
        if (k < r.n_taps) {
            /* The second weight is zero: any row will do, this one exists. */
            add_rows(row, row, load_weights(r.weights + k), sums);
        }
        store_columns(sums, shift, line + at);
    }
}

/* --- horizontal: four pixels of two lines at a time ---------------------- */

#define PIXELS 4

/*
 * Each two pixels of two lines, upper line left: r r g g b b 0 0. In a line
 * they are r g b r g b, and two values too many. As every output begins at an
 * even pixel, this is done once, not for every output that sees the pixels.
 */
TARGET INLINE void pair_pixels(const struct resize_lines *lines,
                               const int16_t *upper, const int16_t *lower,
                               __m256i *pairs)
{
    const __m128i rgb = _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11,
                                      -1, -1, -1, -1);
    const __m128i bgr = _mm_setr_epi8(4, 5, 10, 11, 2, 3, 8, 9, 0, 1, 6, 7,
                                      -1, -1, -1, -1);
    const __m256i order = _mm256_broadcastsi128_si256(lines->swap ? bgr : rgb);
    const size_t last = resize_last(lines->axis) / 2;
    for (size_t i = resize_first(lines->axis) / 2; i < last; i++) {
        __m128i left = _mm_loadu_si128((const __m128i *)(upper + i * 6));
        __m128i right = _mm_loadu_si128((const __m128i *)(lower + i * 6));
        __m256i both =
            _mm256_inserti128_si256(_mm256_castsi128_si256(left), right, 1);
        _mm256_store_si256(pairs + i, _mm256_shuffle_epi8(both, order));
    }
}

/* What the loop over a row reads, free of the aliases that dst may have. */
struct pass {
    const __m256i *pairs;
    const uint32_t *first;
    const int16_t *weights;
    size_t n_out;
    __m256i half;
    __m128i shift;
};

/* Twelve bytes; the four behind them only where other pixels follow. */
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
                                 bool is_last, uint8_t *upper, uint8_t *lower)
{
    const __m256i compact = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const int16_t *weights = pass.weights + x * n_pairs * 2;
    __m256i sums[PIXELS] = {pass.half, pass.half, pass.half, pass.half};
    const __m256i *pairs[PIXELS];
    for (size_t i = 0; i < PIXELS; i++) {
        pairs[i] = pass.pairs + pass.first[x + i] / 2;
    }
    for (size_t k = 0; k < n_pairs; k++) {
        for (size_t i = 0; i < PIXELS; i++) {
            __m256i two = load_weights(weights + (i * n_pairs + k) * 2);
            sums[i] =
                _mm256_add_epi32(sums[i], _mm256_madd_epi16(two, pairs[i][k]));
        }
    }
    for (size_t i = 0; i < PIXELS; i++) {
        sums[i] = _mm256_sra_epi32(sums[i], pass.shift);
    }
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]),
                                        _mm256_packs_epi32(sums[2], sums[3]));
    bytes = _mm256_shuffle_epi8(bytes, compact);
    store_pixels(_mm256_castsi256_si128(bytes), is_last, upper + x * 3);
    store_pixels(_mm256_extracti128_si256(bytes, 1), is_last, lower + x * 3);
}

TARGET INLINE void resize_row(struct pass pass, size_t n_pairs, uint8_t *upper,
                              uint8_t *lower)
{
    size_t x = 0;
    /* Four bytes too many are two more pixels. */
    for (; x + PIXELS + 2 <= pass.n_out; x += PIXELS) {
        resize_pixels(pass, n_pairs, x, false, upper, lower);
    }
    for (; x < pass.n_out; x += PIXELS) {
        x = x < pass.n_out - PIXELS ? x : pass.n_out - PIXELS;
        resize_pixels(pass, n_pairs, x, true, upper, lower);
    }
}

TARGET static void resize_two(struct pass pass, size_t n_pairs, uint8_t *upper,
                              uint8_t *lower)
{
    /* A constant is unrolled: a fifth faster where filters are narrow. */
    switch (n_pairs) {
    case 1:
        resize_row(pass, 1, upper, lower);
        break;
    case 2:
        resize_row(pass, 2, upper, lower);
        break;
    case 3:
        resize_row(pass, 3, upper, lower);
        break;
    default:
        resize_row(pass, n_pairs, upper, lower);
    }
}

TARGET void resize_horizontal_avx2(const struct resize_lines *lines,
                                   uint8_t *dst)
{
    const struct resize_axis *axis = lines->axis;
    if (axis->span.n_out < PIXELS) {
        resize_horizontal_portable(lines, dst);
        return;
    }
    const struct pass pass = {
        .pairs = lines->scratch,
        .first = axis->first,
        .weights = axis->weights,
        .n_out = axis->span.n_out,
        .half = _mm256_set1_epi32((int32_t)1 << lines->shift >> 1),
        .shift = _mm_cvtsi32_si128(lines->shift),
    };
    for (size_t i = 0; i < lines->n_lines; i += 2) {
        /* Behind an odd number of lines, the last one is done twice. */
        size_t j = i + 1 < lines->n_lines ? i + 1 : i;
        pair_pixels(lines, lines->src + i * lines->pitch,
                    lines->src + j * lines->pitch, lines->scratch);
        resize_two(pass, axis->stride / 2, dst + i * lines->dst_pitch,
                   dst + j * lines->dst_pitch);
    }
}

#endif

/*
 * Random inputs for the C kernels, at every level that this CPU has, built
 * with sanitizers by test_sanitizers.py:
 *
 *     fuzz_kernels SEED ROUNDS
 *
 * Buffers are allocated to the byte, so that an access outside one is seen.
 * Results are compared with the plainest code that does the same, and with
 * each other. Prints one line per kernel, or the first difference and exits
 * with 1.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base64.h"
#include "normalize.h"
#include "resize.h"

static uint64_t state;

static uint32_t pick(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

static double pick_real(void)
{
    return pick(1u << 20) / (double)(1u << 20);
}

static void *take(size_t bytes)
{
    void *block = malloc(bytes);
    if (block == NULL && bytes != 0) {
        abort();
    }
    return block;
}

static uint8_t *take_noise(size_t n)
{
    uint8_t *block = take(n);
    for (size_t i = 0; i < n; i++) {
        block[i] = (uint8_t)pick(256);
    }
    return block;
}

static void fail(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vprintf(format, values);
    va_end(values);
    printf("\n");
    exit(1);
}

/* --- base64 -------------------------------------------------------------- */

static const char *alphabet_of(bool url)
{
    return url ? "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                 "0123456789-_"
               : "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                 "0123456789+/";
}

static size_t encode(bool url, const uint8_t *src, size_t n, uint8_t *text)
{
    const char *alphabet = alphabet_of(url);
    size_t length = 0;
    for (size_t i = 0; i < n; i += 3) {
        size_t left = n - i;
        uint32_t group = (uint32_t)src[i] << 16;
        group |= left > 1 ? (uint32_t)src[i + 1] << 8 : 0;
        group |= left > 2 ? (uint32_t)src[i + 2] : 0;
        for (size_t k = 0; k < 4; k++) {
            text[length++] = k <= left
                                 ? (uint8_t)alphabet[group >> (18 - 6 * k) & 63]
                                 : (uint8_t)'=';
        }
    }
    return length;
}

static bool is_space(uint8_t c)
{
    return c != 0 && strchr(" \t\n\f\r", c) != NULL;
}

/* What base64_decode must say, character by character. */
static ptrdiff_t decode_plainly(struct base64_options options,
                                const uint8_t *text, size_t n, uint8_t *dst,
                                size_t n_dst, size_t *position)
{
    const char *alphabet = alphabet_of(options.url);
    uint32_t group = 0;
    size_t n_group = 0, n_pad = 0, written = 0, last = 0, start = 0;
    for (size_t i = 0; i < n; i++) {
        const char *at = text[i] ? strchr(alphabet, text[i]) : NULL;
        bool is_pad = text[i] == '=';
        if (options.whitespace && is_space(text[i])) {
            continue;
        }
        *position = i;
        if (n_pad ? !is_pad || n_group == 0 : is_pad && n_group < 2) {
            return BASE64_BAD_PADDING;
        }
        if (!is_pad && at == NULL) {
            return BASE64_BAD_CHARACTER;
        }
        start = n_group == 0 ? i : start;
        last = is_pad ? last : i;
        n_pad += is_pad;
        group = group << 6 | (at ? (uint32_t)(at - alphabet) : 0);
        if (++n_group < 4) {
            continue;
        }
        *position = last;
        if (group & ((1u << 8 * n_pad) - 1)) {
            return BASE64_TRAILING_BITS;
        }
        *position = start;
        if (3 - n_pad > n_dst - written) {
            return BASE64_NO_SPACE;
        }
        for (size_t k = 0; k < 3 - n_pad; k++) {
            dst[written++] = (uint8_t)(group >> (16 - 8 * k));
        }
        group = 0;
        n_group = 0;
    }
    *position = n;
    return n_group ? BASE64_TRUNCATED : (ptrdiff_t)written;
}

/* White space at random places, into a buffer of exactly the new length. */
static uint8_t *space_out(const uint8_t *text, size_t *n)
{
    uint8_t *spaced = take(*n * 2 + 8);
    size_t length = 0;
    uint32_t every = 1 + pick(100);
    for (size_t i = 0; i < *n || pick(3); i++) {
        while (length < *n + i && pick(every) == 0) {
            spaced[length++] = (uint8_t)" \t\n\f\r"[pick(5)];
        }
        if (i >= *n) {
            break;
        }
        spaced[length++] = text[i];
    }
    *n = length;
    return spaced;
}

static void damage(uint8_t *text, size_t *n)
{
    static const uint8_t likely[] = "=====AQgw+/-_ \n\0\x80\xff*";
    for (uint32_t i = 1 + pick(2); *n > 0 && i > 0; i--) {
        /* Mostly near the end, where the special cases are. */
        size_t reach = pick(2) && *n > 8 ? 8 : *n;
        size_t at = *n - 1 - pick((uint32_t)reach);
        text[at] = pick(4) ? likely[pick(sizeof likely - 1)]
                           : (uint8_t)pick(256);
        *n -= pick(3) == 0;
    }
}

static void check_base64(struct base64_options options, const uint8_t *text,
                         size_t n, size_t n_dst)
{
    uint8_t *exact = take(n);
    uint8_t *expected = take(n_dst);
    memcpy(exact, text, n);
    size_t place = 0;
    ptrdiff_t answer = decode_plainly(options, exact, n, expected, n_dst,
                                      &place);
    for (int level = 0; level < SIMD_N_LEVELS; level++) {
        if (!simd_is_supported((enum simd_level)level)) {
            continue;
        }
        uint8_t *dst = take(n_dst);
        size_t position = n;
        ptrdiff_t got = base64_decode((enum simd_level)level, options, exact,
                                      n, dst, n_dst, &position);
        if (got != answer || position != place ||
            (got > 0 && memcmp(dst, expected, (size_t)got) != 0)) {
            fail("base64 %s url %d whitespace %d: \"%.*s\" into %zu gives %td "
                 "at %zu, expected %td at %zu",
                 simd_name((enum simd_level)level), options.url,
                 options.whitespace, (int)n, (const char *)exact, n_dst, got,
                 position, answer, place);
        }
        free(dst);
    }
    free(exact);
    free(expected);
}

static void fuzz_base64(void)
{
    struct base64_options options = {pick(2), pick(2)};
    size_t n = pick(10) ? pick(300) : pick(5000);
    uint8_t *bytes = take_noise(n);
    uint8_t *text = take(n / 3 * 4 + 4);
    size_t n_text = encode(options.url, bytes, n, text);
    if (options.whitespace && pick(4)) {
        uint8_t *spaced = space_out(text, &n_text);
        free(text);
        text = spaced;
    }
    check_base64(options, text, n_text, n);
    damage(text, &n_text);
    check_base64(options, text, n_text, n_text / 4 * 3);
    check_base64(options, text, n_text, pick((uint32_t)n + 1));
    free(bytes);
    free(text);
}

/* --- resize -------------------------------------------------------------- */

static double weigh(enum resize_filter filter, double x)
{
    x = fabs(x);
    if (filter == RESIZE_BILINEAR) {
        return x < 1 ? 1 - x : 0;
    }
    return x < 1   ? 1.5 * x * x * x - 2.5 * x * x + 1
           : x < 2 ? -0.5 * x * x * x + 2.5 * x * x - 4 * x + 2
                   : 0;
}

/* The weight of every input pixel for output i, adding up to one. */
static void weigh_all(enum resize_filter filter, double start, double stop,
                      size_t n_in, size_t n_out, size_t i, double *weights)
{
    double step = (stop - start) / (double)n_out;
    double centre = start + ((double)i + 0.5) * step;
    double sum = 0;
    for (size_t k = 0; k < n_in; k++) {
        double x = (double)k + 0.5 - centre;
        weights[k] = weigh(filter, x / (step > 1 ? step : 1));
        sum += weights[k];
    }
    for (size_t k = 0; k < n_in; k++) {
        weights[k] /= sum;
    }
}

/* One channel of one output pixel inside the rectangle, unrounded. */
static double resize_plainly(const struct resize_request *r, size_t y,
                             size_t x, size_t c)
{
    double *rows = take(r->src_height * sizeof *rows);
    double *columns = take(r->src_width * sizeof *columns);
    weigh_all(r->filter, r->top, r->bottom, r->src_height, r->into_height, y,
              rows);
    weigh_all(r->filter, r->left, r->right, r->src_width, r->into_width, x,
              columns);
    double sum = 0;
    for (size_t i = 0; i < r->src_height; i++) {
        for (size_t j = 0; rows[i] != 0 && j < r->src_width; j++) {
            size_t at = (i * r->src_width + j) * 3 + c;
            sum += rows[i] * columns[j] * r->src[at];
        }
    }
    free(rows);
    free(columns);
    return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

static void check_pixel(const struct resize_request *r, size_t y, size_t x)
{
    for (size_t c = 0; c < 3; c++) {
        size_t from = r->swap ? 2 - c : c;
        bool is_inside = y - r->into_top < r->into_height &&
                         x - r->into_left < r->into_width;
        double exact = is_inside ? resize_plainly(r, y - r->into_top,
                                                  x - r->into_left, from)
                                 : r->fill[from];
        uint8_t got = r->dst[(y * r->dst_width + x) * 3 + c];
        if (fabs(got - exact) > 0.5 + RESIZE_ERROR) {
            fail("resize %zux%zu box %g %g %g %g to %zux%zu of %zux%zu filter "
                 "%d: pixel %zu %zu channel %zu is %d, expected %g",
                 r->src_width, r->src_height, r->left, r->top, r->right,
                 r->bottom, r->into_width, r->into_height, r->dst_width,
                 r->dst_height, r->filter, x, y, c, got, exact);
        }
    }
}

/* A part [low, high) of [0, n): all of it, whole pixels, or any. */
static void pick_part(size_t n, double *low, double *high)
{
    double size = (double)n;
    double a = pick_real() * size;
    double b = pick_real() * size;
    *low = a < b ? a : b;
    *high = a < b ? b : a;
    if (pick(2)) {
        *low = floor(*low);
        *high = ceil(*high);
    }
    if (pick(3) == 0 || !(*low < *high)) {
        *low = 0;
        *high = size;
    }
}

static size_t pick_side(void)
{
    return 1 + pick(pick(4) ? 40 : pick(4) ? 150 : 700);
}

static struct resize_request pick_request(void)
{
    struct resize_request r = {
        .src_height = pick_side(),
        .src_width = pick_side(),
        .dst_height = pick_side(),
        .dst_width = pick_side(),
        .fill = {(uint8_t)pick(256), (uint8_t)pick(256), (uint8_t)pick(256)},
        .swap = pick(2),
        .filter = pick(2) ? RESIZE_BILINEAR : RESIZE_BICUBIC,
    };
    pick_part(r.src_width, &r.left, &r.right);
    pick_part(r.src_height, &r.top, &r.bottom);
    r.into_left = pick(2) ? pick((uint32_t)r.dst_width) : 0;
    r.into_top = pick(2) ? pick((uint32_t)r.dst_height) : 0;
    r.into_width = r.dst_width - r.into_left;
    r.into_height = r.dst_height - r.into_top;
    if (pick(2)) {
        r.into_width = 1 + pick((uint32_t)r.into_width);
        r.into_height = 1 + pick((uint32_t)r.into_height);
    }
    return r;
}

static void fuzz_resize(void)
{
    static struct resize_workspace *workspace;
    if (workspace == NULL || pick(10) == 0) {
        resize_workspace_free(workspace);
        workspace = resize_workspace_new();
    }
    struct resize_request r = pick_request();
    size_t n_src = r.src_height * r.src_width * 3;
    size_t n_dst = r.dst_height * r.dst_width * 3;
    uint8_t *src = take_noise(n_src);
    for (size_t i = 0; i < n_src && r.fill[0] < 64; i++) {
        src[i] = src[i] < 128 ? 0 : 255; /* the hardest contrast */
    }
    uint8_t *expected = take(n_dst);
    r.src = src;
    for (int level = 0; level < SIMD_N_LEVELS; level++) {
        if (!simd_is_supported((enum simd_level)level)) {
            continue;
        }
        r.dst = level == SIMD_PORTABLE ? expected : take(n_dst);
        memset(r.dst, level, n_dst);
        if (!resize((enum simd_level)level, workspace, &r)) {
            abort();
        }
        if (memcmp(r.dst, expected, n_dst) != 0) {
            fail("resize at %s differs from portable: %zux%zu to %zux%zu",
                 simd_name((enum simd_level)level), r.src_width, r.src_height,
                 r.into_width, r.into_height);
        }
        for (int i = 0; level == SIMD_PORTABLE && i < 20; i++) {
            check_pixel(&r, pick((uint32_t)r.dst_height),
                        pick((uint32_t)r.dst_width));
        }
        if (r.dst != expected) {
            free(r.dst);
        }
    }
    free(src);
    free(expected);
}

/* --- normalize ----------------------------------------------------------- */

static void fuzz_normalize(void)
{
    size_t n = pick(4);
    size_t pixels = 1 + pick(300);
    uint8_t *src = take_noise(n * pixels * 3);
    struct normalize_map map;
    for (size_t c = 0; c < 3; c++) {
        map.scale[c] = (float)(pick_real() * 2);
        map.bias[c] = (float)(pick_real() * 4 - 2);
    }
    for (int level = 0; level < SIMD_N_LEVELS; level++) {
        if (!simd_is_supported((enum simd_level)level)) {
            continue;
        }
        float *dst = take(n * pixels * 3 * sizeof *dst);
        normalize((enum simd_level)level, &map, src, n, pixels, dst);
        for (size_t i = 0; i < n * pixels * 3; i++) {
            size_t image = i / (pixels * 3), c = i / pixels % 3;
            size_t from = (image * pixels + i % pixels) * 3 + c;
            volatile float product = src[from] * map.scale[c];
            if (dst[i] != product + map.bias[c]) {
                fail("normalize at %s: value %zu of %zu x %zu is %g",
                     simd_name((enum simd_level)level), i, n, pixels, dst[i]);
            }
        }
        free(dst);
    }
    free(src);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: fuzz_kernels SEED ROUNDS\n");
        return 2;
    }
    state = strtoull(argv[1], NULL, 10);
    long rounds = strtol(argv[2], NULL, 10);
    for (long i = 0; i < rounds; i++) {
        fuzz_base64();
        if (i % 10 == 0) {
            fuzz_resize();
            fuzz_normalize();
        }
    }
    for (int level = 0; level < SIMD_N_LEVELS; level++) {
        if (simd_is_supported((enum simd_level)level)) {
            printf("%s ", simd_name((enum simd_level)level));
        }
    }
    printf("agree after %ld rounds\n", rounds);
    return 0;
}

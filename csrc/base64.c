#include "base64.h"

#include <assert.h>
#include <string.h>

#include "base64_kernel.h"

/* Characters with white space are decoded in chunks; a multiple of 4. */
#define CHUNK 1024

#define COMMON_62                                                            \
    ['A'] = 1, ['B'] = 2, ['C'] = 3, ['D'] = 4, ['E'] = 5, ['F'] = 6,        \
    ['G'] = 7, ['H'] = 8, ['I'] = 9, ['J'] = 10, ['K'] = 11, ['L'] = 12,     \
    ['M'] = 13, ['N'] = 14, ['O'] = 15, ['P'] = 16, ['Q'] = 17, ['R'] = 18,  \
    ['S'] = 19, ['T'] = 20, ['U'] = 21, ['V'] = 22, ['W'] = 23, ['X'] = 24,  \
    ['Y'] = 25, ['Z'] = 26, ['a'] = 27, ['b'] = 28, ['c'] = 29, ['d'] = 30,  \
    ['e'] = 31, ['f'] = 32, ['g'] = 33, ['h'] = 34, ['i'] = 35, ['j'] = 36,  \
    ['k'] = 37, ['l'] = 38, ['m'] = 39, ['n'] = 40, ['o'] = 41, ['p'] = 42,  \
    ['q'] = 43, ['r'] = 44, ['s'] = 45, ['t'] = 46, ['u'] = 47, ['v'] = 48,  \
    ['w'] = 49, ['x'] = 50, ['y'] = 51, ['z'] = 52, ['0'] = 53, ['1'] = 54,  \
    ['2'] = 55, ['3'] = 56, ['4'] = 57, ['5'] = 58, ['6'] = 59, ['7'] = 60,  \
    ['8'] = 61, ['9'] = 62

const uint8_t base64_values[2][256] = {
    {COMMON_62, ['+'] = 63, ['/'] = 64},
    {COMMON_62, ['-'] = 63, ['_'] = 64},
};

static size_t bulk_portable(bool url, const uint8_t *src, size_t n,
                            uint8_t *dst)
{
    const uint8_t *values = base64_values[url];
    size_t i = 0;
    for (; n - i >= 4; i += 4, dst += 3) {
        /* What is not in the alphabet becomes 0 - 1: all bits set. */
        uint32_t a = values[src[i]] - 1u;
        uint32_t b = values[src[i + 1]] - 1u;
        uint32_t c = values[src[i + 2]] - 1u;
        uint32_t d = values[src[i + 3]] - 1u;
        if ((a | b | c | d) >> 31) {
            break;
        }
        uint32_t group = a << 18 | b << 12 | c << 6 | d;
        dst[0] = (uint8_t)(group >> 16);
        dst[1] = (uint8_t)(group >> 8);
        dst[2] = (uint8_t)group;
    }
    return i;
}

static base64_bulk *bulk_for(enum simd_level level)
{
    switch (level) {
#ifdef SIMD_X86
    case SIMD_AVX2:
        return base64_bulk_avx2;
    case SIMD_AVX512:
        return base64_bulk_avx512;
#endif
#ifdef SIMD_NEON_BUILT
    case SIMD_NEON:
        return base64_bulk_neon;
#endif
    default:
        return bulk_portable;
    }
}

static ptrdiff_t fault(enum base64_fault kind, size_t *position, size_t at)
{
    *position = at;
    return kind;
}

/*
 * Decode the group at src[at..n) that the bulk loop refused: it is padded,
 * short or faulty, or does not fit.
 */
static ptrdiff_t decode_group(bool url, const uint8_t *src, size_t n,
                              size_t at, uint8_t *dst, size_t n_dst,
                              size_t *position)
{
    uint32_t group = 0;
    size_t n_values = 0;
    for (; n_values < 4 && at + n_values < n; n_values++) {
        uint8_t value = base64_values[url][src[at + n_values]];
        if (value == 0) {
            break;
        }
        group |= (value - 1u) << (18 - 6 * n_values);
    }
    for (size_t i = n_values; i < 4; i++) {
        bool may_pad = n_values >= 2;
        if (at + i == n) {
            return fault(BASE64_TRUNCATED, position, n);
        }
        if (src[at + i] != '=' && i == n_values) {
            return fault(BASE64_BAD_CHARACTER, position, at + i);
        }
        if (src[at + i] != '=' || !may_pad) {
            return fault(BASE64_BAD_PADDING, position, at + i);
        }
    }
    size_t n_bytes = n_values - 1;
    if (group & (0xFFFFFFu >> (8 * n_bytes))) {
        return fault(BASE64_TRAILING_BITS, position, at + n_values - 1);
    }
    if (n_bytes > n_dst) {
        return fault(BASE64_NO_SPACE, position, at);
    }
    for (size_t i = 0; i < n_bytes; i++) {
        dst[i] = (uint8_t)(group >> (16 - 8 * i));
    }
    return (ptrdiff_t)n_bytes;
}

/* The longest clean text at src that surely fits, a multiple of 4. */
static size_t decode_bulk(base64_bulk *bulk, bool url, const uint8_t *src,
                          size_t n_src, uint8_t *dst, size_t n_dst)
{
    size_t n = n_src / 4 <= n_dst / 3 ? n_src / 4 * 4 : n_dst / 3 * 4;
    size_t done = bulk(url, src, n, dst);
    return done + bulk_portable(url, src + done, n - done, dst + done / 4 * 3);
}

static ptrdiff_t decode_strict(base64_bulk *bulk, bool url,
                               const uint8_t *src, size_t n_src, uint8_t *dst,
                               size_t n_dst, size_t *position)
{
    size_t read = decode_bulk(bulk, url, src, n_src, dst, n_dst);
    size_t written = read / 4 * 3;
    if (read == n_src) {
        return (ptrdiff_t)written;
    }
    ptrdiff_t last = decode_group(url, src, n_src, read, dst + written,
                                  n_dst - written, position);
    if (last < 0) {
        return last;
    }
    if (n_src - read > 4) {
        return fault(BASE64_BAD_PADDING, position, read + 4);
    }
    return (ptrdiff_t)written + last;
}

static bool is_space(uint8_t c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\f' || c == '\r';
}

/* No white space among 8 characters; false for some that have none. */
static bool is_dense(const uint8_t *src)
{
    const uint64_t ones = UINT64_MAX / 255;
    uint64_t eight;
    memcpy(&eight, src, sizeof eight);
    /* The top bit of a byte below 33, or above such a one, or above 160. */
    return ((eight - ones * 33) & (ones * 128)) == 0;
}

/*
 * Move up to CHUNK characters that are no white space from src[*read..n_src)
 * to chunk; return how many.
 */
static size_t fill_chunk(const uint8_t *src, size_t n_src, size_t *read,
                         uint8_t *chunk)
{
    size_t at = *read;
    size_t n = 0;
    while (at < n_src && n < CHUNK) {
        if (n_src - at >= 8 && CHUNK - n >= 8 && is_dense(src + at)) {
            memcpy(chunk + n, src + at, 8);
            at += 8;
            n += 8;
        } else {
            chunk[n] = src[at++];
            n += !is_space(chunk[n]);
        }
    }
    *read = at;
    return n;
}

/* The index of the k-th character from `at` on that is no white space. */
static size_t find_character(const uint8_t *src, size_t n_src, size_t at,
                             size_t k)
{
    for (; at < n_src; at++) {
        if (!is_space(src[at]) && k-- == 0) {
            return at;
        }
    }
    return n_src;
}

/*
 * White space is taken out chunk by chunk in front of the strict decoder;
 * clean stretches go to the bulk loop as they are.
 */
static ptrdiff_t decode_spaced(base64_bulk *bulk, bool url,
                               const uint8_t *src, size_t n_src, uint8_t *dst,
                               size_t n_dst, size_t *position)
{
    uint8_t chunk[CHUNK];
    size_t read = 0;
    size_t written = 0;
    bool is_padded = false;
    while (read < n_src) {
        size_t clean = is_padded ? 0
                                 : decode_bulk(bulk, url, src + read,
                                               n_src - read, dst + written,
                                               n_dst - written);
        read += clean;
        written += clean / 4 * 3;
        size_t start = read;
        size_t n_chunk = fill_chunk(src, n_src, &read, chunk);
        if (is_padded && n_chunk > 0) {
            return fault(BASE64_BAD_PADDING, position,
                         find_character(src, n_src, start, 0));
        }
        size_t at = 0;
        ptrdiff_t n = decode_strict(bulk, url, chunk, n_chunk, dst + written,
                                    n_dst - written, &at);
        if (n < 0) {
            return fault((enum base64_fault)n, position,
                         find_character(src, n_src, start, at));
        }
        written += (size_t)n;
        is_padded = is_padded || (size_t)n < n_chunk / 4 * 3;
    }
    return (ptrdiff_t)written;
}

ptrdiff_t base64_decode(enum simd_level level, struct base64_options options,
                        const uint8_t *src, size_t n_src, uint8_t *dst,
                        size_t n_dst, size_t *position)
{
    assert(simd_is_supported(level));
    base64_bulk *bulk = bulk_for(level);
    return options.whitespace
               ? decode_spaced(bulk, options.url, src, n_src, dst, n_dst,
                               position)
               : decode_strict(bulk, options.url, src, n_src, dst, n_dst,
                               position);
}

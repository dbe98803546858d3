/*
 * Strict Base64 decoding (RFC 4648): only what an encoder would have written
 * is accepted. The caller owns both buffers, nothing is allocated, and every
 * level of simd.h writes the same bytes and finds the same fault.
 *
 * | fault                 | example  | position                             |
 * |-----------------------|----------|--------------------------------------|
 * | BASE64_BAD_CHARACTER  | "AB*D"   | of the character: 2                  |
 * | BASE64_BAD_PADDING    | "AB=x"   | of the character that must be '=', or|
 * |                       | "A==="   | of a '=' that is too early, or of the|
 * |                       | "AA==AA" | first character after the end: 3 1 4 |
 * | BASE64_TRUNCATED      | "ABC"    | the end of the text: 3               |
 * | BASE64_TRAILING_BITS  | "AB=="   | of the last character before '=': 1  |
 * | BASE64_NO_SPACE       |          | of the group that did not fit        |
 *
 * The first faulty group of four is reported; in it, what is wrong with a
 * character before bits that are not zero, and that before want of space.
 */
#ifndef EVMP_BASE64_H
#define EVMP_BASE64_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "simd.h"

enum base64_fault {
    BASE64_BAD_CHARACTER = -1,
    BASE64_BAD_PADDING = -2,
    BASE64_TRUNCATED = -3,
    BASE64_TRAILING_BITS = -4,
    BASE64_NO_SPACE = -5,
};

struct base64_options {
    bool url;        /* '-' and '_' instead of '+' and '/' */
    bool whitespace; /* skip space, tab, LF, FF and CR anywhere */
};

/*
 * Decode src[0..n_src) into dst[0..n_dst), which must not overlap.
 * Returns the bytes written, or a base64_fault with *position set to an
 * index into src. Never writes outside dst; after a fault the contents of
 * dst are unspecified.
 */
ptrdiff_t base64_decode(enum simd_level level, struct base64_options options,
                        const uint8_t *src, size_t n_src, uint8_t *dst,
                        size_t n_dst, size_t *position);

#endif

/*
 * What base64.c and its vector loops share; nobody else includes it.
 *
 * A bulk loop decodes whole groups of four clean characters from the left
 * and stops at the first block it does not like, or near the end. It returns
 * the characters it consumed, a multiple of 4, and has written 3/4 of that.
 * The caller guarantees room for n / 4 * 3 bytes at dst; a loop whose stores
 * are wider than what they produce stops early instead of asking for more.
 */
#ifndef EVMP_BASE64_KERNEL_H
#define EVMP_BASE64_KERNEL_H

#include "base64.h"

/* [url][character] = 1 + its six bits, 0 for what is not in the alphabet. */
extern const uint8_t base64_values[2][256];

typedef size_t base64_bulk(bool url, const uint8_t *src, size_t n,
                           uint8_t *dst);

base64_bulk base64_bulk_avx2;
base64_bulk base64_bulk_avx512;
base64_bulk base64_bulk_neon;

#endif

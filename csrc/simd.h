/*
 * The instruction sets that the kernels know, and which of them this CPU has.
 *
 * Every kernel takes a level and gives the same bytes at each. A level that
 * a kernel has no code for falls to the next lower one it has. Only a level
 * for which simd_is_supported() is true may be passed to a kernel.
 */
#ifndef EVMP_SIMD_H
#define EVMP_SIMD_H

#include <stdbool.h>

#if defined(__x86_64__) || defined(__i386__)
#define SIMD_X86 1
#elif defined(__aarch64__)
#define SIMD_NEON_BUILT 1
#endif

enum simd_level {
    SIMD_PORTABLE = 0,
    SIMD_NEON = 1,   /* always there on aarch64 */
    SIMD_AVX2 = 2,
    SIMD_AVX512 = 3, /* BW, VBMI, VNNI: Ice Lake, Zen 4 and later */
};
#define SIMD_N_LEVELS 4

const char *simd_name(enum simd_level level);
bool simd_is_supported(enum simd_level level);
enum simd_level simd_best(void);

#endif

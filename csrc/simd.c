#include "simd.h"

#include <stddef.h>

const char *simd_name(enum simd_level level)
{
    static const char *const names[SIMD_N_LEVELS] = {
        [SIMD_PORTABLE] = "portable",
        [SIMD_NEON] = "neon",
        [SIMD_AVX2] = "avx2",
        [SIMD_AVX512] = "avx512",
    };
    return names[level];
}

bool simd_is_supported(enum simd_level level)
{
    switch (level) {
    case SIMD_PORTABLE:
        return true;
    case SIMD_NEON:
#ifdef SIMD_NEON_BUILT
        return true;
#else
        return false;
#endif
    case SIMD_AVX2:
#ifdef SIMD_X86
        return __builtin_cpu_supports("avx2") != 0;
#else
        return false;
#endif
    case SIMD_AVX512:
#ifdef SIMD_X86
        return __builtin_cpu_supports("avx2") != 0 &&
               __builtin_cpu_supports("avx512bw") != 0 &&
               __builtin_cpu_supports("avx512vbmi") != 0 &&
               __builtin_cpu_supports("avx512vnni") != 0;
#else
        return false;
#endif
    }
    return false;
}

enum simd_level simd_best(void)
{
    enum simd_level best = SIMD_PORTABLE;
    for (int level = 0; level < SIMD_N_LEVELS; level++) {
        if (simd_is_supported((enum simd_level)level)) {
            best = (enum simd_level)level;
        }
    }
    return best;
}

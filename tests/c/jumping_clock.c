/* A wall clock that leaps by days, forth and back, each time that anybody looks at it.

   Preloaded, it stands before the C library's clock_gettime, gettimeofday and time. Clocks that are
   not of the wall go on as they are. */

#define _GNU_SOURCE
#include <stdatomic.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { DAY_SECONDS = 86400, MAX_DAYS = 7 };

static atomic_uint looks;

static time_t leap(void)
{
    unsigned look = atomic_fetch_add(&looks, 1);
    time_t days = (time_t)(look % MAX_DAYS) + 1;
    return (look % 2 ? days : -days) * DAY_SECONDS;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += leap();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec exact;
    int result = clock_gettime(CLOCK_REALTIME, &exact);
    (void)zone;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return result;
}

time_t time(time_t *seconds)
{
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (seconds)
        *seconds = exact.tv_sec;
    return exact.tv_sec;
}

/*
 * The ring under threads, killed processes and killed instructions; built with
 * sanitizers by test_ring_sanitizers.py:
 *
 *     fuzz_ring threads SEED ROWS          for the thread sanitizer
 *     fuzz_ring steps SEED ROWS            processes die between two steps
 *     fuzz_ring instructions SEED ROWS     ... at every single instruction
 *
 *     reader -> first (1 row) -> 3 decoders -> second (3 rows)
 *            -> 2 predictors -> third (3 rows) -> writer
 *
 * Every stage adds to a row what only it knows; the writer checks the sum, and
 * that rows come in order. Prints a line, or what is wrong and exits with 1.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"

enum { READER, DECODER, PREDICTOR = 4, WRITER = 6, N_SEATS };
enum { N_WORDS = 4, FAULT_RECIPROCAL = 200 };

#ifndef MAX_SECONDS
#define MAX_SECONDS 120
#endif
#define NAP_NS 50000000LL

static struct world {
    uint64_t rows;    /* how many there are */
    uint64_t written; /* how many the writer has written: its file */
    size_t size;      /* of the memory */
} *world;

static ring_control *rings[3];
static uint64_t seed;

static void fail(const char *what, uint64_t row)
{
    printf("row %" PRIu64 ": %s\n", row, what);
    fflush(stdout);
    _exit(1);
}

static uint64_t *payload(const ring_control *ring, uint64_t n)
{
    uint64_t place = n % (ring->n_slots * ring->n_rows);
    uintptr_t start = (uintptr_t)ring + ring->payload;
    return (uint64_t *)(start + place * ring->row_bytes);
}

/* What stands in word i of row n behind `stage` stages. */
static uint64_t value(uint64_t n, int i, int stage)
{
    return (n + seed) * 0x9e3779b97f4a7c15u + (uint64_t)i +
           (uint64_t)stage * 1000003u;
}

/* --- the stages ---------------------------------------------------------- */

static bool is_stopped(int answer, uint64_t row)
{
    if (answer == RING_STOPPED) {
        fail("stopped", row);
    }
    return answer != 0;
}

static void publish(uint64_t n)
{
    for (int hop = 0; hop < 3; hop++) {
        while (is_stopped(ring_wait_open(rings[hop], n, NAP_NS), n)) {
            continue;
        }
    }
    for (int i = 0; i < N_WORDS; i++) {
        payload(rings[0], n)[i] = value(n, i, 0);
    }
    if (!ring_commit(rings[0], n)) {
        fail("has no place", n);
    }
}

static void read_rows(void)
{
    uint64_t n = ring_cursor(rings[0]);
    while (ring_is_done(rings[0], n)) {
        n++;
    }
    for (; n < world->rows; n++) {
        publish(n);
    }
    for (int hop = 2; hop >= 0; hop--) {
        ring_close(rings[hop], world->rows);
    }
}

static void pass_row(int hop, uint64_t n)
{
    if (ring_is_done(rings[hop + 1], n)) {
        return;
    }
    for (int i = 0; i < N_WORDS; i++) {
        payload(rings[hop + 1], n)[i] =
            payload(rings[hop], n)[i] + value(0, 0, 1) - value(0, 0, 0);
    }
    if (!ring_commit(rings[hop + 1], n)) {
        fail("has no place downstream", n);
    }
}

/* Takes a batch through a stage. Returns false once there is none left. */
static bool pass_batch(int hop, uint8_t seat, int64_t nap_ns)
{
    ring_control *ring = rings[hop];
    int64_t seq = ring_claim(ring, seat, false, nap_ns);
    for (uint64_t i = 0; seq >= 0 && i < ring->n_rows; i++) {
        pass_row(hop, (uint64_t)seq * ring->n_rows + i);
    }
    if (seq >= 0 && !ring_release(ring, (uint64_t)seq, seat)) {
        fail("was taken away", (uint64_t)seq * ring->n_rows);
    }
    return seq != RING_DRAINED;
}

static void write_row(uint64_t n)
{
    if (n > world->written) {
        fail("came too early", n);
    }
    for (int i = 0; i < N_WORDS && n == world->written; i++) {
        if (payload(rings[2], n)[i] != value(n, i, 2)) {
            fail("is wrong", n);
        }
    }
    if (n == world->written) {
        world->written++;
    }
}

static bool write_batch(int64_t nap_ns)
{
    ring_control *ring = rings[2];
    int64_t seq = ring_claim(ring, WRITER, true, nap_ns);
    for (uint64_t i = 0; seq >= 0 && i < ring->n_rows; i++) {
        write_row((uint64_t)seq * ring->n_rows + i);
    }
    if (seq >= 0 && !ring_release(ring, (uint64_t)seq, WRITER)) {
        fail("was taken away", (uint64_t)seq * ring->n_rows);
    }
    return seq != RING_DRAINED;
}

static int hop_of(int seat)
{
    return seat < PREDICTOR ? 0 : 1;
}

static void live(int seat)
{
    if (seat == READER) {
        read_rows();
    } else if (seat == WRITER) {
        while (write_batch(NAP_NS)) {
            continue;
        }
    } else {
        while (pass_batch(hop_of(seat), (uint8_t)seat, NAP_NS)) {
            continue;
        }
    }
}

/* What the supervisor does after waitpid. Returns the batches handed on. */
static int recover(int seat)
{
    int hop = seat == WRITER ? 2 : hop_of(seat), n_reopened = 0;
    ring_control *ring = rings[hop];
    uint64_t first = seat == READER ? 0 : ring_cursor(ring);
    uint64_t end = seat == READER ? 0 : first + ring->n_slots;
    for (uint64_t seq = first; seq < end; seq++) {
        ring_word w = ring_peek(ring, seq);
        if (w.seq != seq || w.phase != RING_RUN || w.seat != seat) {
            continue;
        }
        bool is_done = hop < 2;
        for (uint64_t i = 0; is_done && i < ring->n_rows; i++) {
            is_done = ring_is_done(rings[hop + 1], seq * ring->n_rows + i);
        }
        n_reopened += !is_done;
        if (!(is_done ? ring_release(ring, seq, w.seat)
                      : ring_reopen(ring, seq, w.seat, 1))) {
            fail("changed behind the dead", seq * ring->n_rows);
        }
    }
    for (int i = 0; i < 3; i++) {
        ring_wake(rings[i]);
    }
    return n_reopened;
}

/* --- threads ------------------------------------------------------------- */

static void *live_in_thread(void *seat)
{
    live((int)(intptr_t)seat);
    return NULL;
}

static void run_threads(void)
{
    pthread_t threads[N_SEATS];
    for (intptr_t seat = 0; seat < N_SEATS; seat++) {
        if (pthread_create(&threads[seat], NULL, live_in_thread,
                           (void *)seat) != 0) {
            fail("no thread", (uint64_t)seat);
        }
    }
    for (int seat = 0; seat < N_SEATS; seat++) {
        pthread_join(threads[seat], NULL);
    }
    printf("%" PRIu64 " rows\n", world->written);
}

/* --- processes that die between two steps -------------------------------- */

static pid_t start(int seat, uint64_t n_deaths)
{
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ring_set_fault(FAULT_RECIPROCAL,
                       value(n_deaths, seat, 0) * 0xbf58476d1ce4e5b9u);
        live(seat);
        _exit(0);
    }
    return pid;
}

static void run_steps(void)
{
    pid_t pids[N_SEATS];
    int status, n_alive = N_SEATS, n_requeued = 0;
    uint64_t n_deaths = 0;
    for (int seat = 0; seat < N_SEATS; seat++) {
        pids[seat] = start(seat, n_deaths);
    }
    while (n_alive > 0) {
        pid_t pid = waitpid(-1, &status, 0);
        int seat = 0;
        while (seat < N_SEATS - 1 && pids[seat] != pid) {
            seat++;
        }
        if (WIFEXITED(status)) {
            n_alive--;
            if (WEXITSTATUS(status) != 0) {
                fail("is where a process failed", world->written);
            }
            continue;
        }
        n_requeued += recover(seat);
        pids[seat] = start(seat, ++n_deaths);
    }
    printf("%" PRIu64 " rows, %" PRIu64 " deaths, %d batches requeued\n",
           world->written, n_deaths, n_requeued);
}

/* --- processes that die at each instruction ------------------------------ */

/* One turn of a stage, without waiting. */
static void turn(int seat)
{
    if (seat == READER) {
        uint64_t n = ring_cursor(rings[0]);
        while (ring_is_done(rings[0], n)) {
            n++;
        }
        if (n < world->rows && ring_is_open(rings[0], n) &&
            ring_is_open(rings[1], n) && ring_is_open(rings[2], n)) {
            publish(n);
        }
    } else if (seat == WRITER) {
        write_batch(0);
    } else {
        pass_batch(hop_of(seat), (uint8_t)seat, 0);
    }
}

static void finish(void)
{
    while (world->written < world->rows) {
        turn(READER);
        turn(DECODER);
        turn(PREDICTOR);
        turn(WRITER);
    }
}

/* What a kill at this instruction leaves is what the memory holds now: settles
 * it and brings all rows to their end, then puts the memory back. */
static void die_here(int seat, char *before)
{
    memcpy(before, world, world->size);
    recover(seat);
    finish();
    memcpy(world, before, world->size);
}

/* Has a process take a turn, instruction by instruction; it dies at each that
 * follows a change of the shared memory. Returns how many there were. */
static uint64_t step_through(int seat, char *before)
{
    int status;
    uint64_t n_deaths = 0;
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        turn(seat);
        _exit(0);
    }
    waitpid(pid, &status, 0);
    memset(before, 0, world->size);
    while (WIFSTOPPED(status)) {
        if (memcmp(before, world, world->size) != 0) {
            die_here(seat, before);
            n_deaths++;
        }
        if (ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) != 0) {
            fail("cannot be stepped through", world->written);
        }
        waitpid(pid, &status, 0);
    }
    return n_deaths;
}

static void run_instructions(void)
{
    char *before = malloc(world->size);
    uint64_t n_deaths = 0;
    while (before != NULL && world->written < world->rows) {
        static const int seats[] = {READER, DECODER, PREDICTOR, WRITER};
        for (size_t i = 0; i < sizeof seats / sizeof *seats; i++) {
            n_deaths += step_through(seats[i], before);
        }
    }
    free(before);
    printf("%" PRIu64 " rows, %" PRIu64 " deaths\n", world->written, n_deaths);
}

/* ------------------------------------------------------------------------- */

static void build(uint64_t rows)
{
    static const uint64_t geometry[3][2] = {{5, 1}, {3, 3}, {4, 3}};
    size_t size = ring_measure(5, 3, N_WORDS * 8);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, page + 3 * size, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fail("no memory", 0);
    }
    world = (void *)memory;
    world->rows = rows / 3 * 3;
    world->size = page + 3 * size;
    for (int i = 0; i < 3; i++) {
        rings[i] = (void *)(memory + page + (size_t)i * size);
        ring_format(rings[i], geometry[i][0], geometry[i][1], N_WORDS * 8);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        return 2;
    }
    seed = strtoull(argv[2], NULL, 10);
    build(strtoull(argv[3], NULL, 10));
    alarm(MAX_SECONDS); /* whoever waits for ever dies of it */
    if (strcmp(argv[1], "threads") == 0) {
        run_threads();
    } else if (strcmp(argv[1], "steps") == 0) {
        run_steps();
    } else {
        run_instructions();
    }
    return world->written == world->rows ? 0 : 1;
}

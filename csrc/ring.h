/*
 * One hop of the pipeline: rows pass from producers to consumers, in batches,
 * through memory that forked processes share and that any of them may die in.
 *
 * A ring has n_slots slots of n_rows rows. Where a row lives is a pure
 * function of its sequence number n:
 *
 *     batch s = n / n_rows,  slot = s % n_slots,  position = n % n_rows
 *
 * so that a row that is worked on twice writes the same bytes to the same
 * place: execution is at least once, its effect exactly once.
 *
 *     offset 0   control      geometry | cursor, end, stopped | filled | freed
 *                slots        n_slots x { word | done bits }       64 B lines
 *                headers      n_slots x n_rows x ring_row          64 B lines
 *     page       payload      n_slots x n_rows x row_bytes           sparse
 *
 * The payload of a row is its note, which the first stage leaves, and behind
 * it the data.
 *
 * All authority over a batch is in one 64-bit word per slot:
 *
 *     seq:40 | seat:8 | attempt:8 | phase:8
 *
 * | from               | to                     | by         | when          |
 * |--------------------|------------------------|------------|---------------|
 * | OPEN(s), bits < B  | OPEN(s), one bit more  | a producer | row committed |
 * | OPEN(s), bits = B  | RUN(s, seat)           | consumer   | claim (CAS)   |
 * | RUN(s, seat)       | OPEN(s + n_slots)      | that seat  | release       |
 * | RUN(s, dead seat)  | OPEN(s), next attempt  | supervisor | after waitpid |
 * | RUN(s, dead seat)  | OPEN(s + n_slots)      | supervisor | after waitpid,|
 * |                    |                        |            | rows all done |
 *
 * Completion is an idempotent bit per row, never a counter. Its sense turns
 * with every lap (lap = s / n_slots: done is 1 on even laps and 0 on odd
 * ones), so a release clears nothing: it is one store, and cannot be torn.
 *
 * Who writes what: headers and payload of row n belong to its producer until
 * the commit, to the claiming consumer until the release. In the last ring
 * every stage may produce a row, which has failed there, and the supervisor one
 * that kills, never two at a time. What an attempt is worth is told where it is
 * counted, in evmp/ring.py. Geometry is written
 * once, before the fork. `cursor` is a hint, and so is all of the bells: a
 * wake-up that is lost costs RING_NAP_NS, never a hang.
 *
 * Nothing here allocates, locks, or trusts a time-out as proof of death.
 */
#ifndef EVMP_RING_H
#define EVMP_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RING_LINE 64
#define RING_MAX_SEAT 255
#define RING_MAX_ATTEMPT 255
#define RING_NAP_NS 20000000LL /* the longest sleep without a fresh look */

enum ring_phase { RING_OPEN = 0, RING_RUN = 1 };

/* Answers of the waiting calls, below every sequence number. */
enum ring_answer {
    RING_TIMEOUT = -1, /* nothing within the time asked for */
    RING_DRAINED = -2, /* closed, and every row released */
    RING_STOPPED = -3  /* ring_stop was called: leave at once */
};

typedef struct ring_bell {
    _Alignas(RING_LINE) _Atomic uint32_t count;
    _Atomic uint32_t asleep; /* filled: somebody may be in futex_wait */
    _Atomic uint64_t wanted; /* freed: the first row that somebody waits for */
} ring_bell;

typedef struct ring_control {
    _Alignas(RING_LINE) uint64_t magic;
    uint64_t n_slots, n_rows, row_bytes, slot_bytes;
    uint64_t headers, payload, total; /* offsets from the control block */
    _Alignas(RING_LINE) _Atomic uint64_t cursor; /* no batch below is open */
    _Atomic uint64_t end; /* rows in all; UINT64_MAX until closed */
    _Atomic uint32_t stopped;
    ring_bell filled; /* a batch became complete */
    ring_bell freed;  /* the wanted row has its place */
} ring_control;

typedef struct ring_slot {
    _Alignas(RING_LINE) _Atomic uint64_t word;
    _Alignas(RING_LINE) _Atomic uint64_t done[]; /* n_rows bits */
} ring_slot;

typedef struct ring_word {
    uint64_t seq;
    uint8_t seat, attempt, phase;
} ring_word;

/* The header of a row. What it means is told in evmp/ring.py. */
typedef struct ring_row {
    _Alignas(RING_LINE) uint64_t row, next, length;
    uint32_t mark, kind, height, width;
    uint64_t note_length;
} ring_row;

/*
 * Bytes that a ring of this geometry takes. Returns 0 where the geometry is
 * impossible: a zero, or a size that overflows.
 */
size_t ring_measure(uint64_t n_slots, uint64_t n_rows, uint64_t row_bytes);

/*
 * Lays out an empty ring in `memory`: zeroed, page-aligned, of at least
 * ring_measure() bytes. Once, before any other process sees it.
 */
void ring_format(ring_control *ring, uint64_t n_slots, uint64_t n_rows,
                 uint64_t row_bytes);

/*
 * Whether `ring` is aligned memory of `size` bytes that ring_format has laid
 * out: what it says about itself leads nowhere outside.
 */
bool ring_is_valid(const ring_control *ring, size_t size);

/* The header and the payload of row n, of row_bytes. */
ring_row *ring_header(const ring_control *ring, uint64_t n);
unsigned char *ring_payload(const ring_control *ring, uint64_t n);

/* Producer: whether the place of row n is free for it. */
bool ring_is_open(const ring_control *ring, uint64_t n);

/* Waits for ring_is_open. Returns 0, RING_TIMEOUT or RING_STOPPED. */
int ring_wait_open(ring_control *ring, uint64_t n, int64_t timeout_ns);

/* Whether row n is committed, or even already released by its consumer. */
bool ring_is_done(const ring_control *ring, uint64_t n);

/*
 * Producer: publishes row n, whose header and payload are written. May be
 * repeated. Returns false, and changes nothing, where row n has no place now.
 */
bool ring_commit(ring_control *ring, uint64_t n);

/*
 * Producer: writes header->length bytes of data behind the note of row n, and
 * its header but for the note's length, and commits it. The data may be the
 * ring's own memory. Returns false, and writes nothing, where row n has no
 * place now, or no room for the data.
 */
bool ring_put(ring_control *ring, uint64_t n, const ring_row *header,
              const void *data);

/* Bytes of data that fit behind the note of row n. */
uint64_t ring_room(const ring_control *ring, uint64_t n);

/*
 * Consumer: takes the oldest complete batch for `seat`; with `ordered` only
 * the oldest of all. Waits up to timeout_ns. Returns its sequence number or a
 * ring_answer.
 */
int64_t ring_claim(ring_control *ring, uint8_t seat, bool ordered,
                   int64_t timeout_ns);

/*
 * Consumer, or the supervisor for a dead one: gives the slot to the batch of
 * the next lap. Returns false where `seat` does not hold batch `seq`.
 */
bool ring_release(ring_control *ring, uint64_t seq, uint8_t seat);

/*
 * Supervisor only, after waitpid has proven the death of `seat`: hands batch
 * `seq` to the next claimer, as `attempt`. Returns false as ring_release.
 */
bool ring_reopen(ring_control *ring, uint64_t seq, uint8_t seat,
                 uint8_t attempt);

/* The word of the slot in which batch seq lives, taken apart. */
ring_word ring_peek(const ring_control *ring, uint64_t seq);

/* Producer of the first ring: there are `end` rows, a multiple of n_rows. */
void ring_close(ring_control *ring, uint64_t end);

/* Makes every waiting call return RING_STOPPED, now and later. */
void ring_stop(ring_control *ring);

/* Wakes every sleeper, after a recovery. */
void ring_wake(ring_control *ring);

/* Complete or claimed batches that wait for their release. Approximate. */
uint64_t ring_backlog(const ring_control *ring);

/* The lowest batch that is not yet released. */
uint64_t ring_cursor(ring_control *ring);

/*
 * Test hook: SIGKILL the calling process between two protocol steps, with a
 * chance of 1 in `reciprocal`; 0, the default, never does.
 */
void ring_set_fault(uint32_t reciprocal, uint64_t seed);

#endif

/* See ring.h: the protocol, who may write what, and why it survives death. */
#define _GNU_SOURCE
#include "ring.h"

#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RING_MAGIC 0x31676e6952706d76ULL
#define RING_PAGE 4096
#define SPIN_ROUNDS 48 /* about 2 us of pause instructions */

static const uint64_t SEQ_MAX = (1ULL << 40) - 1;

/* --- test hook ----------------------------------------------------------- */

static uint32_t fault_reciprocal;
static uint64_t fault_state;

void ring_set_fault(uint32_t reciprocal, uint64_t seed)
{
    fault_reciprocal = reciprocal;
    fault_state = seed * 2 + 1;
}

static void step(void)
{
    if (fault_reciprocal == 0) {
        return;
    }
    fault_state ^= fault_state << 13; /* xorshift64 */
    fault_state ^= fault_state >> 7;
    fault_state ^= fault_state << 17;
    if (fault_state % fault_reciprocal == 0) {
        kill(getpid(), SIGKILL);
    }
}

/* --- words --------------------------------------------------------------- */

static uint64_t pack(uint64_t seq, uint8_t seat, uint8_t attempt, uint8_t phase)
{
    return seq << 24 | (uint64_t)seat << 16 | (uint64_t)attempt << 8 | phase;
}

static ring_word unpack(uint64_t word)
{
    ring_word w = {.seq = word >> 24,
                   .seat = (uint8_t)(word >> 16),
                   .attempt = (uint8_t)(word >> 8),
                   .phase = (uint8_t)word};
    return w;
}

/* --- layout -------------------------------------------------------------- */

static size_t round_up(size_t value, size_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static size_t slot_size(uint64_t n_rows)
{
    return RING_LINE + round_up((size_t)(n_rows + 63) / 64 * 8, RING_LINE);
}

size_t ring_measure(uint64_t n_slots, uint64_t n_rows, uint64_t row_bytes)
{
    uint64_t rows, payload;
    if (n_slots == 0 || n_rows == 0 || row_bytes == 0 ||
        n_slots > UINT32_MAX || n_rows > UINT32_MAX ||
        __builtin_mul_overflow(n_slots, n_rows, &rows) || rows > UINT32_MAX ||
        __builtin_mul_overflow(rows, row_bytes, &payload) ||
        payload > (uint64_t)PTRDIFF_MAX / 2) {
        return 0;
    }
    size_t head = sizeof(ring_control) + n_slots * slot_size(n_rows) +
                  rows * sizeof(ring_row);
    return round_up(head, RING_PAGE) + round_up(payload, RING_PAGE);
}

static ring_slot *slot_of(const ring_control *ring, uint64_t seq)
{
    uintptr_t slots = (uintptr_t)(ring + 1);
    return (ring_slot *)(slots + seq % ring->n_slots * ring->slot_bytes);
}

/* Where the parts lie follows from three numbers; these are possible ones. */
static void set_geometry(ring_control *ring, uint64_t n_slots, uint64_t n_rows,
                         uint64_t row_bytes)
{
    ring->n_slots = n_slots;
    ring->n_rows = n_rows;
    ring->row_bytes = row_bytes;
    ring->slot_bytes = slot_size(n_rows);
    ring->headers = sizeof *ring + n_slots * ring->slot_bytes;
    ring->payload = round_up(
        ring->headers + n_slots * n_rows * sizeof(ring_row), RING_PAGE);
    ring->total = ring_measure(n_slots, n_rows, row_bytes);
}

void ring_format(ring_control *ring, uint64_t n_slots, uint64_t n_rows,
                 uint64_t row_bytes)
{
    set_geometry(ring, n_slots, n_rows, row_bytes);
    for (uint64_t s = 0; s < n_slots; s++) {
        atomic_store(&slot_of(ring, s)->word, pack(s, 0, 0, RING_OPEN));
    }
    atomic_store(&ring->end, UINT64_MAX);
    atomic_store(&ring->freed.wanted, UINT64_MAX);
    ring->magic = RING_MAGIC;
}

bool ring_is_valid(const ring_control *ring, size_t size)
{
    if ((uintptr_t)ring % RING_LINE != 0 || size < sizeof *ring ||
        ring->magic != RING_MAGIC ||
        ring_measure(ring->n_slots, ring->n_rows, ring->row_bytes) == 0) {
        return false;
    }
    ring_control own = {0};
    set_geometry(&own, ring->n_slots, ring->n_rows, ring->row_bytes);
    return ring->slot_bytes == own.slot_bytes &&
           ring->headers == own.headers && ring->payload == own.payload &&
           ring->total == own.total && own.total <= size;
}

/* --- rows and their bits ------------------------------------------------- */

static uint64_t place_of(const ring_control *ring, uint64_t n)
{
    return n % (ring->n_slots * ring->n_rows);
}

ring_row *ring_header(const ring_control *ring, uint64_t n)
{
    uintptr_t headers = (uintptr_t)ring + ring->headers;
    return (ring_row *)headers + place_of(ring, n);
}

unsigned char *ring_payload(const ring_control *ring, uint64_t n)
{
    uintptr_t payload = (uintptr_t)ring + ring->payload;
    return (unsigned char *)payload + place_of(ring, n) * ring->row_bytes;
}

uint64_t ring_room(const ring_control *ring, uint64_t n)
{
    uint64_t note = ring_header(ring, n)->note_length;
    return note < ring->row_bytes ? ring->row_bytes - note : 0;
}

static bool is_even_lap(const ring_control *ring, uint64_t seq)
{
    return seq / ring->n_slots % 2 == 0;
}

static bool bit_is_done(const ring_control *ring, uint64_t n)
{
    uint64_t seq = n / ring->n_rows, position = n % ring->n_rows;
    uint64_t bits = atomic_load(&slot_of(ring, seq)->done[position / 64]);
    return (bits >> position % 64 & 1) == is_even_lap(ring, seq);
}

/* Whether all rows of batch seq, known to be the slot's, are committed. */
static bool is_complete(const ring_control *ring, uint64_t seq)
{
    const ring_slot *slot = slot_of(ring, seq);
    uint64_t flip = is_even_lap(ring, seq) ? 0 : UINT64_MAX;
    for (uint64_t left = ring->n_rows, i = 0; left > 0; i++) {
        uint64_t width = left < 64 ? left : 64;
        uint64_t mask = UINT64_MAX >> (64 - width);
        if (((atomic_load(&slot->done[i]) ^ flip) & mask) != mask) {
            return false;
        }
        left -= width;
    }
    return true;
}

bool ring_is_open(const ring_control *ring, uint64_t n)
{
    ring_word w = ring_peek(ring, n / ring->n_rows);
    return w.seq == n / ring->n_rows && w.phase == RING_OPEN;
}

bool ring_is_done(const ring_control *ring, uint64_t n)
{
    uint64_t seq = n / ring->n_rows;
    ring_word w = ring_peek(ring, seq);
    return w.seq > seq || (w.seq == seq && bit_is_done(ring, n));
}

ring_word ring_peek(const ring_control *ring, uint64_t seq)
{
    return unpack(atomic_load(&slot_of(ring, seq)->word));
}

/* --- waiting ------------------------------------------------------------- */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long futex(_Atomic uint32_t *word, int op, uint32_t value,
                  const struct timespec *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

/*
 * `asleep` is taken down before the wake and put up again when somebody was
 * there, since others may be. A sleeper that is killed leaves it up, which
 * costs one system call, once.
 */
static void bell_ring(ring_bell *bell)
{
    atomic_fetch_add(&bell->count, 1);
    step();
    if (atomic_load(&bell->asleep) == 0) {
        return;
    }
    atomic_store(&bell->asleep, 0);
    if (futex(&bell->count, FUTEX_WAKE, 1, NULL) > 0) {
        atomic_store(&bell->asleep, 1);
    }
}

static void bell_wake_all(ring_bell *bell)
{
    atomic_fetch_add(&bell->count, 1);
    futex(&bell->count, FUTEX_WAKE, INT32_MAX, NULL);
}

/* Waits until the bell has left `seen`, deadline_ns, or RING_NAP_NS. */
static void bell_wait(ring_bell *bell, uint32_t seen, int64_t deadline_ns)
{
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        if (atomic_load(&bell->count) != seen) {
            return;
        }
        relax();
    }
    int64_t left = deadline_ns - now_ns();
    if (left > 0) {
        long nap = (long)(left < RING_NAP_NS ? left : RING_NAP_NS);
        struct timespec timeout = {.tv_sec = 0, .tv_nsec = nap};
        atomic_store(&bell->asleep, 1);
        futex(&bell->count, FUTEX_WAIT, seen, &timeout);
    }
}

/* Whether the time is over; the deadline is set when first asked for. */
static bool is_late(int64_t timeout_ns, int64_t *deadline_ns)
{
    if (timeout_ns <= 0) {
        return true;
    }
    int64_t now = now_ns();
    if (*deadline_ns == 0) {
        *deadline_ns = now + timeout_ns;
    }
    return now >= *deadline_ns;
}

/* Whether the place of row n is its own, or was already. */
static bool has_come(const ring_control *ring, uint64_t n)
{
    return ring_peek(ring, n / ring->n_rows).seq >= n / ring->n_rows;
}

/* Has ring_release wake us once row n, or an earlier one, has come. */
static void want(ring_bell *freed, uint64_t n)
{
    uint64_t first = atomic_load(&freed->wanted);
    while (n < first &&
           !atomic_compare_exchange_weak(&freed->wanted, &first, n)) {
        continue;
    }
}

/*
 * Rings `freed` if what is wanted has come: a producer that waits for a row is
 * not woken for each before it. It has loaded the count, said what it wants,
 * and looked; here the word has changed, then we look at what is wanted: one
 * of the two sees the other. Who wants a later row sees the count change.
 */
static void tell_freed(ring_control *ring)
{
    uint64_t first = atomic_load(&ring->freed.wanted);
    if (first == UINT64_MAX || !has_come(ring, first)) {
        return;
    }
    atomic_compare_exchange_strong(&ring->freed.wanted, &first, UINT64_MAX);
    step();
    bell_wake_all(&ring->freed);
}

int ring_wait_open(ring_control *ring, uint64_t n, int64_t timeout_ns)
{
    int64_t deadline = 0;
    for (;;) {
        uint32_t seen = atomic_load(&ring->freed.count);
        if (atomic_load(&ring->stopped)) {
            return RING_STOPPED;
        }
        if (ring_is_open(ring, n)) {
            return 0;
        }
        if (is_late(timeout_ns, &deadline)) {
            return RING_TIMEOUT;
        }
        want(&ring->freed, n);
        if (!ring_is_open(ring, n)) {
            bell_wait(&ring->freed, seen, deadline);
        }
    }
}

/* --- the protocol -------------------------------------------------------- */

bool ring_commit(ring_control *ring, uint64_t n)
{
    uint64_t seq = n / ring->n_rows, position = n % ring->n_rows;
    ring_slot *slot = slot_of(ring, seq);
    uint64_t bit = 1ULL << position % 64;
    if (!ring_is_open(ring, n)) {
        return false;
    }
    step();
    if (is_even_lap(ring, seq)) {
        atomic_fetch_or(&slot->done[position / 64], bit);
    } else {
        atomic_fetch_and(&slot->done[position / 64], ~bit);
    }
    step();
    if (is_complete(ring, seq)) {
        bell_ring(&ring->filled);
    }
    return true;
}

bool ring_put(ring_control *ring, uint64_t n, const ring_row *header,
              const void *data)
{
    uint64_t room = ring_room(ring, n);
    if (!ring_is_open(ring, n) || header->length > room) {
        return false;
    }
    unsigned char *behind_note = ring_payload(ring, n) + ring->row_bytes - room;
    step(); /* the data may be of this very payload */
    memmove(behind_note, data, header->length);
    step();
    memcpy(ring_header(ring, n), header, offsetof(ring_row, note_length));
    return ring_commit(ring, n);
}

uint64_t ring_cursor(ring_control *ring)
{
    uint64_t cursor = atomic_load(&ring->cursor);
    while (ring_peek(ring, cursor).seq > cursor) {
        if (atomic_compare_exchange_weak(&ring->cursor, &cursor, cursor + 1)) {
            cursor++;
        }
    }
    return cursor;
}

/* One look over the ring, oldest batch first; a sequence or a ring_answer. */
static int64_t try_claim(ring_control *ring, uint8_t seat, bool ordered)
{
    uint64_t first = ring_cursor(ring);
    uint64_t end = atomic_load(&ring->end);
    uint64_t window = ordered ? 1 : ring->n_slots;
    if (end != UINT64_MAX && first >= end / ring->n_rows) {
        return RING_DRAINED;
    }
    for (uint64_t seq = first; seq < first + window; seq++) {
        _Atomic uint64_t *word = &slot_of(ring, seq)->word;
        uint64_t old = atomic_load(word);
        ring_word w = unpack(old);
        if (w.seq != seq || w.phase != RING_OPEN || !is_complete(ring, seq)) {
            continue;
        }
        uint64_t new = pack(seq, seat, w.attempt, RING_RUN);
        step();
        if (atomic_compare_exchange_strong(word, &old, new)) {
            step();
            return (int64_t)seq;
        }
    }
    return RING_TIMEOUT;
}

int64_t ring_claim(ring_control *ring, uint8_t seat, bool ordered,
                   int64_t timeout_ns)
{
    int64_t deadline = 0;
    for (;;) {
        uint32_t seen = atomic_load(&ring->filled.count);
        if (atomic_load(&ring->stopped)) {
            return RING_STOPPED;
        }
        int64_t answer = try_claim(ring, seat, ordered);
        if (answer != RING_TIMEOUT || is_late(timeout_ns, &deadline)) {
            return answer;
        }
        bell_wait(&ring->filled, seen, deadline);
    }
}

/* Moves the word of batch seq on, if `seat` holds it. */
static bool hand_on(ring_control *ring, uint64_t seq, uint8_t seat,
                    uint64_t new)
{
    _Atomic uint64_t *word = &slot_of(ring, seq)->word;
    uint64_t old = atomic_load(word);
    ring_word w = unpack(old);
    step();
    return w.seq == seq && w.phase == RING_RUN && w.seat == seat &&
           atomic_compare_exchange_strong(word, &old, new);
}

bool ring_release(ring_control *ring, uint64_t seq, uint8_t seat)
{
    uint64_t next = pack((seq + ring->n_slots) & SEQ_MAX, 0, 0, RING_OPEN);
    if (!hand_on(ring, seq, seat, next)) {
        return false;
    }
    step();
    ring_cursor(ring);
    tell_freed(ring);
    uint64_t end = atomic_load(&ring->end);
    if (end != UINT64_MAX && ring_cursor(ring) >= end / ring->n_rows) {
        ring_wake(ring);
    }
    return true;
}

bool ring_reopen(ring_control *ring, uint64_t seq, uint8_t seat,
                 uint8_t attempt)
{
    return hand_on(ring, seq, seat, pack(seq, 0, attempt, RING_OPEN));
}

void ring_close(ring_control *ring, uint64_t end)
{
    atomic_store(&ring->end, end);
    ring_wake(ring);
}

void ring_stop(ring_control *ring)
{
    atomic_store(&ring->stopped, 1);
    ring_wake(ring);
}

void ring_wake(ring_control *ring)
{
    bell_wake_all(&ring->filled);
    bell_wake_all(&ring->freed);
}

uint64_t ring_backlog(const ring_control *ring)
{
    uint64_t first = atomic_load(&ring->cursor), n = 0;
    for (uint64_t seq = first; seq < first + ring->n_slots; seq++) {
        ring_word w = ring_peek(ring, seq);
        n += w.seq == seq && (w.phase == RING_RUN || is_complete(ring, seq));
    }
    return n;
}

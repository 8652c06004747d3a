/* What a disk should hold, for the host that fills and checks it, and for a guest that witnesses how its disk fares.
 *
 *     witness fill FILE MIB PERCENT             write known data to so much of a disk, in runs of 1 to 16 MiB
 *     witness check FILE MIB PERCENT            see that it holds the data, and the log; prints what it found
 *     witness reset FILE MIB PERCENT            undo what a guest has done to it
 *     witness run DEVICE MIB PERCENT HZ [DIRTY] in a guest, for ever; DIRTY: MiB of its memory, 10 MB/s of which change
 *
 * The first MiB stays empty. Then comes the log, to a quarter of the disk, 64 MiB at most: a ring of records of 4 KiB. The
 * rest is data: each of its blocks of 4 KiB says which one it is, and how often it was written.
 * With each tick a guest appends a record, flushes it, reads it and an older one, rewrites 4 hot blocks, and reads 4 hot
 * and 4 others, all past its page cache. It says with a line what came of it; times are in microseconds:
 *
 *     TICK seq=17 append=310 write=120 reads=90,80,... wrong=0 failed=0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096L
#define MIB (1L << 20)
#define PER_MIB (MIB / BLOCK)
#define WORDS (BLOCK / 8)
#define MAGIC 0x57495442554c4f47ULL
#define MOST_HOT 8192
#define READS 8

static int disk;
static long mib, log_end, filled_count, records, hot_count, wrong, failed; /* log_end in MiB */
static long *filled; /* the MiBs that hold data */
static unsigned char *is_filled;
static uint32_t *version; /* of each block, while it is other than 0 */

static uint64_t chance(uint64_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state * 0x2545F4914F6CDD1DULL;
}

static uint64_t microseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ULL + t.tv_nsec / 1000;
}

/* A block that knows its number and its version. */
static void make_block(uint64_t *words, uint64_t number, uint64_t its_version)
{
    uint64_t state = (number + 1) * 0x9E3779B97F4A7C15ULL ^ its_version << 40;
    words[0] = number, words[1] = its_version;
    for (int i = 2; i < WORDS; i++) words[i] = chance(&state);
}

/* A record: magic, sequence, checksum, noise. */
static uint64_t checksum(const uint64_t *words)
{
    uint64_t sum = words[0] ^ words[1] * 31;
    for (int i = 3; i < WORDS; i++) sum = (sum ^ words[i]) * 1099511628211ULL;
    return sum;
}

static void make_record(uint64_t *words, uint64_t sequence)
{
    uint64_t state = ~sequence;
    words[0] = MAGIC, words[1] = sequence;
    for (int i = 3; i < WORDS; i++) words[i] = chance(&state);
    words[2] = checksum(words);
}

static int is_record(const uint64_t *words)
{
    return words[0] == MAGIC && words[2] == checksum(words);
}

static long record_at(uint64_t sequence) { return MIB + sequence % records * BLOCK; }

/* The hot blocks lie everywhere in the data. */
static long hot_block(long which) { return filled[which * filled_count / hot_count] * PER_MIB + which * 37 % PER_MIB; }

static void lay_out(int percent)
{
    uint64_t state = 42;
    log_end = mib / 4 > 64 ? 64 : mib / 4;
    records = (log_end - 1) * PER_MIB;
    is_filled = calloc(mib, 1), filled = calloc(mib, sizeof *filled), version = calloc(mib * PER_MIB, sizeof *version);
    for (long at = log_end; at < mib;) {
        long run = 1 + chance(&state) % 16;
        for (long end = at + run; at < end && at < mib; at++) is_filled[at] = 1, filled[filled_count++] = at;
        at += run * (100 - percent) / percent;
    }
    hot_count = filled_count * 8 < MOST_HOT ? filled_count * 8 : MOST_HOT;
}

static void fail(const char *what, long at)
{
    failed++;
    printf("FAILED %s at=%ld: %s\n", what, at, strerror(errno));
}

static void is_wrong(const char *what, long number, const uint64_t *words)
{
    if (wrong++ < 20) printf("WRONG %s=%ld has=%lu,%lu\n", what, number, words[0], words[1]);
}

static void read_record(uint64_t *words, uint64_t sequence)
{
    memset(words, 0xEE, BLOCK);
    if (pread(disk, words, BLOCK, record_at(sequence)) != BLOCK) fail("log", sequence);
    else if (!is_record(words) || words[1] != sequence) is_wrong("record", sequence, words);
}

/* Returns how long it took. */
static uint64_t read_block(uint64_t *words, uint64_t *expected, long number)
{
    memset(words, 0xEE, BLOCK);
    uint64_t began = microseconds();
    int good = pread(disk, words, BLOCK, number * BLOCK) == BLOCK;
    uint64_t took = microseconds() - began;
    make_block(expected, number, version[number]);
    if (!good) fail("read", number);
    else if (memcmp(words, expected, BLOCK)) is_wrong("block", number, words);
    return took;
}

static void *dirty_memory(void *argument)
{
    long pages = *(long *)argument * PER_MIB;
    uint64_t state = 99, *memory = malloc(pages * BLOCK);
    for (long i = 0; i < pages * WORDS; i++) memory[i] = chance(&state);
    for (;; usleep(50000))
        for (int i = 0; i < 122; i++) memory[chance(&state) % pages * WORDS] = chance(&state);
    return NULL;
}

static void run(int hz)
{
    uint64_t *words, *expected, state = 7, next = microseconds(), took[READS];
    if (posix_memalign((void **)&words, BLOCK, BLOCK) || posix_memalign((void **)&expected, BLOCK, BLOCK)) exit(1);
    for (uint64_t sequence = 0;; sequence++) {
        uint64_t began = microseconds(), appended, wrote = 0;
        make_record(words, sequence);
        if (pwrite(disk, words, BLOCK, record_at(sequence)) != BLOCK || fdatasync(disk)) fail("append", sequence);
        appended = microseconds() - began;
        read_record(words, sequence);
        read_record(words, sequence - chance(&state) % (sequence < (uint64_t)records ? sequence + 1 : (uint64_t)records));
        for (int i = 0; i < 4; i++) {
            long number = hot_block(chance(&state) % hot_count);
            make_block(words, number, version[number] + 1);
            began = microseconds();
            if (pwrite(disk, words, BLOCK, number * BLOCK) != BLOCK) fail("write", number);
            else version[number]++;
            if (microseconds() - began > wrote) wrote = microseconds() - began;
        }
        for (int i = 0; i < READS; i++)
            took[i] = read_block(words, expected, i < READS / 2 ? hot_block(chance(&state) % hot_count)
                : filled[chance(&state) % filled_count] * PER_MIB + (long)(chance(&state) % PER_MIB));
        printf("TICK seq=%lu append=%lu write=%lu reads=", sequence, appended, wrote);
        for (int i = 0; i < READS; i++) printf("%lu%c", took[i], i < READS - 1 ? ',' : ' ');
        printf("wrong=%ld failed=%ld\n", wrong, failed);
        fflush(stdout);
        next += 1000000 / hz;
        if (next > microseconds()) usleep(next - microseconds()); else next = microseconds();
    }
}

static void fill(void)
{
    uint64_t *words;
    if (posix_memalign((void **)&words, BLOCK, MIB)) perror("fill"), exit(1);
    if (lseek(disk, 0, SEEK_END) < mib * MIB && ftruncate(disk, mib * MIB)) perror("fill"), exit(1);
    for (long i = 0; i < filled_count; i++) {
        for (long k = 0; k < PER_MIB; k++) make_block(words + k * WORDS, filled[i] * PER_MIB + k, 0);
        if (pwrite(disk, words, MIB, filled[i] * MIB) != MIB) perror("fill"), exit(1);
    }
    if (fsync(disk)) perror("fill"), exit(1);
    printf("filled=%ld MiB\n", filled_count);
}

/* Each record is the last that its place had: they follow on each other, but for one step back, where the ring ends. */
static void check_log(uint64_t *words)
{
    uint64_t last = 0, steps = 0, found = 0;
    int has_ended = 0;
    for (long i = 0; i < records; i++) {
        if (pread(disk, words, BLOCK, record_at(i)) != BLOCK) { fail("log", i); continue; }
        if (!words[0]) { has_ended = 1; continue; }
        int follows = !found || words[1] == last + 1 || (words[1] + records == last + 1 && !steps++);
        if (has_ended || !is_record(words) || words[1] % records != (uint64_t)i || !follows) is_wrong("place", i, words);
        found++, last = words[1];
    }
    printf("records=%lu ", found);
}

/* As it was filled: no log, and the hot blocks as they were first. */
static void reset(void)
{
    uint64_t *words, *zeros;
    if (posix_memalign((void **)&words, BLOCK, BLOCK) || !(zeros = calloc(1, BLOCK))) exit(1);
    for (long i = 0; i < records; i++)
        if (pread(disk, words, BLOCK, record_at(i)) != BLOCK) fail("log", i);
        else if (words[0] && pwrite(disk, zeros, BLOCK, record_at(i)) != BLOCK) fail("log", i);
    for (long i = 0; i < hot_count; i++) {
        make_block(words, hot_block(i), 0);
        if (pwrite(disk, words, BLOCK, hot_block(i) * BLOCK) != BLOCK) fail("write", hot_block(i));
    }
    if (fsync(disk)) fail("fsync", 0);
}

static void check(void)
{
    uint64_t *words, *expected;
    long rewritten = 0;
    if (posix_memalign((void **)&words, BLOCK, MIB) || posix_memalign((void **)&expected, BLOCK, BLOCK)) exit(1);
    char *is_hot = calloc(mib * PER_MIB, 1);
    for (long i = 0; i < hot_count; i++) is_hot[hot_block(i)] = 1;
    for (long at = log_end; at < mib; at++) {
        if (pread(disk, words, MIB, at * MIB) != MIB) { fail("read", at * PER_MIB); continue; }
        for (long k = 0; k < PER_MIB; k++) {
            uint64_t *block = words + k * WORDS, number = at * PER_MIB + k, written = is_hot[number] ? block[1] : 0;
            if (is_filled[at]) make_block(expected, number, written); else memset(expected, 0, BLOCK);
            if (memcmp(block, expected, BLOCK)) is_wrong("block", number, block);
            else rewritten += written > 0;
        }
    }
    check_log(words);
    printf("filled=%ld MiB rewritten=%ld wrong=%ld failed=%ld\n", filled_count, rewritten, wrong, failed);
}

int main(int argc, char **argv)
{
    if (argc < 5 || (mib = atol(argv[3])) < 8 || atoi(argv[4]) < 1) return fprintf(stderr, "see witness.c\n"), 2;
    int runs = !strcmp(argv[1], "run");
    disk = open(argv[2], !strcmp(argv[1], "check") ? O_RDONLY : runs ? O_RDWR | O_DIRECT : O_RDWR | O_CREAT, 0644);
    if (disk < 0) { perror(argv[2]); return 1; }
    lay_out(atoi(argv[4]));
    if (runs && argc > 5) {
        long dirty = argc > 6 ? atol(argv[6]) : 0;
        pthread_t thread;
        if (dirty && pthread_create(&thread, NULL, dirty_memory, &dirty)) return 1;
        run(atoi(argv[5]));
    }
    if (!strcmp(argv[1], "fill")) fill();
    else if (!strcmp(argv[1], "reset")) reset();
    else if (!strcmp(argv[1], "check")) check();
    return wrong || failed;
}

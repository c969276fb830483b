/* Both ends of vbus's shared memory in C, written from spec/shared-memory.md.
 *
 * peer ROLE MEMORY BYTES TO_US TO_THEM COUNT: MEMORY is the descriptor of the region, TO_US and TO_THEM those of the eventfds that carry kicks.
 */
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static _Atomic uint64_t *region;
static size_t region_bytes;
static int to_us, to_them;

#define WORD(offset) (region[(offset) / 8])

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "peer: %s\n", what);
	exit(1);
}

static void kick(void)
{
	uint64_t one = 1;
	if (write(to_them, &one, sizeof one) != sizeof one)
		fail("cannot kick");
}

static void wait_for_kick(void)
{
	struct pollfd fd = { .fd = to_us, .events = POLLIN };
	uint64_t count;
	if (poll(&fd, 1, 60000) != 1)
		fail("no kick came: a wake-up is lost");
	if (read(to_us, &count, sizeof count) != sizeof count)
		fail("cannot wait");
}

/* Signal. The block is at 128 in a ring and in a state page. */
enum end { DRIVER, DEVICE };

static size_t seq_of(enum end end) { return 128 + (end == DRIVER ? 0 : 128); }
/* Where the receiver of that end's posts arms. */
static size_t arm_for(enum end end) { return 128 + (end == DRIVER ? 64 : 192); }

static void post(enum end us, uint32_t *seq, uint32_t n)
{
	uint32_t old = *seq;
	*seq = old + n;
	atomic_store_explicit(&WORD(seq_of(us)), *seq, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst);
	uint64_t arm = atomic_load_explicit(&WORD(arm_for(us)), memory_order_relaxed);
	if ((arm >> 32 & 1) && (uint32_t)((uint32_t)arm - old) < n)
		kick();
}

static uint32_t seen(enum end them)
{
	return (uint32_t)atomic_load_explicit(&WORD(seq_of(them)), memory_order_acquire);
}

/* Sleeps until post number `at` of the other end's is there, or it has missed it. */
static void arm_and_sleep(enum end them, uint32_t at)
{
	atomic_store_explicit(&WORD(arm_for(them)), (uint64_t)1 << 32 | at, memory_order_relaxed);
	atomic_thread_fence(memory_order_seq_cst);
	if ((int32_t)(seen(them) - at) <= 0)
		wait_for_kick();
	atomic_store_explicit(&WORD(arm_for(them)), 0, memory_order_relaxed);
}

/* Ring. */
#define LAP ((uint64_t)1 << 63)
#define RETURNED ((uint64_t)1 << 62)

static uint32_t entries;

static uint64_t lap(uint32_t pos) { return pos & entries ? 0 : LAP; }
static size_t slot(uint32_t pos) { return 384 + (size_t)(pos % entries) * 16; }

static void put(uint32_t pos, uint64_t mark, uint64_t address, uint64_t tag)
{
	atomic_store_explicit(&WORD(slot(pos)), address, memory_order_relaxed);
	atomic_store_explicit(&WORD(slot(pos) + 8), (tag & ~(LAP | RETURNED)) | mark | lap(pos), memory_order_release);
}

static bool get(uint32_t pos, uint64_t mark, uint64_t *address, uint64_t *tag)
{
	*tag = atomic_load_explicit(&WORD(slot(pos) + 8), memory_order_acquire);
	if ((*tag & (LAP | RETURNED)) != (mark | lap(pos)))
		return false;
	*address = atomic_load_explicit(&WORD(slot(pos)), memory_order_relaxed);
	return true;
}

/* Takes COUNT entries, and returns each with its address inverted and its length one more. */
static void device(uint32_t count)
{
	if (WORD(0) != 0x0001697273756276)
		fail("not a ring");
	entries = (uint32_t)WORD(8);
	bool counted = WORD(16) == 0;
	uint32_t taken = (uint32_t)WORD(24), given = taken, posted = taken, done = 0;
	while (done != count) {
		uint64_t address, tag;
		while (get(taken, 0, &address, &tag)) {
			if (taken - given == entries)
				fail("more entries than fit");
			taken++, done++;
			if (address != done)
				fail("an entry is out of order");
			if (!counted)
				put(given, RETURNED, ~address, tag + 1);
			given++;
		}
		if (given != posted)
			post(DEVICE, &posted, given - posted);
		else
			arm_and_sleep(DRIVER, taken);
	}
}

/* Makes a ring of 8 entries, sends COUNT of them, and checks what comes back. */
static void driver(uint32_t count)
{
	const uint32_t start = 0u - 5;
	entries = 8;
	for (uint32_t i = 0; i < entries; i++) {
		put(start + i, 0, 0, 0);
		atomic_store(&WORD(slot(start + i) + 8), RETURNED | lap(start + i - entries));
	}
	for (size_t at = 128; at < 384; at += 8)
		WORD(at) = 0;
	WORD(seq_of(DRIVER)) = WORD(seq_of(DEVICE)) = start;
	WORD(8) = entries;
	WORD(16) = 1;
	WORD(24) = start;
	atomic_store(&WORD(0), 0x0001697273756276);
	kick(); /* It can be attached to. */

	uint32_t submitted = start, reaped = start, posted = start, done = 0;
	while (done != count) {
		uint64_t address, tag;
		while (submitted - reaped < entries && submitted - start < count) {
			uint32_t number = submitted - start + 1;
			put(submitted, 0, number, number | (uint64_t)7 << 32 | (uint64_t)1 << 48);
			submitted++;
		}
		if (submitted != posted)
			post(DRIVER, &posted, submitted - posted);
		bool any = false;
		while (get(reaped, RETURNED, &address, &tag)) {
			if (submitted == reaped)
				fail("more returns than entries");
			reaped++, done++, any = true;
			if (address != ~(uint64_t)done || (uint32_t)tag != done + 1 || (uint16_t)(tag >> 32) != 7)
				fail("a return is wrong");
		}
		if (!any)
			arm_and_sleep(DEVICE, reaped);
	}
}

/* State page: values of `bytes` bytes, all alike, the low byte of a counter, which itself is in the first four. */
static uint32_t value_bytes, slots;

static size_t value_at(uint32_t version)
{
	return 384 + (size_t)((value_bytes + 63) / 64 * 64) * (version % slots);
}

static void attach_page(void)
{
	if (WORD(0) != 0x0001747373756276)
		fail("not a state page");
	value_bytes = (uint32_t)WORD(8);
	slots = (uint32_t)WORD(16);
	if (value_bytes % 8 || value_bytes > 4096 || value_at(slots - 1) + value_bytes > region_bytes)
		fail("not the page that was to be expected");
}

/* Reads until it has seen the value with the counter COUNT. */
static void reader(uint32_t count)
{
	attach_page();
	uint64_t copy[512];
	/* The last value may be there already. */
	uint32_t known = seen(DRIVER) - 1, counter = 0;
	while (counter != count) {
		uint32_t version, tries = 0;
		while ((version = seen(DRIVER)) == known)
			arm_and_sleep(DRIVER, known);
		do {
			if (++tries > 1000000)
				fail("no whole value");
			version = seen(DRIVER);
			for (uint32_t i = 0; i < value_bytes / 8; i++)
				copy[i] = atomic_load_explicit(&WORD(value_at(version) + i * 8), memory_order_relaxed);
			atomic_thread_fence(memory_order_acquire);
		} while ((uint32_t)(seen(DRIVER) - version) >= slots - 1);
		unsigned char *bytes = (unsigned char *)copy;
		uint32_t read;
		memcpy(&read, bytes, 4);
		for (uint32_t i = 4; i < value_bytes; i++)
			if (bytes[i] != (unsigned char)read)
				fail("a torn value");
		if ((int32_t)(read - counter) < 0 || (int32_t)(version - known) <= 0)
			fail("an old value");
		counter = read;
		known = version;
	}
}

/* Writes the values 1..COUNT. */
static void writer(uint32_t count)
{
	attach_page();
	uint64_t value[512];
	uint32_t version = (uint32_t)WORD(seq_of(DEVICE));
	for (uint32_t counter = 1; counter <= count; counter++) {
		memset(value, (int)(counter & 0xff), sizeof value);
		memcpy(value, &counter, 4);
		for (uint32_t i = 0; i < value_bytes / 8; i++)
			atomic_store_explicit(&WORD(value_at(version + 1) + i * 8), value[i], memory_order_relaxed);
		post(DEVICE, &version, 1);
	}
}

int main(int argc, char **argv)
{
	if (argc != 7)
		fail("wrong arguments");
	region_bytes = (size_t)atol(argv[3]);
	region = mmap(NULL, region_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[2]), 0);
	if (region == MAP_FAILED)
		fail(strerror(errno));
	to_us = atoi(argv[4]);
	to_them = atoi(argv[5]);
	uint32_t count = (uint32_t)atol(argv[6]);
	if (!strcmp(argv[1], "device"))
		device(count);
	else if (!strcmp(argv[1], "driver"))
		driver(count);
	else if (!strcmp(argv[1], "reader"))
		reader(count);
	else if (!strcmp(argv[1], "writer"))
		writer(count);
	else
		fail("no such role");
	return 0;
}

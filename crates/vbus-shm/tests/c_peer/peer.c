/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Both ends of vbus's shared memory in C, written from spec/shared-memory.md and spec/pic.md.
 *
 * peer ROLE MEMORY BYTES TO_US TO_THEM COUNT
 *
 * MEMORY is the descriptor of the region. TO_US and TO_THEM are the descriptors of the eventfds
 * that carry kicks.
 */
#include <errno.h>
#include <poll.h>
#include <sched.h>
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

static uint64_t load(size_t offset)
{
	return atomic_load_explicit(&WORD(offset), memory_order_relaxed);
}

static uint64_t load_acquire(size_t offset)
{
	return atomic_load_explicit(&WORD(offset), memory_order_acquire);
}

static void store(size_t offset, uint64_t value)
{
	atomic_store_explicit(&WORD(offset), value, memory_order_relaxed);
}

static void store_release(size_t offset, uint64_t value)
{
	atomic_store_explicit(&WORD(offset), value, memory_order_release);
}

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

#define ENABLED ((uint64_t)1 << 63)

/* a - b, of positions: modulo 2^63, with a sign. */
static int64_t difference(uint64_t a, uint64_t b) { return (int64_t)((a - b) << 1) / 2; }

static void post(enum end us, uint64_t *seq, uint32_t n)
{
	uint64_t old = *seq;
	*seq = old + n;
	store_release(seq_of(us), *seq);
	atomic_thread_fence(memory_order_seq_cst);
	uint64_t arm = load(arm_for(us));
	if ((arm & ENABLED) && ((arm - old) & ~ENABLED) < n)
		kick();
}

static uint64_t seen(enum end them)
{
	return load_acquire(seq_of(them));
}

/* Arms at post number `at` of the other end. Sleeps until its kick, unless the post is there. */
static void arm_and_sleep(enum end them, uint64_t at)
{
	store(arm_for(them), ENABLED | at);
	atomic_thread_fence(memory_order_seq_cst);
	if (difference(seen(them), at) <= 0)
		wait_for_kick();
	store(arm_for(them), 0);
}

/* Ring. */
#define LAP ((uint64_t)1 << 63)
#define RETURNED ((uint64_t)1 << 62)

enum returns { COUNTED, ENTRIES, RUNS };

#define NEXT ((uint64_t)1 << 48)
#define RUN ((uint64_t)1 << 61)

static uint32_t entries;

static uint64_t lap(uint64_t pos) { return pos & entries ? 0 : LAP; }
static size_t slot(uint64_t pos) { return 384 + (size_t)(pos % entries) * 16; }

static void put_tag(uint64_t pos, uint64_t mark, uint64_t tag, memory_order order)
{
	tag = (tag & ~(LAP | RETURNED)) | mark | lap(pos);
	atomic_store_explicit(&WORD(slot(pos) + 8), tag, order);
}

static bool get_tag(uint64_t pos, uint64_t mark, uint64_t *tag)
{
	*tag = load_acquire(slot(pos) + 8);
	return (*tag & (LAP | RETURNED)) == (mark | lap(pos));
}

/* The length of the return at `pos`, where returns are runs: two lengths share a word. */
static size_t length(uint64_t pos)
{
	return 384 + (size_t)entries * 16 + (size_t)(pos % entries / 2) * 8;
}

static unsigned length_shift(uint64_t pos) { return pos % 2 * 32; }

static void put_length(uint64_t pos, uint32_t value)
{
	uint64_t word = load(length(pos)) & ~((uint64_t)UINT32_MAX << length_shift(pos));
	store(length(pos), word | (uint64_t)value << length_shift(pos));
}

static uint32_t get_length(uint64_t pos)
{
	return (uint32_t)(load(length(pos)) >> length_shift(pos));
}

/* Whether the return of position `pos`, which was submitted, was published. */
static bool is_published(uint64_t pos)
{
	uint64_t tag = load(slot(pos) + 8);
	bool ours = (tag & LAP) == lap(pos), returned = tag & RETURNED;
	return ours == returned; /* Returned, or submitted over. */
}

/* The position up to which the device before this one published returns. It is at most a ring
 * ahead of `seq`. The marks of the slots tell. */
static uint64_t published(uint64_t seq)
{
	uint64_t given = seq;
	while (given - seq < entries && is_published(given))
		given++;
	return given;
}

/* The device's word "returning", of counted returns and of runs. */
static size_t returning_count(void) { return 264; }

/* In "returning", where returns are runs: the next tag returns one entry, the last one. */
#define SINGLE ((uint64_t)1 << 63)

/* The position up to which the device before this one published counted returns or runs. */
static uint64_t published_count(enum returns returns, uint64_t seq)
{
	uint64_t word = load(returning_count());
	uint64_t n = (word - seq) & ~SINGLE;
	if (n - 1 >= entries)
		return seq; /* `seq` is the last post, or the words are made up. */
	uint64_t last = returns == RUNS && word & SINGLE ? seq + n - 1 : seq;
	return is_published(last) ? seq + n : last;
}

/* Takes the place of a device that ended: stores `given` as our `seq` once more, and makes up for
 * a kick that may be lost. Returns the new `seq`. */
static uint64_t resume_posts(uint64_t given)
{
	store_release(seq_of(DEVICE), given);
	atomic_thread_fence(memory_order_seq_cst);
	uint64_t arm = load(arm_for(DEVICE));
	if ((arm & ENABLED) && difference(arm, given) < 0)
		kick();
	return given;
}

/* Publishes the returns from `first` to `given` by one tag. If it dies, then before that tag. */
static void publish_run(enum returns returns, uint64_t first, uint64_t given, bool dies)
{
	if (returns == RUNS && given - first == 1) {
		uint32_t only = get_length(first);
		uint64_t tag = (only & INT32_MAX) | (only >> 31) * NEXT;
		store_release(returning_count(), given | SINGLE);
		if (!dies)
			put_tag(first, RETURNED, tag, memory_order_release);
		return;
	}
	/* A run begins at `seq`. */
	if (load(seq_of(DEVICE)) != first)
		store_release(seq_of(DEVICE), first);
	store_release(returning_count(), given & ~SINGLE);
	if (!dies)
		put_tag(first, RETURNED, (given - first) | (returns == RUNS ? RUN : 0),
			memory_order_release);
}

/* Takes COUNT entries and returns each, up to five at a time. The length of a return is that of the
 * entry plus one. A device that `dies` loses its own state every third turn, as if it had been
 * killed. It resumes the ring then, and takes some of the entries again. */
static void device(uint32_t count, bool dies)
{
	if (WORD(0) != 0x0001697273756276)
		fail("not a ring");
	entries = (uint32_t)WORD(8);
	enum returns returns = (enum returns)WORD(16);
	uint64_t start = WORD(24), taken = start, given = start, posted = start;
	for (uint32_t turn = 1; posted - start != count; turn++) {
		uint64_t tag;
		/* Where the run begins that is not published. Runs are mixed with single returns: the
		 * first two of each other turn. */
		uint64_t first = given;
		/* At most five, so never a ring ahead of the last post. */
		for (uint32_t n = 0; n < 5 && get_tag(taken, 0, &tag); n++) {
			if (taken - given == entries)
				fail("more entries than fit");
			taken++;
			uint64_t address = load(slot(taken - 1));
			if (address != taken - start)
				fail("an entry is out of order");
			if (returns == ENTRIES)
				put_tag(given, RETURNED, tag + 1, memory_order_release);
			if (returns == RUNS)
				put_length(given, ((uint32_t)(tag + 1) & INT32_MAX) | (tag >> 48) << 31);
			given++;
			if (returns == RUNS && turn % 2 && n < 2)
				publish_run(RUNS, first++, given, false);
		}
		/* Every other time that it dies it has stored the tag of its returns. */
		bool die = dies && turn % 3 == 0;
		if (returns != ENTRIES && given != first)
			publish_run(returns, first, given, die && turn % 4 < 2);
		if (die) {
			posted = load(seq_of(DEVICE));
			given = taken = returns == ENTRIES ? published(posted)
							   : published_count(returns, posted);
			posted = resume_posts(given);
			continue;
		}
		if (given != posted)
			post(DEVICE, &posted, (uint32_t)(given - posted));
		else
			arm_and_sleep(DRIVER, taken);
	}
}

/* Ledger, behind the ring. */
#define HELD ((uint64_t)1 << 63)
#define LOW_47 (((uint64_t)1 << 47) - 1)

static size_t ledger(void) { return 384 + (size_t)entries * 16; }
static size_t returning(void) { return ledger() + 64; }
static size_t record(uint32_t id) { return ledger() + 128 + (size_t)id * 32; }

static bool is_held(uint32_t id)
{
	return load(record(id)) & HELD;
}

/* Resumes the ledger of a ring that was resumed at `given`. Returns how many entries are held. */
static uint32_t resume_ledger(uint64_t given)
{
	uint64_t word = load(returning());
	uint64_t behind = (given - (word >> 16)) & LOW_47;
	/* It is before `given` if the difference of 47 bits is above 0, as a number with a sign. */
	if ((word & HELD) && behind != 0 && behind >> 46 == 0)
		store(record(word & 0xffff), 0);
	store(returning(), 0);
	uint32_t held = 0;
	for (uint32_t id = 0; id < entries; id++)
		held += is_held(id);
	return held;
}

/* Gives back the entry of `id`. Ends as if killed before step number `steps` of the four. */
static void give_back_by_ledger(uint32_t id, uint64_t *given, int steps)
{
	uint64_t tag = load(record(id));
	if (steps > 0)
		store_release(returning(), HELD | (*given & LOW_47) << 16 | id);
	if (steps > 1)
		put_tag((*given)++, RETURNED, tag + 1, memory_order_release);
	if (steps > 2)
		store(record(id), 0);
	if (steps > 3)
		store_release(returning(), 0);
}

/* Returns COUNT entries out of their order, with a ledger. Every third turn it ends before one of
 * the steps of a return, as if it had been killed. It resumes ring and ledger from memory alone. */
static void ledger_device(uint32_t count)
{
	entries = (uint32_t)WORD(8);
	if (WORD(0) != 0x0001697273756276 || WORD(16) != ENTRIES)
		fail("not a ring with returned entries");
	if (WORD(ledger()) != 0x0001676c73756276 || WORD(ledger() + 8) != entries)
		fail("not the ledger of the ring");
	uint64_t start = WORD(24), taken = start, given = start, posted = start, tag;
	for (uint32_t turn = 1; posted - start != count; turn++) {
		while (get_tag(taken, 0, &tag)) {
			uint32_t id = (uint16_t)(tag >> 32);
			if (taken - given == entries || id >= entries || is_held(id))
				fail("a wrong entry");
			uint64_t address = load(slot(taken));
			store(record(id) + 8, address);
			store(record(id) + 16, taken);
			store_release(record(id), tag | HELD);
			taken++;
		}
		/* Half of the entries, from an id that moves on. The others stay in work. */
		uint32_t left = (uint32_t)(taken - given + 1) / 2;
		bool die = turn % 3 == 0;
		for (uint32_t i = 0; i < entries && left; i++) {
			uint32_t id = (turn * 5 + i) % entries;
			if (!is_held(id))
				continue;
			uint64_t position = load(record(id) + 16);
			uint64_t address = load(record(id) + 8);
			if (address != position - start + 1)
				fail("the record of another entry");
			left--;
			give_back_by_ledger(id, &given, die && !left ? (int)(turn / 3 % 4) : 4);
		}
		if (die) {
			posted = load(seq_of(DEVICE));
			given = published(posted);
			store(arm_for(DRIVER), 0);
			posted = resume_posts(given);
			taken = given + resume_ledger(given);
		} else if (given != posted) {
			post(DEVICE, &posted, (uint32_t)(given - posted));
		} else {
			arm_and_sleep(DRIVER, taken);
		}
	}
}

/* Makes a ring of 8 entries, and a ledger behind it unless returns are runs. Sends COUNT entries and
 * checks what comes back. Each batch is written from its last entry to its first. */
static void driver(uint32_t count, enum returns returns)
{
	const uint64_t start = ((uint64_t)1 << 63) - 5;
	entries = 8;
	for (uint64_t pos = start; pos != start + entries; pos++) {
		atomic_store(&WORD(slot(pos)), 0);
		atomic_store(&WORD(slot(pos) + 8), RETURNED | lap(pos - entries));
	}
	for (size_t at = 64; at < 384; at += 8)
		WORD(at) = 0;
	WORD(seq_of(DRIVER)) = WORD(seq_of(DEVICE)) = start;
	if (returns != ENTRIES)
		WORD(returning_count()) = start;
	WORD(8) = entries;
	WORD(16) = returns;
	WORD(24) = start;
	if (returns == ENTRIES) {
		WORD(ledger()) = 0x0001676c73756276;
		WORD(ledger() + 8) = entries;
	}
	atomic_store(&WORD(0), 0x0001697273756276);
	kick(); /* It can be attached to. */

	uint64_t submitted = start, reaped = start, posted = start;
	while (reaped - start != count) {
		uint64_t tag;
		while (submitted - reaped < entries && submitted - start < count)
			submitted++;
		for (uint64_t pos = submitted; pos != posted;) {
			uint32_t number = (uint32_t)(--pos - start + 1);
			store(slot(pos), number);
			/* The oldest tag of the batch, written last, covers the others. */
			put_tag(pos, 0, number | pos % entries << 32 | (uint64_t)1 << 48,
				pos == posted ? memory_order_release : memory_order_relaxed);
		}
		if (submitted != posted)
			post(DRIVER, &posted, (uint32_t)(submitted - posted));
		bool any = false;
		while (get_tag(reaped, RETURNED, &tag)) {
			bool run = returns == RUNS && tag & RUN;
			uint32_t n = run ? (uint32_t)tag : 1;
			if (n == 0 || n > submitted - reaped)
				fail("more returns than entries");
			for (; n; n--, reaped++, any = true) {
				uint32_t number = (uint32_t)(reaped - start + 1);
				uint32_t id = returns == RUNS ? 0 : (uint32_t)(reaped % entries);
				uint32_t length = run ? get_length(reaped) : (uint32_t)tag;
				bool next = run ? length >> 31 : tag & NEXT;
				length &= INT32_MAX;
				if (length != number + 1 || !next || (!run && (uint16_t)(tag >> 32) != id))
					fail("a return is wrong");
			}
		}
		if (!any)
			arm_and_sleep(DEVICE, reaped);
	}
}

/* State page. The first four bytes of a value are a counter. Each other byte is the counter's low
 * byte. */
static uint32_t value_bytes, slots;

static size_t value_at(uint64_t version)
{
	return 384 + (size_t)((value_bytes + 63) / 64 * 64) * (size_t)(version % slots);
}

static void attach_page(void)
{
	if (WORD(0) != 0x0001747373756276)
		fail("not a state page");
	value_bytes = (uint32_t)WORD(8);
	slots = (uint32_t)WORD(16);
	if (value_bytes % 8 || value_bytes > 4096 ||
	    value_at(slots - 1) + value_bytes > region_bytes)
		fail("not the state page of the test");
}

/* Reads until it has seen the value with the counter COUNT. */
static void reader(uint32_t count)
{
	attach_page();
	uint64_t copy[512];
	/* The last value may be there already. */
	uint64_t known = seen(DRIVER) - 1;
	uint32_t counter = 0;
	while (counter != count) {
		uint64_t version;
		uint32_t tries = 0;
		while ((version = seen(DRIVER)) == known)
			arm_and_sleep(DRIVER, known);
		do {
			if (++tries > 1000000)
				fail("no whole value");
			version = seen(DRIVER);
			for (uint32_t i = 0; i < value_bytes / 8; i++)
				copy[i] = load(value_at(version) + i * 8);
			atomic_thread_fence(memory_order_acquire);
		} while (seen(DRIVER) - version >= slots - 1);
		unsigned char *bytes = (unsigned char *)copy;
		uint32_t read;
		memcpy(&read, bytes, 4);
		for (uint32_t i = 4; i < value_bytes; i++)
			if (bytes[i] != (unsigned char)read)
				fail("a torn value");
		if ((int32_t)(read - counter) < 0 || (int64_t)(version - known) <= 0)
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
	uint64_t version = WORD(seq_of(DEVICE));
	for (uint32_t counter = 1; counter <= count; counter++) {
		memset(value, (int)(counter & 0xff), sizeof value);
		memcpy(value, &counter, 4);
		for (uint32_t i = 0; i < value_bytes / 8; i++)
			store(value_at(version + 1) + i * 8, value[i]);
		post(DEVICE, &version, 1);
	}
}

/* Interrupt page, at 0. The raiser of line l writes a counter to 4096 + 8l. The handler of the line
 * copies it to 8192 + 8l. The raiser raises three lines at a time. */
#define LINES 100

static _Atomic uint64_t told = UINT64_MAX;

static uint32_t line_of(uint32_t counter) { return counter * 7 % LINES; }

static void raise_line(uint32_t line)
{
	uint64_t bit = (uint64_t)1 << line % 64;
	if (atomic_fetch_or_explicit(&WORD(192 + line / 64 * 8), bit, memory_order_release) & bit)
		return;
	atomic_thread_fence(memory_order_seq_cst);
	uint64_t level = load(64);
	if (line < (level & 0x1ff))
		return;
	if (load(96 + line / 64 * 8) & bit)
		return;
	if (atomic_exchange_explicit(&told, level >> 9, memory_order_relaxed) != level >> 9)
		kick();
}

/* Raises COUNT lines. */
static void raiser(uint32_t count)
{
	if (WORD(0) != 0x0001637073756276 || WORD(8) != LINES)
		fail("not an interrupt page");
	for (uint32_t counter = 1; counter <= count; counter++) {
		uint32_t line = line_of(counter);
		store(4096 + line * 8, counter);
		raise_line(line);
		if (counter % 3 && counter != count)
			continue;
		for (uint32_t back = counter; back > 0 && back + 3 > counter; back--)
			while (load_acquire(8192 + line_of(back) * 8) < back)
				sched_yield();
	}
}

static uint64_t generation;
static uint64_t in_service[4];

static int scan(int from)
{
	for (int line = LINES - 1; line >= from; line--)
		if (load(192 + line / 64 * 8) >> line % 64 & 1)
			return line;
	return -1;
}

static void publish(uint64_t level)
{
	store(64, ++generation << 9 | level);
	atomic_thread_fence(memory_order_seq_cst);
}

/* Takes a line, with nested handlers. No line is in service when this is called, so any line may be
 * taken. */
static int take(void)
{
	int line = scan(0), higher;
	if (line < 0) {
		publish(0);
		line = scan(0);
		if (line < 0)
			return -1;
	}
	for (;;) {
		publish((uint64_t)line + 1);
		higher = scan(line + 1);
		if (higher < 0)
			break;
		line = higher;
	}
	atomic_fetch_and_explicit(&WORD(192 + line / 64 * 8), ~((uint64_t)1 << line % 64),
				  memory_order_acquire);
	in_service[line / 64] |= (uint64_t)1 << line % 64;
	store(128 + line / 64 * 8, in_service[line / 64]);
	return line;
}

static void end(int line)
{
	in_service[line / 64] &= ~((uint64_t)1 << line % 64);
	store(128 + line / 64 * 8, in_service[line / 64]);
}

/* Takes lines until it has seen the counter COUNT. */
static void taker(uint32_t count)
{
	WORD(8) = LINES;
	WORD(64) = LINES;
	WORD(0) = 0x0001637073756276;
	publish(0);
	kick();
	for (uint32_t last = 0; last < count;) {
		int line;
		wait_for_kick();
		while ((line = take()) >= 0) {
			uint64_t about = load(4096 + line * 8);
			if (about == 0 || (int)line_of((uint32_t)about) != line)
				fail("a line came before its data");
			last = about > last ? (uint32_t)about : last;
			end(line);
			store_release(8192 + line * 8, about);
		}
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
		device(count, false);
	else if (!strcmp(argv[1], "mortal_device"))
		device(count, true);
	else if (!strcmp(argv[1], "ledger_device"))
		ledger_device(count);
	else if (!strcmp(argv[1], "driver"))
		driver(count, ENTRIES);
	else if (!strcmp(argv[1], "driver_of_runs"))
		driver(count, RUNS);
	else if (!strcmp(argv[1], "reader"))
		reader(count);
	else if (!strcmp(argv[1], "writer"))
		writer(count);
	else if (!strcmp(argv[1], "raiser"))
		raiser(count);
	else if (!strcmp(argv[1], "taker"))
		taker(count);
	else
		fail("no such role");
	return 0;
}

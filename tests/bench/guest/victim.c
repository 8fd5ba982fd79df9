// SPDX-License-Identifier: GPL-2.0-only
/*
 * victim write|large FILE POS COUNTERS - dirty a page of a file, then read it over and over and count what comes.
 * victim storm FILE PAGES COUNTERS     - dirty the first PAGES pages of a file, and wait.
 * victim wander FILE PAGES COUNTERS    - change nothing; read the first PAGES pages of a file over and over.
 * victim follow FILE - COUNTERS        - change nothing; every 10 ms read the page that the counters name.
 *
 * FILE is full of 'A' in the backing store, what is written is 'B': a read of 'A' is stale. "large" overwrites 8 KiB of
 * a folio that readahead has built. The unit is made of three processes, two that read and one that does not.
 *
 * The counters lie in shared memory, so that they outlive the processes. Whoever reports the error sets the phase, and
 * before that they read at leisure: what has to be done first should not have to fight for a processor.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define MORE_PROCESSES 2

enum phase { BEFORE, STRUCK, HANDLED, PHASES };

/* Read and written by tests/bench/guest/units.py. */
static struct counters {
	_Atomic unsigned long phase;
	_Atomic unsigned long pos;		/* where to read, for "follow" */
	_Atomic unsigned long ready;		/* the pages are dirty */
	_Atomic unsigned long fresh[PHASES];	/* reads of what was written, begun in that phase */
	_Atomic unsigned long stale;		/* reads of what was there before */
	_Atomic unsigned long failed;
	_Atomic unsigned long last_stale;	/* CLOCK_MONOTONIC, ns */
} *counters;

static char page[2 * PAGE] __attribute__((aligned(PAGE)));
static int fd;

static unsigned long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ul + time.tv_nsec;
}

static void count_read(off_t pos)
{
	unsigned long phase = counters->phase;

	if (pread(fd, page, PAGE, pos) != PAGE) {
		counters->failed++;
	} else if (page[0] == 'B') {
		counters->fresh[phase]++;
	} else {
		/* In this order: it may be killed between the two. */
		counters->last_stale = now();
		counters->stale++;
	}
}

static void overwrite(off_t pos, size_t size)
{
	memset(page, 'B', size);
	if (pwrite(fd, page, size, pos) != (ssize_t)size)
		err(1, "pwrite");
}

int main(int argc, char **argv)
{
	const char *how = argc == 5 ? argv[1] : "";
	off_t where = argc == 5 ? atoll(argv[3]) : 0;
	int shared, process = 0;

	if (argc != 5)
		errx(2, "usage: victim write|large|storm|wander|follow FILE POS|PAGES COUNTERS");
	fd = open(argv[2], O_RDWR);
	if (fd < 0)
		err(1, "%s", argv[2]);
	shared = open(argv[4], O_RDWR);
	if (shared < 0)
		err(1, "%s", argv[4]);
	counters = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
	if (counters == MAP_FAILED)
		err(1, "mmap");

	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
	if (!strcmp(how, "write")) {
		overwrite(where, PAGE);
	} else if (!strcmp(how, "large")) {
		posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
		while (read(fd, page, PAGE) > 0)
			;
		overwrite(where, 2 * PAGE);
	} else if (!strcmp(how, "storm")) {
		for (off_t number = 0; number < where; number++)
			overwrite(number * PAGE, PAGE);
	}

	while (process < MORE_PROCESSES && !fork())
		process++;
	/* Each process forks the next one; the last one says that all are there, and does nothing. */
	if (process == MORE_PROCESSES)
		counters->ready = 1;
	if (process == MORE_PROCESSES || !strcmp(how, "storm"))
		for (;;)
			pause();

	for (off_t number = 0;; number++) {
		if (!strcmp(how, "follow")) {
			count_read(counters->pos);
			usleep(10000);
		} else if (!strcmp(how, "wander")) {
			count_read(number % where * PAGE);
			usleep(100);
		} else {
			count_read(where);
			if (counters->phase == BEFORE)
				usleep(2000);
		}
	}
}

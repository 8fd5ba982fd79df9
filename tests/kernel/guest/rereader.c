// SPDX-License-Identifier: GPL-2.0-only
/*
 * rereader FILE POS COUNTERS READERS - dirty a page of a file, then read it over and over and count what comes.
 *
 * FILE is full of 'A' in the backing store; the page at POS is overwritten with 'B'. A stale read is one of 'A'. Each
 * reader has a watcher, a thread that polls the reader's buffer while the read is still in the kernel. The counters live
 * in a file in shared memory, so that they outlive the process: fresh, stale, watched (stale ones seen by a watcher).
 */
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

static struct counters {
	atomic_ulong fresh, stale, watched;
} *counters;
static int fd;
static off_t pos;

static void *reader(void *buffer)
{
	volatile char *byte = buffer;

	for (;;) {
		if (pread(fd, buffer, PAGE, pos) != PAGE)
			continue;
		if (*byte == 'A')
			counters->stale++;
		else
			counters->fresh++;
	}
	return NULL;
}

static void *watcher(void *buffer)
{
	volatile char *byte = buffer;

	for (;;)
		if (*byte == 'A')
			counters->watched++;
	return NULL;
}

static void start(void *(*body)(void *), void *argument)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, body, argument))
		errx(1, "pthread_create");
}

int main(int argc, char **argv)
{
	char page[PAGE];
	int shared, number;

	if (argc != 5)
		errx(2, "usage: rereader FILE POS COUNTERS READERS");
	fd = open(argv[1], O_RDWR);
	if (fd < 0)
		err(1, "%s", argv[1]);
	pos = atoll(argv[2]);
	shared = open(argv[3], O_RDWR | O_CREAT, 0600);
	if (shared < 0 || ftruncate(shared, PAGE))
		err(1, "%s", argv[3]);
	counters = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
	if (counters == MAP_FAILED)
		err(1, "mmap");

	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
	memset(page, 'B', PAGE);
	if (pwrite(fd, page, PAGE, pos) != PAGE)
		err(1, "pwrite");

	for (number = atoi(argv[4]); number > 0; number--) {
		char *buffer = aligned_alloc(PAGE, PAGE);

		memset(buffer, 'B', PAGE);
		start(reader, buffer);
		start(watcher, buffer);
	}
	pause();
	return 0;
}

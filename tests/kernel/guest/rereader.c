// SPDX-License-Identifier: GPL-2.0-only
/*
 * rereader FILE POS COUNTERS - dirty a page of a file, then read it over and over and count what comes.
 *
 * FILE is full of 'A' in the backing store; the page at POS is overwritten with 'B'. A stale read is one of 'A'. Four
 * threads and four processes read: two of each by read(2), and two by mapping the page anew each time, for what was
 * mapped before is SIGBUS afterwards. Each of those that use read(2) has a watcher, a thread that polls its buffer while
 * the read is still in the kernel. The counters live in a file in shared memory, so that they outlive the processes:
 * fresh, stale by read(2), stale by mmap, stale as seen by a watcher; then fresh ones of each of the eight readers.
 */
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define READERS 8

static struct counters {
	atomic_ulong fresh, read, mapped, watched;
	atomic_ulong each[READERS];
} *counters;
static int fd;
static off_t pos;
static _Thread_local sigjmp_buf out;

static void on_sigbus(int number)
{
	(void)number;
	siglongjmp(out, 1);
}

static void count(char byte, long number, atomic_ulong *stale)
{
	if (byte == 'A') {
		(*stale)++;
	} else {
		counters->fresh++;
		counters->each[number]++;
	}
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

static void *read_it(void *number)
{
	char *buffer = aligned_alloc(PAGE, PAGE);

	memset(buffer, 'B', PAGE);
	start(watcher, buffer);
	for (;;)
		if (pread(fd, buffer, PAGE, pos) == PAGE)
			count(*(volatile char *)buffer, (intptr_t)number, &counters->read);
	return NULL;
}

static void *map_it(void *number)
{
	volatile char *map;

	for (;;) {
		map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, pos);
		if (map == MAP_FAILED)
			err(1, "mmap");
		if (!sigsetjmp(out, 1))
			count(*map, (intptr_t)number, &counters->mapped);
		munmap((void *)map, PAGE);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	char page[PAGE];
	intptr_t number;
	int shared;

	if (argc != 4)
		errx(2, "usage: rereader FILE POS COUNTERS");
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
	signal(SIGBUS, on_sigbus);

	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
	memset(page, 'B', PAGE);
	if (pwrite(fd, page, PAGE, pos) != PAGE)
		err(1, "pwrite");

	for (number = 0; number < READERS / 2; number++) {
		pid_t pid = fork();

		if (pid < 0)
			err(1, "fork");
		if (pid == 0)
			(number % 2 ? map_it : read_it)((void *)number);
	}
	for (; number < READERS; number++)
		start(number % 2 ? map_it : read_it, (void *)number);
	pause();
	return 0;
}

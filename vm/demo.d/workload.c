// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * workload FILE RECORD: saves known bytes, changes one page without saving it, and reads that page over and
 * over, counting what it sees in RECORD. SIGUSR1: fsync the file twice and record the answers.
 *
 * RECORD is mapped shared and lies on a tmpfs: what was counted stays readable after death by SIGKILL.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 8
#define CHANGED 3 /* index of the page that is changed, then lost */
#define NOT_CALLED UINT64_MAX

/* Read by vm/demo.d/observe.py. */
struct record {
	volatile uint64_t fresh;	/* reads that returned the changed bytes */
	volatile uint64_t stale;	/* reads that returned the saved bytes: those that fsync'd before the change */
	volatile uint64_t failed;	/* reads that returned neither */
	volatile uint64_t fsync[2];	/* errno of two fsync(2) calls after the loss */
};

static const char saved[16] = "saved bytes....";
static const char changed[16] = "changed bytes..";
static volatile sig_atomic_t asked;

static void ask(int signal)
{
	(void)signal;
	asked = 1;
}

static void fill(int fd, int page, const char *text)
{
	char bytes[PAGE];

	for (int i = 0; i < PAGE; i += 16)
		memcpy(bytes + i, text, 16);
	if (pwrite(fd, bytes, PAGE, (off_t)page * PAGE) != PAGE)
		err(1, "write");
}

static struct record *map_record(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	struct record *record;

	if (fd < 0 || ftruncate(fd, PAGE) < 0)
		err(1, "%s", path);
	record = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (record == MAP_FAILED)
		err(1, "%s", path);
	record->fsync[0] = record->fsync[1] = NOT_CALLED;
	return record;
}

int main(int argc, char **argv)
{
	struct record *record;
	char bytes[16];
	int fd;

	if (argc != 3)
		errx(2, "usage: workload FILE RECORD");
	record = map_record(argv[2]);
	fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0)
		err(1, "%s", argv[1]);
	for (int page = 0; page < PAGES; page++)
		fill(fd, page, saved);
	if (fsync(fd) < 0)
		err(1, "fsync");
	fill(fd, CHANGED, changed);
	signal(SIGUSR1, ask);

	for (;;) {
		ssize_t length = pread(fd, bytes, sizeof(bytes), (off_t)CHANGED * PAGE);

		if (length == sizeof(bytes) && !memcmp(bytes, changed, sizeof(bytes)))
			record->fresh++;
		else if (length == sizeof(bytes) && !memcmp(bytes, saved, sizeof(bytes)))
			record->stale++;
		else
			record->failed++;
		for (int i = 0; asked && i < 2; i++)
			record->fsync[i] = fsync(fd) < 0 ? errno : 0;
		asked = 0;
	}
}

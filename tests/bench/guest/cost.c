// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * cost ROUNDS - what some operations cost, in nanoseconds of CLOCK_MONOTONIC; to be booted as init, alone.
 *
 * Meant for QEMU's -icount, where this clock counts instructions. The cheapest round of an operation is the one that
 * nothing else came between. Prints a line each: the operation's name, and the cost of one in the cheapest round. Ends
 * the machine.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 32 /* few enough for rounds that no timer interrupts */

#define CGROUPS "/sys/fs/cgroup"
#define PLAIN CGROUPS "/plain"
#define MEMORY CGROUPS "/memory" /* has the memory controller on for its children */
#define OWN CGROUPS "/cost"

static char page[PAGE];
static int fd, pagemap, inject, drop_caches;

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* Pages that are new in the page cache, and so are charged. */
static int64_t write_pages(void)
{
	int64_t start;
	int number;

	if (ftruncate(fd, 0))
		err(1, "ftruncate");
	start = now();
	for (number = 0; number < PAGES; number++)
		if (pwrite(fd, page, PAGE, (off_t)number * PAGE) != PAGE)
			err(1, "pwrite");
	return (now() - start) / PAGES;
}

static int64_t fault_pages(void)
{
	int64_t start = now();
	int number;
	char *map = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (map == MAP_FAILED)
		err(1, "mmap");
	for (number = 0; number < PAGES; number++)
		map[number * PAGE] = 1;
	munmap(map, PAGES * PAGE);
	return (now() - start) / PAGES;
}

static int64_t fork_and_exit(void)
{
	int64_t start = now();
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	if (pid < 0 || waitpid(pid, NULL, 0) != pid)
		err(1, "fork");
	return now() - start;
}

static int64_t make_and_remove(const char *path)
{
	int64_t start = now();

	if (mkdir(path, 0755) || rmdir(path))
		err(1, "%s", path);
	return now() - start;
}

static int64_t make_and_remove_cgroup(void)
{
	return make_and_remove(PLAIN "/child");
}

static int64_t make_and_remove_memcg(void)
{
	return make_and_remove(MEMORY "/child");
}

/*
 * A page of dirty page cache that nobody has mapped, under "continue". It is on its LRU list already: else most of the
 * time would go into waiting until each CPU has put away the pages that it has in hand (lru_add_drain_all()).
 */
static int64_t lose_page(void)
{
	char text[32];
	uint64_t entry;
	int64_t start;
	volatile char *map;
	int length;

	if (pwrite(fd, page, PAGE, 0) != PAGE || fsync(fd) || pwrite(fd, page, PAGE, 0) != PAGE)
		err(1, "pwrite");
	map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED || *map != page[0] ||
	    pread(pagemap, &entry, sizeof(entry), (uintptr_t)map / PAGE * sizeof(entry)) != sizeof(entry))
		err(1, "pagemap");
	munmap((void *)map, PAGE);
	length = snprintf(text, sizeof(text), "0x%llx", (unsigned long long)entry & ((1ULL << 55) - 1));
	if (pwrite(drop_caches, "1", 1, 0) != 1)
		err(1, "drop_caches");
	start = now();
	if (write(inject, text, length) != length)
		err(1, "corrupt-pfn");
	start = now() - start;
	if (!fsync(fd) || errno != EIO)
		errx(1, "the page was not lost");
	return start;
}

static void measure(const char *name, int64_t (*operation)(void), int rounds)
{
	int64_t cheapest = INT64_MAX;

	while (rounds--) {
		int64_t cost = operation();

		if (cost < cheapest)
			cheapest = cost;
	}
	printf("%s %lld\n", name, (long long)cheapest);
	fflush(stdout);
}

static int open_file(const char *path, int flags)
{
	int file = open(path, flags | O_CLOEXEC, 0600);

	if (file < 0)
		err(1, "%s", path);
	return file;
}

static void put(const char *path, const char *text)
{
	int file = open_file(path, O_WRONLY);

	if (write(file, text, strlen(text)) != (ssize_t)strlen(text))
		err(1, "%s", path);
	close(file);
}

/* What an init finds is nothing; nothing is to be written back but what is asked for. */
static void set_up(void)
{
	if (mount("proc", "/proc", "proc", 0, NULL) || mount("sysfs", "/sys", "sysfs", 0, NULL) ||
	    mount("debugfs", "/sys/kernel/debug", "debugfs", 0, NULL) || mount("cgroup2", CGROUPS, "cgroup2", 0, NULL))
		err(1, "mount");
	put("/proc/sys/vm/dirty_writeback_centisecs", "360000");
	put("/proc/sys/vm/dirty_expire_centisecs", "360000");
	put(CGROUPS "/cgroup.subtree_control", "+memory");
	if (mkdir(PLAIN, 0755) || mkdir(MEMORY, 0755) || mkdir(OWN, 0755))
		err(1, "mkdir");
	put(MEMORY "/cgroup.subtree_control", "+memory");
	put(OWN "/cgroup.procs", "1");
}

int main(int argc, char **argv)
{
	int rounds = atoi(argv[argc - 1]); /* the kernel puts before it what it does not know itself */

	if (rounds <= 0 || getpid() != 1)
		errx(2, "usage: init=/cost -- ROUNDS");
	set_up();
	memset(page, 'x', PAGE);
	pagemap = open_file("/proc/self/pagemap", O_RDONLY);
	inject = open_file("/sys/kernel/debug/hwpoison/corrupt-pfn", O_WRONLY);
	drop_caches = open_file("/proc/sys/vm/drop_caches", O_WRONLY);
	fd = open_file("/file", O_RDWR | O_CREAT);
	measure("page-cache write", write_pages, rounds);
	measure("page fault", fault_pages, rounds);
	measure("fork and exit", fork_and_exit, rounds);
	measure("cgroup mkdir and rmdir", make_and_remove_cgroup, rounds);
	measure("the same with memory on", make_and_remove_memcg, rounds);
	if (ftruncate(fd, 0))
		err(1, "ftruncate");
	measure("memory_failure() of a dirty page", lose_page, rounds < 200 ? rounds : 200);
	reboot(RB_AUTOBOOT);
	err(1, "reboot");
}

// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * cost DIRECTORY CGROUP MEMCG ROUNDS - what some operations cost, in nanoseconds of CLOCK_MONOTONIC.
 *
 * Meant for QEMU's -icount, where this clock counts instructions. The cheapest round of an operation is the one that
 * nothing else came between. DIRECTORY is on a disk; of the two cgroups, the second one has the memory controller on for
 * its children. Prints a line each: the operation's name, and the cost of one in the cheapest round and in the middle one.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 32 /* few enough for rounds that no timer interrupts */

static char page[PAGE];
static char *directory, *cgroup, *memcg;
static int fd, pagemap, inject, drop_caches;

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int open_file(void)
{
	char path[4096];
	int file;

	snprintf(path, sizeof(path), "%s/cost-XXXXXX", directory);
	file = mkstemp(path);
	if (file < 0)
		err(1, "%s", path);
	unlink(path);
	return file;
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

static int64_t make_and_remove(const char *parent)
{
	char path[4096];
	int64_t start;

	snprintf(path, sizeof(path), "%s/child", parent);
	start = now();
	if (mkdir(path, 0755) || rmdir(path))
		err(1, "%s", path);
	return now() - start;
}

static int64_t make_and_remove_cgroup(void)
{
	return make_and_remove(cgroup);
}

static int64_t make_and_remove_memcg(void)
{
	return make_and_remove(memcg);
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

static int compare(const void *one, const void *other)
{
	int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;

	return (a > b) - (a < b);
}

static void measure(const char *name, int64_t (*operation)(void), int rounds)
{
	int64_t *costs = calloc(rounds, sizeof(*costs));
	int number;

	for (number = 0; number < rounds; number++)
		costs[number] = operation();
	qsort(costs, rounds, sizeof(*costs), compare);
	printf("%s %lld %lld\n", name, (long long)costs[0], (long long)costs[rounds / 2]);
	fflush(stdout);
	free(costs);
}

int main(int argc, char **argv)
{
	int rounds;

	if (argc != 5)
		errx(2, "usage: cost DIRECTORY CGROUP MEMCG ROUNDS");
	directory = argv[1];
	cgroup = argv[2];
	memcg = argv[3];
	rounds = atoi(argv[4]);
	memset(page, 'x', PAGE);
	pagemap = open("/proc/self/pagemap", O_RDONLY);
	inject = open("/sys/kernel/debug/hwpoison/corrupt-pfn", O_WRONLY);
	drop_caches = open("/proc/sys/vm/drop_caches", O_WRONLY);
	if (pagemap < 0 || inject < 0 || drop_caches < 0)
		err(1, "pagemap, corrupt-pfn, drop_caches");
	fd = open_file();
	measure("page-cache write", write_pages, rounds);
	measure("page fault", fault_pages, rounds);
	measure("fork and exit", fork_and_exit, rounds);
	measure("cgroup mkdir and rmdir", make_and_remove_cgroup, rounds);
	measure("the same with memory on", make_and_remove_memcg, rounds);
	if (ftruncate(fd, 0))
		err(1, "ftruncate");
	measure("memory_failure() of a dirty page", lose_page, rounds < 200 ? rounds : 200);
	return 0;
}

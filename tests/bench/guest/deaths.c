// SPDX-License-Identifier: GPL-2.0-only
/*
 * deaths PID... - print "ready", then, once all these processes have ended, when the first and the last one did: two
 * numbers, nanoseconds of CLOCK_MONOTONIC. Ends silently when its standard input does.
 */
#define _GNU_SOURCE
#include <err.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sched_param priority = { .sched_priority = 1 };
	unsigned long long first = 0, last = 0;
	struct pollfd files[64] = { { .fd = STDIN_FILENO, .events = POLLIN } };
	int alive = argc - 1;

	if (argc < 2 || argc > 64)
		errx(2, "usage: deaths PID...");
	for (int number = 1; number < argc; number++) {
		/* A pidfd is readable when the last thread of the process has ended (pidfd_open(2)). */
		files[number].fd = syscall(SYS_pidfd_open, atoi(argv[number]), 0);
		files[number].events = POLLIN;
		if (files[number].fd < 0)
			err(1, "%s", argv[number]);
	}
	/* So that what it reports is when they ended and not when the readers left it a processor. */
	if (mlockall(MCL_CURRENT | MCL_FUTURE) || sched_setscheduler(0, SCHED_FIFO, &priority))
		err(1, "real-time priority");
	puts("ready");
	fflush(stdout);
	while (alive) {
		struct timespec time;

		if (poll(files, argc, -1) < 0)
			err(1, "poll");
		clock_gettime(CLOCK_MONOTONIC, &time);
		last = time.tv_sec * 1000000000ull + time.tv_nsec;
		if (files[0].revents)
			return 1;
		for (int number = 1; number < argc; number++) {
			if (files[number].fd >= 0 && files[number].revents) {
				files[number].fd = -1;
				alive--;
				first = first ? first : last;
			}
		}
	}
	printf("%llu %llu\n", first, last);
	return 0;
}

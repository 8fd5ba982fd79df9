// SPDX-License-Identifier: GPL-2.0-only
/*
 * forkbomb COUNTER CGROUP... - fork without end, and move between cgroups while doing so.
 *
 * Each process forks, clones into one of the cgroups (clone3 with CLONE_INTO_CGROUP) or moves itself to one of them, and
 * may exit after that, also when pids.max is reached. The number of forks is counted in a file in shared memory.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_ulong *forks;

static pid_t clone_into(int cgroup)
{
	struct clone_args args = {
		.flags = CLONE_INTO_CGROUP,
		.exit_signal = SIGCHLD,
		.cgroup = cgroup,
	};

	return syscall(SYS_clone3, &args, sizeof(args));
}

int main(int argc, char **argv)
{
	int cgroups[16], procs[16], number, shared, n = argc - 2;
	uint32_t seed = 1;

	if (n < 1 || n > 16)
		errx(2, "usage: forkbomb COUNTER CGROUP...");
	shared = open(argv[1], O_RDWR | O_CREAT, 0600);
	if (shared < 0 || ftruncate(shared, sizeof(*forks)))
		err(1, "%s", argv[1]);
	forks = mmap(NULL, sizeof(*forks), PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
	if (forks == MAP_FAILED)
		err(1, "mmap");
	for (number = 0; number < n; number++) {
		cgroups[number] = open(argv[2 + number], O_DIRECTORY | O_RDONLY);
		procs[number] = openat(cgroups[number], "cgroup.procs", O_WRONLY);
		if (procs[number] < 0)
			err(1, "%s", argv[2 + number]);
	}
	signal(SIGCHLD, SIG_IGN);
	signal(SIGTERM, SIG_IGN);

	for (;;) {
		pid_t pid = 0;

		seed = seed * 1664525 + 1013904223;
		number = (seed >> 16) % n;
		switch (seed >> 30) {
		case 0:
		case 1:
			pid = fork();
			break;
		case 2:
			pid = clone_into(cgroups[number]);
			break;
		case 3:
			/* Refused when the cgroup is going away, which is all right. */
			if (write(procs[number], "0", 1) < 0)
				usleep(1000);
			continue;
		}
		if (pid == 0) {
			seed ^= getpid() * 2654435761u;
			continue;
		}
		if (pid > 0)
			(*forks)++;
		if ((seed >> 20) % 4 == 0)
			_exit(0);
	}
}

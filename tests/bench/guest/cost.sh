#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# cost.sh PROGRAM ROUNDS - run it in a cgroup of its own, with little else going on
set -eu
systemctl stop cgpolicyd.service
dmesg -n 1
for name in dirty_writeback_centisecs dirty_expire_centisecs; do
	echo 360000 >/proc/sys/vm/$name
done
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
cd /sys/fs/cgroup
mkdir plain memory cost
echo +memory >memory/cgroup.subtree_control
echo $$ >cost/cgroup.procs
exec "$1" /var/tmp "$PWD/plain" "$PWD/memory" "$2"

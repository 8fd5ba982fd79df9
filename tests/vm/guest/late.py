# SPDX-License-Identifier: LGPL-2.1-or-later
"""late main|panic: what the backend tracefs does on a kernel without memory.failure_dirty_action.

main   every path of a loss under continue, kill and panic; what is no loss; a unit that dies and begins anew while
       pages of its earlier runs are lost; a storm; the daemon, its reactor and its probes disturbed; what a kernel may
       lack. The panic is a word written to a file in the place of /proc/sysrq-trigger. CASES (all, or a number: each
       of the six once, from that one on), ROUNDS of the unit and PAGES of the storm follow.
panic  the true one: PATH and INJECTION follow, and nothing comes back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cgpolicy.kprobes import append
from tests.kernel.guest import negatives
from tests.kernel.guest.pagecache import (
    HWPOISON,
    HWPOISON_INJECT,
    PAGE,
    WAIT_SECONDS,
    Cgroup,
    Process,
    Target,
    address_of,
    errno_of,
    file_pfn,
    has_flag,
    keep_quiet,
    overwrite,
    poison,
    target,
)
from tests.vm.guest.scene import (
    CGROUPS,
    SYSTEM,
    must,
    properties,
    property_of,
    run,
    service,
    setting,
    tell,
    wait_for,
    write,
)

TRACING = Path("/sys/kernel/tracing")
INSTANCE = TRACING / "instances/cgpolicy"
SYSRQ = Path("/proc/sysrq-trigger")
POS = 5 * PAGE
PATHS = (
    ("ext4", "write"), ("ext4", "mmap"), ("vfat", "write"), ("bdev", "write"), ("xfs", "large"), ("ext4", "large")
)  # fmt: skip
CASES = [(injection, action) for action in ("continue", "kill", "panic") for injection in ("inject", "srao")]
STORM_SECONDS = 300.0
REACTOR = "/usr/lib/cgpolicy/cgpolicy-reactor"
LOSS_ID = "6935ae465d074405a4cc4710e737d4de"  # as cgpolicy.catalog has it


class UnitCgroup(Cgroup):
    """A unit's control group, which systemd has made."""

    def __init__(self, unit: str, below: str = "") -> None:
        self.path = CGROUPS / property_of(unit, "Service", "ControlGroup").lstrip("/")
        if below:
            self.path /= below
            self.path.mkdir(exist_ok=True)


class Monitor:
    """What the daemon says on the bus, as it comes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["cgpolicy", "--json", "monitor"], stdout=subprocess.PIPE)
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        self._rest = b""
        self._said: list[dict[str, Any]] = []
        # It listens as soon as it shows what is done meanwhile.
        action = "continue"
        while not self._fill(0.5):
            action = "kill" if action == "continue" else "continue"
            must("cgpolicy", "set", "--runtime", "marker", action)

    def _fill(self, seconds: float) -> bool:
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        *lines, self._rest = (self._rest + os.read(self._fd, 65536)).split(b"\n")
        self._said += [json.loads(line) for line in lines]
        return True

    def losses(
        self, unit: str, pages: int = 1, seconds: float = WAIT_SECONDS, device: list[int] | None = None
    ) -> list[dict[str, Any]]:
        """Wait until so many pages of a unit, or of a device, were reported lost; forget all before them."""
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + seconds
        while sum(loss["pages"] for loss in found) < pages:
            for said in self._said:
                if said["signal"] != "DirtyDataLost":
                    continue
                if said["detail"]["Device"] == device if device else said["unit"] == unit:
                    found.append(said)
            self._said = []
            if sum(loss["pages"] for loss in found) < pages and not self._fill(max(deadline - time.monotonic(), 0)):
                where = unit or f"device {device}"
                raise SystemExit(f"{where}: of {pages} lost pages only these were reported: {str(found)[:4000]}")
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def hold(process: Process, path: Path, positions: range, how: str, size: int) -> None:
    """Dirty pages of a file and keep them until told to end."""
    kept = [overwrite(path, pos, how, size) for pos in positions]
    process.tell(" ".join(str(file_pfn(fd, pos)) for (fd, _), pos in zip(kept, positions, strict=True)))
    process.wait_for_order()


def holder(unit: str, file: Target, how: str, *, below: str = "", pages: int = 1) -> tuple[Process, list[int]]:
    """Put a process into a unit that dirties pages of a file; return it with the pages' frame numbers."""
    positions = range(POS, POS + pages * PAGE, PAGE)
    body = partial(hold, path=file.path, positions=positions, how=how, size=file.size)
    process = Process(UnitCgroup(unit, below), body)
    return process, [int(word) for word in process.hear().split()]


def state(unit: str) -> list[str]:
    return [property_of(unit, "Unit", "ActiveState"), property_of(unit, "Service", "Result")]


def main_pid(unit: str) -> int:
    return int(property_of(f"{unit}.service", "Service", "MainPID"))


def number_of_restarts() -> int:
    return int(property_of("kills.service", "Service", "NRestarts"))


def record(unit: str) -> dict[str, str]:
    """Return the last journal record of a loss of a unit."""
    said = must("journalctl", "-o", "json", "-n", "1", f"MESSAGE_ID={LOSS_ID}", f"CGPOLICY_UNIT={unit}")
    return {name: text for name, text in json.loads(said).items() if name.startswith("CGPOLICY") or name == "MESSAGE"}


def prepare(*, fake_panic: bool) -> None:
    """Have the injector, quiet, and the units; every one of them has a marker's company."""
    for module in ("hwpoison-inject", "loop", "xfs", "vfat", "nls_ascii", "nls_cp437"):
        run("modprobe", module)
    keep_quiet()
    if fake_panic:
        fake = Path("/run/sysrq")
        fake.touch()
        must("mount", "--bind", str(fake), str(SYSRQ))
        must("systemctl", "restart", "cgpolicyd")
    for action in ("continue", "kill", "panic"):
        service(f"{action}s", drop_in=setting(action))
    service("bystander", drop_in=setting("kill"))
    service("marker")
    must("systemctl", "daemon-reload")
    must("systemctl", "start", "continues", "kills", "panics", "bystander", "marker")
    wait_for(lambda: properties("panics.service").get("State") == "applied")


@contextlib.contextmanager
def bystander(file: Target) -> Iterator[None]:
    """Have another unit that is set to kill read the page that is lost, and see it live."""

    def read(process: Process) -> None:
        fd = os.open(file.path, os.O_RDONLY)
        os.pread(fd, PAGE, POS)
        process.tell("read")
        process.wait_for_order()

    process = Process(UnitCgroup("bystander.service"), read)
    process.hear()
    yield
    if not process.alive() or state("bystander.service")[0] != "active":
        raise SystemExit("the bystander is dead")
    process.end()


def lose(monitor: Monitor, kind: str, how: str, injection: str, action: str, below: str = "") -> None:
    """Lose a page of the unit that has an action, and tell what became of it."""
    unit = f"{action}s.service"
    with target(kind) as file:
        # A block device's own inode is another than that of its file in /dev: it has the device's number (bdget()).
        major, minor = os.major(file.device), os.minor(file.device)
        inode = major << 20 | minor if kind == "bdev" else os.stat(file.path).st_ino
        process, (pfn,) = holder(unit, file, how, below=below)
        charged = UnitCgroup(unit).id  # also for one below, which is without the memory controller
        with bystander(file):
            poison(pfn, injection)
            (loss,) = monitor.losses(unit)
            status = None
            if action == "kill":
                status = process.wait()
                wait_for(lambda: state(unit)[0] == "failed")
        after = state(unit)
        tell(
            step="loss", path=f"{kind} {how}", injection=injection, action=action, below=below, pfn=pfn,
            device=[major, minor], inode=inode, charged=charged, loss=loss, record=record(unit), status=status,
            after=after, shown=properties(unit), sysrq=SYSRQ.read_text(),
        )  # fmt: skip
        if action == "panic":
            # Written at the offset that the reactor's descriptor has: what was there before becomes zeros.
            os.truncate(SYSRQ, 0)
        if action == "kill":
            must("systemctl", "start", unit)
            wait_for(lambda: properties(unit).get("State") == "applied")
        else:
            process.end()


def no_losses(monitor: Monitor) -> None:
    """Lose what is no dirty file data, with panic set; then what is, which is reported first and alone."""
    makers = (
        negatives.anonymous, negatives.shared_anonymous, negatives.tmpfs, negatives.memfd, negatives.hugetlbfs,
        negatives.clean, negatives.written_back,
    )  # fmt: skip
    cases = [(make, "inject") for make in makers]
    cases += [(make, "srao") for make in (negatives.anonymous, negatives.tmpfs, negatives.memfd, negatives.clean)]
    cases.append((negatives.soft_offlined, "itself"))
    for make, injection in cases:
        process = Process(UnitCgroup("panics.service"), partial(negatives.body, make=make))
        pfn = int(process.hear())
        if injection != "itself":
            poison(pfn, injection)
        poisoned = has_flag(pfn, HWPOISON)
        if make is negatives.hugetlbfs:
            Path("/proc/sys/vm/nr_hugepages").write_text("0")
        tell(step="no loss", what=make.__name__, injection=injection, poisoned=poisoned, sysrq=SYSRQ.read_text())
    lose(monitor, "ext4", "write", "inject", "panic")
    tell(step="no losses", counted=properties("panics.service")["FailureDirty"])


def works(monitor: Monitor, step: str, *, stop: int = 0, **seen: object) -> None:
    """Tell whether a loss still kills, while a process is stopped if one is given."""
    with target("ext4") as file:
        process, (pfn,) = holder("kills.service", file, "write")
        if stop:
            os.kill(stop, signal.SIGSTOP)
        poison(pfn, "inject")
        status = process.wait()
        if stop:
            os.kill(stop, signal.SIGCONT)
        (loss,) = monitor.losses("kills.service")
        tell(step=step, status=status, reaction=loss["detail"]["Reaction"], **seen)
    wait_for(lambda: state("kills.service")[0] == "failed")
    must("systemctl", "start", "kills")
    wait_for(lambda: properties("kills.service").get("State") == "applied")


def probes() -> dict[str, object]:
    """Return what there is of our probes."""
    mine = [line for line in (TRACING / "kprobe_events").read_text().splitlines() if "cgpolicy/" in line]
    return {"probes": mine, "instance": INSTANCE.exists(), "events": (TRACING / "events/cgpolicy").exists()}


def reactor() -> int:
    """Return the process id of the reactor, 0 if there is none."""
    status, out, _ = run("pgrep", "-f", "[/]cgpolicy-reactor")
    return int(out.split()[0]) if status == 0 else 0


def kill_and_wait(pid: int) -> None:
    """Kill the reactor or the daemon, and wait until both are new."""
    old = {reactor(), main_pid("cgpolicyd")}
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: 0 not in (reactor(), main_pid("cgpolicyd")) and not {reactor(), main_pid("cgpolicyd")} & old)
    wait_for(lambda: state("cgpolicyd.service")[0] == "active")
    wait_for(lambda: properties("kills.service").get("State") == "applied")


def disturb(monitor: Monitor) -> None:
    works(monitor, "undisturbed", scheduling=os.sched_getscheduler(reactor()), locked=memory("VmLck"))
    works(monitor, "daemon stopped", stop=main_pid("cgpolicyd"))
    kill_and_wait(reactor())
    works(monitor, "reactor killed")
    kill_and_wait(main_pid("cgpolicyd"))
    works(monitor, "daemon killed")

    other = TRACING / "instances/other"
    other.mkdir()
    append(TRACING / "kprobe_events", "p:other/dirty me_pagecache_dirty")
    (other / "events/other/dirty/enable").write_text("1")
    (other / "set_ftrace_filter").write_text("me_pagecache_dirty")
    (other / "current_tracer").write_text("function")
    works(monitor, "other tracer")
    tell(step="other tracer's", lines=(other / "trace").read_text().count("dirty: (me_pagecache_dirty"))

    refused = errno_of(INSTANCE.rmdir)
    works(monitor, "instance removed", refused=refused)

    (INSTANCE / "events/enable").write_text("0")
    for line in probes()["probes"]:  # type: ignore[attr-defined]
        append(TRACING / "kprobe_events", f"-:{line.split()[0].partition(':')[2]}")
    wait_for(lambda: "meddled" in must("journalctl", "-o", "cat", "-t", "cgpolicyd"))
    wait_for(lambda: bool(probes()["probes"]))
    wait_for(lambda: "0" not in [path.read_text().strip() for path in INSTANCE.glob("events/cgpolicy/*/enable")])
    works(monitor, "probes taken away")
    journal = must("journalctl", "-o", "cat", "-t", "cgpolicyd").splitlines()
    tell(step="said", journal=[line for line in journal if "meddled" in line])

    before = probes()
    reading, _, _ = run("cat", str(INSTANCE / "trace_pipe"), user="nobody")
    disarming, _, said = run(REACTOR, "--disarm", user="nobody")
    tell(step="unprivileged", reading=reading, disarming=disarming, said=said, same=probes() == before)

    must("systemctl", "stop", "cgpolicyd")
    result = state("cgpolicyd.service")
    others = (TRACING / "kprobe_events").read_text().count("other/dirty")
    tell(step="stopped", **probes(), others=others, result=result)
    write(SYSTEM / "cgpolicyd.service.d/norestart.conf", "[Service]\nRestart=no\n")
    must("systemctl", "daemon-reload")
    must("systemctl", "start", "cgpolicyd")
    tell(step="started", **probes())
    must("systemctl", "kill", "--signal=KILL", "cgpolicyd")
    wait_for(lambda: state("cgpolicyd.service")[0] == "failed")
    tell(step="killed", **probes())


def memory(field: str) -> int:
    """Return a size of the reactor's, in KiB."""
    lines = Path(f"/proc/{reactor()}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1])


def is_applied(unit: str) -> bool:
    """Tell whether the daemon has seen to a unit's present cgroup, and not only to that of the run before."""
    known = properties(unit)
    with contextlib.suppress(OSError):
        return (known.get("State"), known.get("ControlGroupId")) == ("applied", UnitCgroup(unit).id)
    return False


def not_killed(unit: str) -> SystemExit:
    """Return all that is known of a unit that should be dead."""
    said = must("journalctl", "-o", "cat", "-n", "40", "-t", "cgpolicyd")
    return SystemExit(f"{unit} was not killed: {properties(unit)}\n{said}")


def innocent(monitor: Monitor, rounds: int) -> None:
    """Lose pages of a unit one after the other while it dies of the first and begins anew.

    In every other round systemd itself starts it again. At the end of a round, when all losses were reported, the
    run that began during the storm must be alive.
    """
    write(SYSTEM / "kills.service.d/limit.conf", "[Unit]\nStartLimitIntervalSec=0\n")
    pages, reactions = 30, dict[str, int]()
    for number in range(rounds):
        restart = "[Service]\nRestart=always\nRestartSec=0\n" if number % 2 else ""
        write(SYSTEM / "kills.service.d/restart.conf", restart)
        must("systemctl", "daemon-reload")
        if not wait_for(lambda: is_applied("kills.service")):
            raise not_killed("kills.service")
        before, restarts = main_pid("kills"), number_of_restarts()
        with target("ext4") as file:
            process, frames = holder("kills.service", file, "write", pages=pages)
            storm = Process(None, partial(inject, frames=frames))
            if not select.select([process.pidfd], [], [], WAIT_SECONDS)[0]:
                raise not_killed("kills.service")
            status = process.wait()
            if not restart:
                wait_for(lambda: state("kills.service")[0] == "failed")
                must("systemctl", "start", "kills")
            wait_for(lambda before=before: main_pid("kills") not in (0, before))  # type: ignore[misc]
            after = main_pid("kills")
            storm.wait()
            # Newer kernels charge the slice for pages of a cgroup that is gone.
            device = [os.major(file.device), os.minor(file.device)]
            for loss in monitor.losses("kills.service", pages, device=device):
                reaction = loss["detail"]["Reaction"] or "none"
                reactions[reaction] = reactions.get(reaction, 0) + loss["pages"]
            same = main_pid("kills") == after and state("kills.service")[0] == "active"
        restarts = number_of_restarts() - restarts if restart else 1
        tell(step="round", number=number, restart=bool(restart), status=status, same=same, restarts=restarts)
    tell(step="innocent", rounds=rounds, reactions=reactions)
    write(SYSTEM / "kills.service.d/restart.conf", "")
    must("systemctl", "daemon-reload")


def inject(process: Process, frames: list[int]) -> None:
    for pfn in frames:
        poison(pfn, "inject")


def storm(monitor: Monitor, pages: int) -> None:
    """Lose many pages of a unit as fast as the kernel can; tell what was reported, and how the reactor has grown."""
    path = Path("/var/tmp/storm")
    with open(path, "wb") as file:
        for _ in range(pages):
            file.write(b"A" * PAGE)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    process = Process(UnitCgroup("continues.service"), partial(dirty_all, path=path, pages=pages))
    while process.hear() != "dirty":
        pass
    frames = Path("/run/frames").read_text().split()
    before, began = memory("VmRSS"), time.monotonic()
    with open(HWPOISON_INJECT, "w", buffering=1) as file_:
        for pfn in frames:
            file_.write(f"{pfn}\n")
    seconds = time.monotonic() - began
    device = os.stat(path).st_dev
    reports = monitor.losses("", pages, STORM_SECONDS + pages / 20, [os.major(device), os.minor(device)])
    reported: dict[str, int] = {}
    for loss in reports:
        reported[loss["unit"]] = reported.get(loss["unit"], 0) + loss["pages"]
    tell(
        step="storm", pages=pages, reported=reported, reports=len(reports), seconds=round(seconds, 1),
        told=round(time.monotonic() - began, 1), before=before, after=memory("VmRSS"),
        missed="events were lost" in must("journalctl", "-o", "cat", "-t", "cgpolicyd"),
    )  # fmt: skip
    process.end()


def dirty_all(process: Process, path: Path, pages: int) -> None:
    """Dirty all pages of a file, and keep them until told to end."""
    fd = os.open(path, os.O_RDWR)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for page in range(pages):
        os.pwrite(fd, b"B", page * PAGE)
        if page % 1000 == 0:
            process.tell("dirtying")  # nobody waits for long without a word
    with mmap.mmap(fd, pages * PAGE) as mapping, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for page in range(pages):
            mapping[page * PAGE]
        table = os.pread(pagemap.fileno(), pages * 8, address_of(mapping) // PAGE * 8)
    entries = memoryview(table).cast("Q")
    Path("/run/frames").write_text(" ".join(hex(entry & ((1 << 55) - 1)) for entry in entries))
    process.tell("dirty")
    process.wait_for_order()


def lacking() -> None:
    """Take away, one after the other, what the probes need, and tell what is said of it."""
    must("systemctl", "stop", "cgpolicyd")
    empty = Path("/run/empty")
    empty.mkdir()

    def doctor(lack: str, user: str = "") -> None:
        status, out, _ = run("cgpolicy", "doctor", user=user)
        tell(step="lacking", what=lack, status=status, said=out)

    doctor("nothing")
    doctor("permission", "nobody")
    switches = {"ftrace": "/proc/sys/kernel/ftrace_enabled", "kprobes": "/sys/kernel/debug/kprobes/enabled"}
    for lack, switch in switches.items():
        try:
            Path(switch).write_text("0")
        except OSError as error:
            tell(step="lacking", what=lack, refused=errno.errorcode[error.errno or 0])
            continue
        doctor(lack)
        Path(switch).write_text("1")
    for lack, path in (("btf", "/sys/kernel/btf"), ("tracefs", "/sys/kernel/tracing")):
        must("mount", "--bind", str(empty), path)
        doctor(lack)
        must("umount", path)
    # There is no way back from this one. A daemon that is armed already finds its probes' files shut.
    must("systemctl", "start", "cgpolicyd")
    wait_for(lambda: properties("kills.service").get("State") == "applied")
    Path("/sys/kernel/security/lockdown").write_text("confidentiality")
    wait_for(lambda: properties("kills.service").get("State") == "not-enforced")
    tell(step="locked down later", status=must("cgpolicy", "status"))
    doctor("lockdown")
    must("systemctl", "restart", "cgpolicyd")  # doctor's question to it may have started it
    tell(step="locked down", status=must("cgpolicy", "status"), unit=properties("kills.service")["State"])


def everything(cases: str, rounds: int, pages: int) -> None:
    prepare(fake_panic=True)
    tell(step="status", text=must("cgpolicy", "status"), kernel=os.uname().release)
    monitor = Monitor()
    for number, (kind, how) in enumerate(PATHS):
        for injection, action in CASES if cases == "all" else [CASES[(number + int(cases)) % len(CASES)]]:
            lose(monitor, kind, how, injection, action)
    lose(monitor, "ext4", "write", "inject", "kill", below="payload")
    no_losses(monitor)
    innocent(monitor, rounds)
    storm(monitor, pages)
    monitor.close()
    disturb(Monitor())
    lacking()


def panic(kind: str, how: str, injection: str) -> None:
    """Lose a page of the unit that is set to panic; not to return is success."""
    prepare(fake_panic=False)
    with target(kind) as file:
        _, (pfn,) = holder("panics.service", file, how)
        poison(pfn, injection)
        wait_for(lambda: False)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["main", cases, rounds, pages]:
            everything(cases, int(rounds), int(pages))
        case ["panic", kind, how, injection]:
            panic(kind, how, injection)
        case _:
            raise SystemExit(__doc__)

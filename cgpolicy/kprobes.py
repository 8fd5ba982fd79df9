# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dirty page cache that is being lost, on kernels that do not tell of it: kprobes in mm/memory-failure.c.

me_pagecache_dirty() is where the kernel gives up a single dirty page, just before it takes the page off the cgroup's
charge and out of the page cache. A page of a large folio that cannot be split, and one that cannot be unmapped, are
given up without a function of their own: what passes on the way there is a suspect, and a loss once the tracepoint
memory_failure_event says that nothing was done about the page.

Members are found by name and parameters by type, with the running kernel's BTF. A private tracefs instance keeps
clear of whoever else traces on this host.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cgpolicy.btf import VMLINUX, Btf, NotInBtf
from cgpolicy.error import NotSupported
from cgpolicy.losses import DROPPED

TRACING = Path("/sys/kernel/tracing")
INSTANCE = "cgpolicy"  # the tracefs instance, and the group of the events

OUTCOME = "memory_failure_event"  # a tracepoint

# Ancestors of the charged cgroup, itself included, whose ids come with an event.
LEVELS = 12

# Trace buffer of all CPUs together, and of one at least. An event takes some 250 bytes.
BUFFER_KIB = 16384
BUFFER_CPU_KIB = 256

# What an instance inherits from the host's trace options as far as it changes the text, or whether poll() waits
# (kernel: Documentation/trace/ftrace.rst, trace_options).
OPTIONS = {
    "raw": "0",
    "hex": "0",
    "bin": "0",
    "fields": "0",
    "block": "0",
    "latency-format": "0",
    "context-info": "1",
    "overwrite": "1",
}

BDI_CAP_WRITEBACK = 1  # include/linux/backing-dev.h: shmem, and all that has no backing store, is without
BDEVFS_MAGIC = 0x62646576  # include/uapi/linux/magic.h: these inodes have their disk's BDI, not their superblock's
MAPPING_FLAGS = 3  # include/linux/page-flags.h: low bits of folio->mapping, set for anonymous memory
CHARGE_FLAGS = 7  # include/linux/memcontrol.h: low bits of folio->memcg_data, not set for page cache
TAIL = 1  # include/linux/page-flags.h: set in compound_head or compound_info of all pages of a folio but the first
MINOR_BITS = 20  # include/linux/kdev_t.h

# kernel/trace/trace_output.c, and the print format of the tracepoint.
LINE = re.compile(
    rb"\](?: +\S+)? +(?P<seconds>\d+)\.(?P<microseconds>\d{6}): (?P<event>\w+):"
    rb" (?:\([^)]*\) (?P<fields>.*)|pfn (?P<pfn>0x[0-9a-f]+|0): .*)"
)
FIELD = re.compile(rb"(\w+)=(0x[0-9a-f]+|-?\d+)")

UNKNOWN_KERNEL = "boot a kernel with the series in kernel-patch/, or report this one"


@dataclass(frozen=True, slots=True)
class LateLoss:
    """One lost page; position is its offset in the file in bytes, time_ns is CLOCK_MONOTONIC, to the microsecond.

    lineage holds the ids of the cgroups from the child of the root down to the charged one; it is empty if that is
    the root, or nobody. A 0 in it stands for those between the twelfth and the charged one, which are not known.
    """

    pfn: int
    device: tuple[int, int]
    inode: int
    position: int
    lineage: tuple[int, ...]
    time_ns: int


# What to ask the kernel ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where pages pass that are lost on some paths: functions, the best first, of which the kernel has one or none."""

    event: str
    functions: tuple[str, ...]
    large: bool = False  # the page may be any of a large folio
    busy: bool = False  # they are not only called for poisoned pages


DIRTY = Place("dirty", ("me_pagecache_dirty",))
# After a split that failed, or that did not go down to single pages, and before a page is unmapped.
COLLECT = Place("collect", ("collect_procs",))
UNMAP = Place("unmap", ("unmap_poisoned_folio", "try_to_unmap"), busy=True)
SPLIT = Place("split", ("try_to_split_thp_page",), large=True)
SPLIT_ANY = Place(
    "split", ("split_huge_page_to_list_to_order", "split_huge_page_to_list", "__folio_split"), large=True, busy=True
)

# The parameter that is the poisoned page, in functions that have several.
PAGE_PARAMETER = {"__folio_split": "lock_at"}


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe at a function's entry: the event's name, what it fetches, and its filter."""

    event: str
    function: str
    fetch: Mapping[str, str]
    filter: str = ""

    def definition(self, group: str) -> str:
        """Return its line for kprobe_events (kernel: Documentation/trace/kprobetrace.rst)."""
        fetch = " ".join(f"{name}={expression}" for name, expression in self.fetch.items())
        return f"p:{group}/{self.event} {self.function} {fetch}"


class Layout:
    """Where things lie in this kernel; raises NotInBtf if something is not there at all."""

    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        offset = btf.offset
        self.page_size = btf.size("struct page")
        self.poisoned = 1 << btf.enumerator("enum pageflags", "PG_hwpoison")
        self.dirty = 1 << btf.enumerator("enum pageflags", "PG_dirty")
        self.flags = offset("struct page", "flags")
        # A tail page leads to the head, or, in newer kernels, has a mask for the address, which is of no use to
        # fetch arguments (compound_info_has_mask() in include/linux/page-flags.h).
        try:
            self.head = offset("struct page", "compound_head")
            self.leads = True
        except NotInBtf:
            self.head = offset("struct page", "compound_info")
            self.leads = self.page_size & (self.page_size - 1) != 0
        self.folio = {name: offset("struct folio", name) for name in ("flags", "mapping", "index", "memcg_data")}
        self.host = offset("struct address_space", "host")
        self.inode = {name: offset("struct inode", name) for name in ("i_ino", "i_rdev", "i_sb")}
        self.superblock = {name: offset("struct super_block", name) for name in ("s_dev", "s_magic", "s_bdi")}
        self.capabilities = offset("struct backing_dev_info", "capabilities")
        self.subsystem = offset("struct mem_cgroup", "css", "ss")
        self.cgroup = offset("struct mem_cgroup", "css", "cgroup")
        self.level, self.kn = offset("struct cgroup", "level"), offset("struct cgroup", "kn")
        self.ancestors = offset("struct cgroup", "ancestors")
        self.id = offset("struct kernfs_node", "id")
        # Kernels that move folios of a removed cgroup to its parent charge them through an obj_cgroup, of which
        # they keep one for each node (mm/memcontrol.c, folio_memcg() in include/linux/memcontrol.h).
        try:
            offset("struct mem_cgroup_per_node", "orig_objcg")
            self.memcg: int | None = offset("struct obj_cgroup", "memcg")
        except NotInBtf:
            self.memcg = None

    def outcome(self) -> str:
        """Return the tracepoint's filter, for pages that were given up on the way."""
        kinds = [self._btf.enumerator("enum mf_action_page_type", f"MF_MSG_{name}") for name in GIVEN_UP]
        results = [self._btf.enumerator("enum mf_result", f"MF_{name}") for name in ("IGNORED", "FAILED")]
        alternatives = [
            " || ".join(f"{field} == {value}" for value in values)
            for field, values in (("type", kinds), ("result", results))
        ]
        return " && ".join(f"({text})" for text in alternatives)

    def probe(self, place: Place, function: str) -> Probe:
        """Return the probe for one of a place's functions; raise NotInBtf if its parameters do not serve."""
        parameters = [(f"$arg{number}", *pair) for number, pair in enumerate(self._btf.parameters(function), 1)]
        wanted = PAGE_PARAMETER.get(function)
        pages = [
            argument
            for argument, name, kind in parameters
            if kind == "struct page *" and (wanted is None or name == wanted)
        ]
        folios = [argument for argument, _, kind in parameters if kind == "struct folio *"]
        if not pages and (place.large or not folios):
            raise NotInBtf(f"the kernel's {function}() is not told the page")
        page = (pages or folios)[0]
        folio = (folios or pages)[0]
        fetch = {
            "page": f"{page}:x64",
            "link": f"+{self.head}({page}):x64",
            "base": "@vmemmap_base:x64",
            "memory": f"+{self.subsystem}(@root_mem_cgroup):x64",
        }
        if folios:
            fetch["folio"] = f"{folio}:x64"
        if place.busy:
            fetch["marks"] = f"+{self.flags}({page}):x64"
        fetch |= self.of_folio(folio)
        if place.large and not folios:
            if not self.leads:
                raise NotInBtf(f"the kernel's {function}() is not told the folio")
            # Once for a page that is the folio, and once for a page that leads to it: the link tells them apart.
            head = self.of_folio(f"+{self.head}({page})", TAIL)
            fetch |= {f"{name}_": expression for name, expression in head.items()}
        return Probe(place.event, function, fetch, f"marks & {self.poisoned:#x}" if place.busy else "")

    def of_folio(self, folio: str, excess: int = 0) -> dict[str, str]:
        """Return what is fetched of a folio, at an address that is too large by some bytes."""
        at = {name: f"{offset - excess:+d}({folio})" for name, offset in self.folio.items()}
        inode = f"+{self.host}({at['mapping']})"
        superblock = f"+{self.inode['i_sb']}({inode})"
        memcg = at["memcg_data"] if self.memcg is None else f"+{self.memcg}({at['memcg_data']})"
        cgroup = f"+{self.cgroup}({memcg})"
        fields = {
            "flags": f"{at['flags']}:x64",
            "mapping": f"{at['mapping']}:x64",
            "index": f"{at['index']}:u64",
            "ino": f"+{self.inode['i_ino']}({inode}):u64",
            "rdev": f"+{self.inode['i_rdev']}({inode}):u32",
            "dev": f"+{self.superblock['s_dev']}({superblock}):u32",
            "magic": f"+{self.superblock['s_magic']}({superblock}):x64",
            "bdi": f"+{self.capabilities}(+{self.superblock['s_bdi']}({superblock})):x32",
            "charge": f"{at['memcg_data']}:x64",
            "memcg": f"{memcg}:x64",
            "ss": f"+{self.subsystem}({memcg}):x64",
            "level": f"+{self.level}({cgroup}):s32",
            "id": f"+{self.id}(+{self.kn}({cgroup})):u64",
        }
        for level in range(1, LEVELS + 1):
            ancestor = f"+{self.ancestors + 8 * level}({cgroup})"
            fields[f"a{level}"] = f"+{self.id}(+{self.kn}({ancestor})):u64"
        return fields


# enum mf_action_page_type
GIVEN_UP = ("UNSPLIT_THP", "UNMAP_FAILED")


# What it answers -------------------------------------------------------------------------------


class Unattributed(Exception):
    """An event that does not say what it should: the kernel is not as this module takes it to be."""


@dataclass(frozen=True, slots=True)
class Event:
    """A page on its way through a probe. What could not be fetched has an arbitrary value."""

    name: str
    fields: Mapping[str, int]
    time_ns: int

    def pfn(self, page_size: int) -> int:
        """Return the page's frame number (vmemmap: include/asm-generic/memory_model.h)."""
        number, rest = divmod(self.fields["page"] - self.fields["base"], page_size)
        if rest or number < 0:
            raise Unattributed("a page that is not in the memory map")
        return number

    def loss(self, layout: Layout) -> LateLoss | None:
        """Return what is lost with the page; None if it has no backing store, or is clean. Raise Unattributed."""
        page, link, suffix = self.fields["page"], self.fields["link"], ""
        folio = self.fields.get("folio", page)
        if link & TAIL and "folio" not in self.fields:
            if "flags_" not in self.fields:
                raise Unattributed("a page of a large folio")
            folio, suffix = link - TAIL, "_"
        of = {name.removesuffix(suffix): value for name, value in self.fields.items() if name.endswith(suffix)}
        # Each pointer is looked at before what lies behind it.
        if not of["mapping"] or of["mapping"] & MAPPING_FLAGS:
            return None
        device = of["dev"]
        if of["magic"] == BDEVFS_MAGIC:
            device = of["rdev"]
        elif not of["bdi"] & BDI_CAP_WRITEBACK:
            return None
        # A page that is not a suspect only was handled as a dirty one.
        if self.name != DIRTY.event and not of["flags"] & layout.dirty:
            return None
        pages, rest = divmod(page - folio, layout.page_size)
        if rest or pages < 0:
            raise Unattributed("a page that is not in its folio")
        return LateLoss(
            pfn=self.pfn(layout.page_size),
            device=(device >> MINOR_BITS, device & ((1 << MINOR_BITS) - 1)),
            inode=of["ino"],
            position=(of["index"] + pages) * mmap.PAGESIZE,
            lineage=lineage(of, self.fields["memory"]),
            time_ns=self.time_ns,
        )


def lineage(of: Mapping[str, int], memory: int) -> tuple[int, ...]:
    """Return the ids of a charged cgroup's path; raise Unattributed."""
    if not of["charge"]:
        return ()
    # That it is a cgroup of the memory controller is seen by the controller that it names.
    if of["charge"] & CHARGE_FLAGS or not of["memcg"] or of["ss"] != memory:
        raise Unattributed("a charge of an unknown kind")
    ids = tuple(of[f"a{level}"] for level in range(1, min(of["level"], LEVELS) + 1))
    return ids if of["level"] <= LEVELS else (*ids, 0, of["id"])


class LossProbes:
    """Sets the probes and reads losses as they happen.

    paths are those that are watched (P1 to P5: cgpolicyd(8)). dropped counts events that came too fast for the trace
    buffer, unattributed those of which nothing can be said because the kernel is not as expected.
    """

    def __init__(
        self,
        tracefs: Path = TRACING,
        btf: Path = VMLINUX,
        instance: str = INSTANCE,
        root: Path = Path("/"),
    ) -> None:
        self._tracefs = tracefs
        self._btf = btf
        self._group = instance
        self._instance = tracefs / "instances" / instance
        self._root = root
        self._layout: Layout | None = None
        self._events: dict[str, str] = {}  # below events/, with their filters
        self._pipe = -1
        self._rest = b""
        self._suspect: Event | None = None
        self.paths: tuple[str, ...] = ()
        self.dropped = 0
        self.unattributed = 0

    # Setting ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise NotSupported, with the cure, if the probes cannot be set; change nothing."""
        _, probe = self._prepare()
        missing = self._missing(probe.function)
        if missing is not None:
            raise missing

    def arm(self) -> None:
        """Set the probes and begin to listen; raise NotSupported with the cure if that cannot be.

        What a killed process left behind is taken away first.
        """
        layout, probe = self._prepare()
        disarm_leftovers(self._tracefs, self._group)
        try:
            self._open_instance()
            self._set(probe)
            paths = {"P1", "P2"}
            if self._watch_outcome(layout):
                paths |= self._set_suspects(layout)
            for event in self._events:
                self._write(f"events/{event}/enable", "1")
            self._pipe = os.open(self._instance / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            missing = self._missing(probe.function)
            reason = self._last_error() or error.strerror
            self.disarm()
            raise missing or NotSupported(f"cannot trace: {reason}", hint=f"see {error.filename}") from None
        self._layout = layout
        self.paths = tuple(sorted(paths))

    def _prepare(self) -> tuple[Layout, Probe]:
        """Return the layout, and the probe without which the others are of no use; raise NotSupported."""
        self._check_host()
        try:
            layout = Layout(Btf.read(self._btf))
            return layout, layout.probe(DIRTY, *DIRTY.functions)
        except NotInBtf as error:
            raise NotSupported(error.message, hint=UNKNOWN_KERNEL) from None

    def _check_host(self) -> None:
        if "[confidentiality]" in self._read(self._root / "sys/kernel/security/lockdown"):
            raise NotSupported("the kernel is locked down", hint="boot with lockdown=integrity or none")
        try:
            if not any(self._tracefs.iterdir()):
                raise FileNotFoundError
            os.stat(self._tracefs / "events")
            kprobes = os.path.exists(self._tracefs / "kprobe_events")
        except PermissionError:
            raise NotSupported(f"{self._tracefs} is not accessible", hint="run as root") from None
        except OSError:
            hint = "systemctl start sys-kernel-tracing.mount"
            raise NotSupported(f"{self._tracefs} is no tracefs", hint=hint) from None
        if not kprobes:
            raise NotSupported("the kernel has no kprobe events", hint="boot one built with CONFIG_KPROBE_EVENTS")
        for fault, cure in self._switched_off():
            raise NotSupported(fault, hint=cure)

    def _switched_off(self) -> Iterator[tuple[str, str]]:
        """Yield what disables all probes of this host, and its cure."""
        # Probes at a function's entry are calls from there (kernel: Documentation/trace/kprobes.rst).
        if self._read(self._root / "proc/sys/kernel/ftrace_enabled") == "0":
            yield "kernel.ftrace_enabled is 0", "sysctl kernel.ftrace_enabled=1"
        switch = self._root / "sys/kernel/debug/kprobes/enabled"
        if self._read(switch) == "0":
            yield "kprobes are disabled", f"echo 1 > {switch}"

    def _missing(self, function: str) -> NotSupported | None:
        """Return what is wrong if the kernel has no such function, or none of what is fetched by its name."""
        names = set()
        with contextlib.suppress(OSError), open(self._root / "proc/kallsyms", "rb") as symbols:
            names = {line.split()[2].decode() for line in symbols}
        if not names:
            return None
        if function not in names:
            hint = "boot one built with CONFIG_MEMORY_FAILURE"
            return NotSupported(f"the kernel has no function {function}", hint=hint)
        for symbol in ("vmemmap_base", "root_mem_cgroup"):
            if symbol not in names:
                return NotSupported(f"the kernel names no {symbol}", hint="boot one built with CONFIG_KALLSYMS_ALL")
        return None

    def _open_instance(self) -> None:
        self._instance.mkdir(exist_ok=True)
        size = max(BUFFER_CPU_KIB, BUFFER_KIB // (os.cpu_count() or 1))
        self._write("buffer_size_kb", str(size))
        # Wake at the first event, not when a share of the buffer is full.
        self._write("buffer_percent", "0")
        self._write("trace_clock", "mono")
        for option, value in OPTIONS.items():
            with contextlib.suppress(FileNotFoundError):
                self._write(f"options/{option}", value)
        self._write("tracing_on", "1")

    def _set(self, probe: Probe) -> None:
        append(self._tracefs / "kprobe_events", probe.definition(self._group))
        self._listen(f"{self._group}/{probe.event}", probe.filter)

    def _listen(self, event: str, condition: str) -> None:
        if condition:
            self._write(f"events/{event}/filter", condition)
        self._events[event] = condition

    def _watch_outcome(self, layout: Layout) -> bool:
        """Listen to how memory_failure() ended, if the kernel tells; without it, no suspect is ever a loss."""
        for path in self._tracefs.glob(f"events/*/{OUTCOME}"):
            with contextlib.suppress(NotInBtf):
                self._listen(f"{path.parent.name}/{OUTCOME}", layout.outcome())
                return True
        return False

    def _set_suspects(self, layout: Layout) -> set[str]:
        """Set the probes that this kernel allows for; return the paths that they watch."""
        paths = set()
        if self._set_first(layout, COLLECT):
            paths |= {"P5"}
            # Kernels that have a mask in tail pages all collect after a split that failed (kill_procs_now());
            # of the others, only the newest do.
            paths |= set() if layout.leads else {"P3", "P4"}
        elif self._set_first(layout, UNMAP):
            paths |= {"P5"}
        if "P3" not in paths and (self._set_first(layout, SPLIT) or self._set_first(layout, SPLIT_ANY)):
            paths |= {"P3", "P4"}
        return paths

    def _set_first(self, layout: Layout, place: Place) -> bool:
        """Set a probe in the first function of a place that can take one."""
        for function in place.functions:
            try:
                self._set(layout.probe(place, function))
            except NotInBtf:
                continue
            except OSError as error:
                # Described by BTF but not there, there more than once, or not to be probed.
                if error.errno not in (errno.ENOENT, errno.EADDRNOTAVAIL, errno.EINVAL):
                    raise
            else:
                return True
        return False

    def _last_error(self) -> str:
        """Return what the kernel says was wrong with the last line that it refused."""
        lines = [line for line in self._read(self._tracefs / "error_log").splitlines() if ": error: " in line]
        return lines[-1].partition(": error: ")[2] if lines else ""

    def _write(self, file: str, text: str) -> None:
        write(self._instance / file, text)

    @staticmethod
    def _read(path: Path) -> str:
        """Return a file's text, empty if there is none."""
        try:
            return path.read_text(errors="replace").strip()
        except OSError:
            return ""

    # Reading ----------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._pipe

    def read(self) -> list[LateLoss]:
        """Return losses that have come, without waiting.

        In a storm these are the first ones: there are more as long as fileno() is ready.
        """
        try:
            data = os.read(self._pipe, 65536)
        except BlockingIOError:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [loss for loss in map(self._parse, lines) if loss is not None]

    def _parse(self, line: bytes) -> LateLoss | None:
        match = LINE.search(line)
        if match is None:
            lost = DROPPED.search(line)
            self.dropped += int(lost[1]) if lost else 0
            return None
        name = match["event"].decode()
        try:
            if match["fields"] is None:
                return self._convict(int(match["pfn"], 16)) if name == OUTCOME else None
            fields = {key.decode(): int(value, 0) for key, value in FIELD.findall(match["fields"])}
            microseconds = int(match["seconds"]) * 1_000_000 + int(match["microseconds"])
            event = Event(name, fields, microseconds * 1000)
            if name != DIRTY.event:
                self._suspect = event
                return None
            self._suspect = None
            assert self._layout is not None
            return event.loss(self._layout)
        except (Unattributed, KeyError, ValueError):
            self.unattributed += 1
            return None

    def _convict(self, pfn: int) -> LateLoss | None:
        """Return the loss of a page that was given up; memory_failure() handles one page at a time (mf_mutex)."""
        suspect, self._suspect = self._suspect, None
        assert self._layout is not None
        if suspect is None or suspect.pfn(self._layout.page_size) != pfn:
            return None
        return suspect.loss(self._layout)

    # Watching over them -----------------------------------------------------------------------

    def faults(self) -> str:
        """Return what keeps the probes from telling of losses, empty if they do."""
        if self._pipe < 0:
            return "not armed"
        faults = [fault for fault, _ in self._switched_off()]
        if not self._instance.is_dir():
            return "; ".join([*faults, f"{self._instance} is gone"])
        if self._read(self._instance / "tracing_on") != "1":
            faults.append(f"{self._instance}/tracing_on is not 1")
        for event, condition in self._events.items():
            path = self._instance / "events" / event
            if not self._read(path / "enable").startswith("1"):
                faults.append(f"{event} is not enabled" if path.is_dir() else f"{event} is gone")
            elif self._read(path / "filter") != (condition or "none"):
                faults.append(f"the filter of {event} is another")
        return "; ".join(faults)

    def disarm(self) -> None:
        """Stop listening and take the probes away, as far as nobody else holds them; may be repeated."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self._rest = b""
        self._suspect = None
        self._events = {}
        self.paths = ()
        with contextlib.suppress(NotSupported):
            remove_probes(self._tracefs, self._group)
        with contextlib.suppress(OSError):
            self._instance.rmdir()


# Taking away -----------------------------------------------------------------------------------


def disarm_leftovers(tracefs: Path = TRACING, instance: str = INSTANCE) -> None:
    """Take away what a killed process left behind; raise NotSupported if somebody uses it."""
    path = tracefs / "instances" / instance
    try:
        path.rmdir()
    except OSError as error:
        if error.errno == errno.EBUSY:
            hint = "does another process read its trace?"
            raise NotSupported(f"{path} is in use", hint=hint) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotSupported(f"{tracefs} is not accessible", hint="run as root") from None
    remove_probes(tracefs, instance)


def remove_probes(tracefs: Path, group: str) -> None:
    """Remove a group's probes; raise NotSupported for one that is in use."""
    for event in probes_of(tracefs, group):
        # Somebody may have enabled all events there are.
        for place in (tracefs, *tracefs.glob("instances/*")):
            with contextlib.suppress(OSError):
                write(place / "events" / group / event / "enable", "0")
        try:
            append(tracefs / "kprobe_events", f"-:{group}/{event}")
        except FileNotFoundError:
            pass
        except OSError as error:
            message = f"probe {group}/{event} cannot be removed: {error.strerror}"
            raise NotSupported(message, hint="does another tracer use it?") from None


def probes_of(tracefs: Path, group: str) -> Collection[str]:
    """Return the events that a group of probes has."""
    try:
        text = (tracefs / "kprobe_events").read_text()
    except OSError:
        return []
    return re.findall(rf"^[pr]\d*:{re.escape(group)}/(\w+) ", text, re.MULTILINE)


def append(path: Path, text: str) -> None:
    """Add a line to a file of which others have theirs in it, too."""
    write(path, f"{text}\n", os.O_APPEND)


def write(path: Path, text: str, flags: int = 0) -> None:
    """Write into a file of the kernel's, at once; raise OSError with the path."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""cgpolicyd: wires the parts together and runs them in one GLib main loop."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pydbus
from gi.repository import GLib
from pystemd import daemon as sd_daemon

from cgpolicy import __version__, journal
from cgpolicy.action import Action
from cgpolicy.bus import BusFace
from cgpolicy.cgroupfs import (
    CONTROL_FILE,
    POLICY_FILE,
    CgroupTree,
    CgroupWatch,
    Made,
    Overflow,
    Removed,
    Written,
    unit_of_directory,
)
from cgpolicy.client import NAME
from cgpolicy.error import UserError
from cgpolicy.losses import Loss, LossReader
from cgpolicy.machined import MachineWatch
from cgpolicy.policyfile import PolicyFiles
from cgpolicy.polkit import Authority
from cgpolicy.reconciler import Owner, Reconciler, Unit
from cgpolicy.systemd import UnitFacts
from cgpolicy.systemd_watch import SystemdWatch
from cgpolicy.unitfile import Problem
from cgpolicy.unitname import ROOT_SLICE, unit_type

SWEEP_SECONDS = 600

# Pages of one file, lost together, become one record; a record names at most so many offsets.
POSITIONS_MAX = 64


def lasting(handler: Callable[..., None]) -> Callable[..., bool]:
    """Keep a source of the main loop when its handler failed once: GLib drops one that does not return True."""

    @wraps(handler)
    def call(*arguments: Any) -> bool:
        try:
            handler(*arguments)
        except Exception:
            sys.excepthook(*sys.exc_info())
        return True

    return call


class Daemon:
    """One instance for the life of the process."""

    def __init__(self, root: Path) -> None:
        self.loop = GLib.MainLoop()
        self.status = 0
        self.bus = pydbus.SystemBus()
        self.tree = CgroupTree(root / "sys/fs/cgroup")
        self.files = PolicyFiles(root)
        self.cgroups = CgroupWatch(self.tree)
        self.losses = LossReader(root / "sys/kernel/tracing")
        self.watch = SystemdWatch(self.bus, loaded=self.unit_loaded, removed=self.unit_removed, refresh=self.refresh)
        self.machines = MachineWatch(self.bus, self.machine_changed)
        self.reconciler = Reconciler(self.tree, self.files, machine_uuid=self.machines.uuid)
        self.face: BusFace | None = None
        self._refreshing = False
        self._refresh_asked: list[Callable[[], None]] = []

    # Start and end ----------------------------------------------------------------------------

    def run(self) -> int:
        """Run until told to end; return the exit status. Policies stand before the name is claimed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, self.loop.quit)
        GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, signal.SIGHUP, self.hangup)
        reports = self.reconciler.reports
        reports.problem = self.problem
        reports.interference = self.interference
        reports.settled = self.settled
        # Subscribed before the first look, so that nothing falls between the two. At high priority: a unit's
        # first process is a few milliseconds behind its cgroup.
        GLib.io_add_watch(self.cgroups.fileno(), GLib.PRIORITY_HIGH, GLib.IOCondition.IN, self.cgroup_changes)
        self.open_losses()
        self.watch.start()
        self.machines.start()
        self.refresh(self.publish)
        GLib.timeout_add_seconds(SWEEP_SECONDS, self.sweep)
        self.start_watchdog()
        self.loop.run()
        sd_daemon.notify(False, stopping=1)
        # What the kernel was told stays in force; only the private tracing instance goes.
        self.losses.close()
        return self.status

    def publish(self) -> None:
        """Go on the bus, the first picture being complete and applied."""
        authority = Authority(self.bus.con)
        self.face = BusFace(self.bus, self.reconciler, self.watch, authority, self.files, self.refresh)
        self.reconciler.reports.changed = self.face.unit_changed
        self.reconciler.reports.removed = self.removed
        try:
            self.bus.request_name(NAME)
        except RuntimeError as error:
            self.fail(f"cannot own {NAME} on the bus: {error}")
            return
        self.notify_ready()

    def fail(self, message: str) -> None:
        journal.log_error(message)
        self.status = 1
        self.loop.quit()

    def notify_ready(self) -> None:
        assert self.face is not None
        backend, enforcement = self.face.backend()
        units = sum(1 for unit in self.reconciler.units.values() if unit.configured)
        sd_daemon.notify(False, ready=1, status=f"{units} units with a policy; backend {backend}: {enforcement}")

    def start_watchdog(self) -> None:
        interval = sd_daemon.watchdog_enabled(False)  # microseconds, 0 without WatchdogSec=
        if interval:
            GLib.timeout_add(interval // 2000, self.keep_alive)

    @lasting
    def keep_alive(self) -> None:
        sd_daemon.notify(False, watchdog=1)

    # Units ------------------------------------------------------------------------------------

    def refresh(self, done: Callable[[], None] = lambda: None) -> None:
        """Read everything again; done comes after a round that began no earlier than this call."""
        self._refresh_asked.append(done)
        if not self._refreshing:
            self._begin_refresh()

    def _begin_refresh(self) -> None:
        self._refreshing = True
        waiting, self._refresh_asked = self._refresh_asked, []

        def listed(names: list[str] | None) -> None:
            # PID 1 that does not answer, executed anew for instance, is no reason to forget what it said.
            names = list(self.reconciler.units) if names is None else self.reconciler.with_kept(names)
            self.watch.read_all(names, partial(self._refreshed, waiting, names))

        self.watch.list_units(listed)

    def _refreshed(self, waiting: list[Callable[[], None]], names: list[str], units: list[UnitFacts]) -> None:
        found = {facts.name: facts for facts in units}
        known = {name: self.reconciler.units[name].facts for name in names if name in self.reconciler.units}
        self.reconciler.replace_all(facts for facts in (known | found).values() if facts.exists)
        self._refreshing = False
        if self.face is not None:
            self.face.manager_changed()
        for done in waiting:
            done()
        if self._refresh_asked:
            self._begin_refresh()

    @lasting
    def hangup(self) -> None:
        self.refresh()

    @lasting
    def sweep(self) -> None:
        self.reconciler.sweep()

    def unit_loaded(self, facts: UnitFacts) -> None:
        self.reconciler.load(facts)

    def unit_removed(self, name: str) -> None:
        self.machines.forget(name)
        self.reconciler.unload(name)

    def removed(self, name: str) -> None:
        if self.face is not None:
            self.face.unit_removed(name)

    def machine_changed(self, unit: str) -> None:
        self.reconciler.look_again(unit)

    # Cgroups ----------------------------------------------------------------------------------

    def settled(self, unit: Unit) -> None:
        """Watch a slice for what appears in it, and the files that bind a unit for writes by others."""
        cgroup = unit.facts.cgroup
        if unit.cgroup_id and (unit.decision.action is not None or unit_type(unit.name) == "slice"):
            self.cgroups.add_file(cgroup, POLICY_FILE)
        if unit_type(unit.name) != "slice" or not (unit.cgroup_id or unit.name == ROOT_SLICE):
            return
        self.cgroups.add_file(cgroup, CONTROL_FILE)
        if self.cgroups.add_children(cgroup):
            # What was made before the watch stood.
            for name in self.tree.children(cgroup):
                known = self.reconciler.units.get(unit_of_directory(name))
                if known is None or not known.facts.cgroup:
                    self.reconciler.cgroup_created(cgroup, name)

    @lasting
    def cgroup_changes(self, source: object, condition: object) -> None:
        for change in self.cgroups.read():
            match change:
                case Made(parent, name):
                    self.reconciler.cgroup_created(parent, name)
                case Removed(parent, name):
                    self.cgroups.drop(f"{parent}/{name}")
                    self.reconciler.cgroup_removed(parent, name)
                case Written(cgroup, file) if file == CONTROL_FILE:
                    self.reconciler.controllers_changed(cgroup)
                case Written(cgroup, _):
                    self.reconciler.cgroup_written(cgroup)
                case Overflow():
                    self.refresh()

    # Losses -----------------------------------------------------------------------------------

    def open_losses(self) -> None:
        try:
            self.losses.open()
        except UserError as error:
            journal.log_warning(f"losses are not reported: {error}")
            return
        GLib.io_add_watch(self.losses.fileno(), GLib.PRIORITY_HIGH, GLib.IOCondition.IN, self.losses_waiting)

    @lasting
    def losses_waiting(self, source: object, condition: object) -> None:
        groups: dict[tuple[int, tuple[int, int], int, Action], list[Loss]] = {}
        for loss in self.losses.read():
            groups.setdefault((loss.cgroup_id, loss.device, loss.inode, loss.action), []).append(loss)
        for losses in groups.values():
            self.report(losses)

    def report(self, losses: list[Loss]) -> None:
        """Report pages of one file that a cgroup lost together: one journal record, one signal."""
        first = losses[0]
        owner = self.reconciler.owner(first.cgroup_id) or Owner("", "", "")
        backend, enforcement = self.face.backend() if self.face is not None else ("kernel", "synchronous")
        journal.record_loss(owner.unit, owner.invocation_id, owner.cgroup, first, len(losses), backend, enforcement)
        if self.face is None:
            return
        detail: dict[str, Any] = {
            "Device": GLib.Variant("(uu)", first.device),
            "Inode": GLib.Variant("t", first.inode),
            "Positions": GLib.Variant("at", [loss.position for loss in losses[:POSITIONS_MAX]]),
            "PageFrames": GLib.Variant("at", [loss.pfn for loss in losses[:POSITIONS_MAX]]),
            "InvocationID": GLib.Variant("s", owner.invocation_id),
            "Enforcement": GLib.Variant("s", enforcement),
        }
        self.face.data_lost(owner.unit, owner.cgroup, first.cgroup_id, str(first.action), len(losses), detail)

    # Reports ----------------------------------------------------------------------------------

    def problem(self, unit: str, problem: Problem) -> None:
        journal.warn_problem(unit, problem)

    def interference(self, unit: Unit, found: Action) -> None:
        journal.log_warning(
            f"{unit.name}: somebody changed {POLICY_FILE} to {found}; put back to {unit.decision.action}, once"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; return its exit status."""
    parser = argparse.ArgumentParser(prog="cgpolicyd", description="Map policies of systemd units onto cgroups.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="directory that stands for / (tests)")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    try:
        return Daemon(options.root).run()
    except (UserError, GLib.Error) as error:
        print(f"cgpolicyd: {error}", file=sys.stderr)
        return 1

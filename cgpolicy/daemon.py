# SPDX-License-Identifier: LGPL-2.1-or-later
"""cgpolicyd: wires the parts together and runs them in one GLib main loop."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pydbus
from gi.repository import GLib

from cgpolicy import __version__, buscall, enforcement, journal
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
    is_of_slices,
    unit_cgroup,
    unit_of_directory,
)
from cgpolicy.client import NAME
from cgpolicy.enforcement import Enforcement
from cgpolicy.enforcer import Armed, Ended, Enforcer, Fault, Missed, Unarmed
from cgpolicy.error import UserError
from cgpolicy.heap import give_back_memory
from cgpolicy.libsystemd import part
from cgpolicy.losses import FileLoss, LossReader, by_file
from cgpolicy.losstally import WINDOW, LossTally
from cgpolicy.machined import MachineWatch
from cgpolicy.policyfile import PolicyFiles
from cgpolicy.polkit import Authority
from cgpolicy.reconciler import Owner, Reconciler, Unit
from cgpolicy.systemd import UnitFacts
from cgpolicy.systemd_watch import SystemdWatch
from cgpolicy.unitfile import Problem
from cgpolicy.unitname import ROOT_SLICE, unit_type
from cgpolicy.urgency import Urgency

sd_daemon = part("daemon")

SWEEP_SECONDS = 600
INVOCATION_MS = 50  # until systemd has noted a new run's InvocationID on its cgroup
CHECK_SECONDS = 2 * WINDOW
SOON = (GLib.PRIORITY_HIGH + GLib.PRIORITY_DEFAULT) // 2  # after new cgroups, before the bus


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
        self.losses = LossReader(root / "sys/kernel/tracing")
        self.face: BusFace | None = None
        self.enforcer: Enforcer | None = None
        self.enforcement = enforcement.KERNEL
        self.tree = self.choose_backend(root)
        self.files = PolicyFiles(root)
        self.cgroups = CgroupWatch(self.tree)
        self.urgency = Urgency(self.cgroups.fileno())
        self._written: dict[Written, None] = {}
        self.watch = SystemdWatch(
            self.bus, loaded=self.unit_loaded, removed=self.unit_removed, reloads=self.systemd_reloads,
            refresh=self.refresh,
        )
        self.machines = MachineWatch(self.bus, self.machine_changed)
        self.reconciler = Reconciler(
            self.tree, self.files, machine_uuid=self.machines.uuid, machine_registered=self.machines.name
        )
        self.tally = LossTally(self.report)
        self._flushing = False
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
        self.urgency.start()
        self.open_losses()
        self.watch.start()
        self.machines.start()
        self.refresh(self.publish)
        GLib.timeout_add_seconds(SWEEP_SECONDS, self.sweep)
        self.start_watchdog()
        self.loop.run()
        sd_daemon.notify(False, stopping=1)
        if self.face is not None:
            self.face.close()
        # What the kernel was told stays in force; only the private tracing instance goes.
        self.losses.close()
        if self.enforcer is not None:
            self.enforcer.stop()
        return self.status

    def choose_backend(self, root: Path) -> CgroupTree:
        """Return the kernel's own files where it has them, else a table of policies enforced as well as can be."""
        tree = CgroupTree(root / "sys/fs/cgroup", root / "run/systemd/units")
        if tree.is_supported() or self.losses.is_supported():
            return tree
        enforcer = Enforcer(root)
        try:
            armed = enforcer.start()
        except UserError as error:
            self.enforcement = enforcement.none(str(error))
            journal.log_warning(f"policies are not enforced: {error}")
            return tree
        self.enforcer = enforcer
        self.armed(armed)
        return enforcer.table

    def publish(self) -> None:
        """Go on the bus, the first picture being complete and applied."""
        authority = Authority(self.bus.con)
        self.face = BusFace(
            self.bus, self.reconciler, self.watch, authority, self.files, self.refresh, self.strength
        )
        self.reconciler.reports.changed = self.face.unit_changed
        self.reconciler.reports.removed = self.removed
        try:
            self.bus.request_name(NAME)
        except RuntimeError as error:
            self.fail(f"cannot own {NAME} on the bus: {error}")
            return
        self.notify_ready()
        # Not before it is known whose cgroups there are: what came meanwhile, or before a predecessor was killed,
        # waits in the trace buffer.
        if self.losses.fileno() >= 0:
            GLib.io_add_watch(self.losses.fileno(), GLib.PRIORITY_HIGH, GLib.IOCondition.IN, self.losses_waiting)
        self.cross_check()

    def fail(self, message: str) -> None:
        journal.log_error(message)
        self.status = 1
        self.loop.quit()

    def strength(self) -> Enforcement:
        """Return what can be promised now."""
        if self.enforcement is enforcement.KERNEL and not self.reconciler.supported:
            return enforcement.none("no control group has the memory controller")
        return self.enforcement

    def notify_ready(self) -> None:
        units = sum(1 for unit in self.reconciler.units.values() if unit.configured)
        how = f"backend {self.strength().backend}: {self.strength().strength}"
        sd_daemon.notify(False, ready=1, status=f"{units} units with a policy; {how}")

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

        def listed(loaded: dict[str, str] | None) -> None:
            give_back_memory()
            # PID 1 that does not answer, executed anew for instance, is no reason to forget what it said.
            if loaded is None:
                loaded = dict.fromkeys(self.reconciler.units, "")
            else:
                loaded |= dict.fromkeys(self.reconciler.kept(loaded), "")
            done = partial(self._refreshed, waiting, list(loaded))
            self.watch.read_all(loaded, done if self.face is not None else partial(self._complete, done))

        self.reconciler.picture_begun()
        self.watch.list_units(listed)

    def _complete(self, done: Callable[[list[UnitFacts]], None], units: list[UnitFacts]) -> None:
        """Go on when it is known which drop-ins this daemon's predecessor wrote without PID 1 having read them.

        It was killed before it could ask for a reload, or told not to.
        """
        files = {facts.name: facts.files for facts in units}
        written = {unit: path for unit, path in self.files.written_units() if path not in files.get(unit, (path,))}

        def told(outdated: set[str]) -> None:
            for unit in outdated:
                self.reconciler.expect_drop_in(unit, written[unit])
            done(units)

        self.watch.outdated(list(written), told)

    def _refreshed(self, waiting: list[Callable[[], None]], names: list[str], units: list[UnitFacts]) -> None:
        cgroups = self.tree.units()
        found = {facts.name for facts in units}
        for name in names:
            if name not in found and name in self.reconciler.units:
                units.append(self.reconciler.units[name].facts)
        running = (
            replace(facts, cgroup=cgroups[facts.name]) if facts.name in cgroups and facts.name in found else facts
            for facts in units
        )
        try:
            self.reconciler.replace_all(facts for facts in running if facts.exists)
        finally:
            # Whatever went wrong, the next round begins anew, and whoever waits for this one is answered.
            self._refreshing = False
            give_back_memory()  # before there is more to keep, which would lie above it
            if self.face is not None:
                self.face.manager_changed()
            for done in waiting:
                done()
            give_back_memory()
            if self._refresh_asked:
                self._begin_refresh()

    @lasting
    def hangup(self) -> None:
        self.refresh()

    @lasting
    def sweep(self) -> None:
        self.reconciler.sweep()
        self.cross_check()

    def unit_loaded(self, facts: UnitFacts) -> None:
        self.reconciler.load(facts)

    def systemd_reloads(self, begins: bool) -> None:
        if begins:
            self.reconciler.systemd_reloads()
        else:
            self.reconciler.systemd_reloaded()

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
            if unit_type(unit.name) != "slice":
                self.watch_below(unit.name, cgroup, cgroup)
        if unit_type(unit.name) != "slice" or not (unit.cgroup_id or unit.name == ROOT_SLICE):
            return
        self.cgroups.add_file(cgroup, CONTROL_FILE)
        if self.cgroups.add_children(cgroup):
            # What was made before the watch stood.
            for name in self.tree.children(cgroup):
                known = self.reconciler.units.get(unit_of_directory(name))
                if known is None or not known.facts.cgroup:
                    self.reconciler.cgroup_created(cgroup, name)

    def watch_below(self, unit: str, own: str, cgroup: str) -> None:
        """Learn of the cgroups below a unit's: kill takes them away before a loss of theirs is read."""
        if self.cgroups.add_children(cgroup):
            for name in self.tree.children(cgroup):
                self.reconciler.remember(unit, own, f"{cgroup}/{name}")
                self.watch_below(unit, own, f"{cgroup}/{name}")

    def made(self, parent: str, name: str) -> None:
        cgroup = f"{parent}/{name}"
        if is_of_slices(parent):
            self.reconciler.cgroup_created(parent, name)
            unit = unit_of_directory(name)

            def again() -> bool:
                self.reconciler.remember(unit, cgroup)
                return False  # who has no InvocationID now has none: not every cgroup here is systemd's

            if not self.reconciler.remember(unit, cgroup):
                buscall.after(INVOCATION_MS, again)
            return
        own = unit_cgroup(cgroup)
        unit = unit_of_directory(own.rpartition("/")[2])
        self.reconciler.remember(unit, own, cgroup)
        self.watch_below(unit, own, cgroup)

    @lasting
    def cgroup_changes(self, source: object, condition: object) -> None:
        for change in self.cgroups.read():
            match change:
                case Made(parent, name):
                    self.made(parent, name)
                case Removed(parent, name):
                    self.cgroups.drop(f"{parent}/{name}")
                    if is_of_slices(parent):
                        self.reconciler.cgroup_removed(parent, name)
                case Written():
                    # Later and once: systemd writes each slice's controllers several times at every start, and what
                    # has just been made cannot wait for a look at all that was there before.
                    if not self._written:
                        buscall.after(0, self.look_at_written, SOON)
                    self._written[change] = None
                case Overflow():
                    self.refresh()

    def look_at_written(self) -> bool:
        """Look at one file that was written; tell whether there are more."""
        change = next(iter(self._written))
        try:
            if change.file == CONTROL_FILE:
                self.reconciler.controllers_changed(change.cgroup)
            else:
                self.reconciler.cgroup_written(change.cgroup)
        except Exception:
            sys.excepthook(*sys.exc_info())
        del self._written[change]
        return bool(self._written)

    # Losses -----------------------------------------------------------------------------------

    def open_losses(self) -> None:
        if self.enforcer is not None:
            GLib.io_add_watch(self.enforcer.fileno(), GLib.PRIORITY_HIGH, GLib.IOCondition.IN, self.enforcer_says)
            return
        try:
            self.losses.open()
        except UserError as error:
            journal.log_warning(f"losses are not reported: {error}")

    @lasting
    def losses_waiting(self, source: object, condition: object) -> None:
        for loss in by_file(self.losses.read()):
            self.lost(loss)
        if self.losses.dropped:
            self.losses.dropped = 0
            self.cross_check()

    @lasting
    def enforcer_says(self, source: object, condition: object) -> None:
        assert self.enforcer is not None
        try:
            for said in self.enforcer.read():
                match said:
                    case Armed():
                        self.armed(said)
                    case Unarmed(reason):
                        self.unarmed(reason)
                    case Fault(text):
                        journal.log_warning(f"somebody has meddled with the probes: {text}; placing them anew")
                    case Missed(events):
                        journal.log_warning(f"{events} events were lost: policies may not have been enforced")
                    case FileLoss():
                        self.lost(said)
        except Ended as error:
            # systemd starts this program again, and that the reactor: one way for every fault.
            self.fail(str(error))

    def armed(self, armed: Armed) -> None:
        """Say what is watched."""
        assert self.enforcer is not None
        self.enforcer.table.can_panic = armed.can_panic
        detail = ", ".join((f"watches {' '.join(armed.paths)}", *armed.refused))
        self.enforced(enforcement.late(detail))

    def unarmed(self, reason: str) -> None:
        if reason != self.enforcement.detail:
            journal.log_warning(f"policies are not enforced: {reason}")
        self.enforced(enforcement.none(reason))

    def enforced(self, now: Enforcement) -> None:
        """Take note of what the enforcer can do, and have the units' states say so."""
        assert self.enforcer is not None
        before, self.enforcement = self.enforcement, now
        self.enforcer.table.enforced = now.backend == "tracefs"
        if self.face is not None and now != before:
            self.reconciler.sweep()
            self.face.manager_changed()

    def lost(self, loss: FileLoss) -> None:
        """Take pages of one file that a cgroup lost together."""
        self.tally.add(self.reconciler.owner(loss.lineage) or Owner("", "", ""), loss, time.monotonic())
        if not self._flushing:
            self._flushing = True
            buscall.after(int(WINDOW * 1000), self.flush)

    def flush(self) -> bool:
        try:
            self._flushing = self.tally.flush(time.monotonic())
        except Exception:
            sys.excepthook(*sys.exc_info())
        return self._flushing

    def report(self, owner: Owner, loss: FileLoss) -> None:
        """Report losses of one run of a unit: one journal record, one signal."""
        how = self.strength()
        unit = self.reconciler.units.get(owner.unit)
        if unit is not None and self.enforcer is not None:
            self.enforcer.table.count(unit.facts.cgroup, loss.pages, loss.kills)
        elif unit is not None and owner.invocation_id in ("", self.tree.invocation_id(unit.facts.cgroup)):
            self.tree.add_told(unit.facts.cgroup, loss.pages)
        journal.record_loss(owner.unit, owner.invocation_id, owner.cgroup, loss, how.backend, how.strength)
        detail: dict[str, Any] = {
            "Device": GLib.Variant("(uu)", loss.device),
            "Inode": GLib.Variant("t", loss.inode),
            "Positions": GLib.Variant("at", loss.positions),
            "PageFrames": GLib.Variant("at", loss.pfns),
            "InvocationID": GLib.Variant("s", owner.invocation_id),
            "Enforcement": GLib.Variant("s", how.strength),
            "Reaction": GLib.Variant("s", loss.reaction),
        }
        if loss.files > 1:
            detail["Files"] = GLib.Variant("t", loss.files)
        self.announce(owner.unit, owner.cgroup, loss.cgroup_id, loss.action, loss.pages, detail)

    def cross_check(self) -> None:
        """Compare what was reported with the kernel's counters, and report what is missing."""
        if self.enforcer is not None:
            return  # which counts itself what it sees
        counted = self.tree.lost()
        if counted:
            # Reports of what is counted already have been read by then.
            buscall.after(int(CHECK_SECONDS * 1000), partial(self._checked, counted))

    def _checked(self, counted: dict[str, int]) -> bool:
        how = self.strength()
        for unit in list(self.reconciler.units.values()):
            pages = counted.get(unit.facts.cgroup, 0)
            missing = pages - self.tree.told(unit.facts.cgroup) if pages else 0
            if missing > 0:
                self.tree.add_told(unit.facts.cgroup, missing)
                invocation = self.tree.invocation_id(unit.facts.cgroup)
                journal.record_unseen(
                    unit.name, invocation, unit.facts.cgroup, missing, how.backend, how.strength
                )
                self.announce(unit.name, unit.facts.cgroup, unit.cgroup_id, unit.effective.action, missing, {
                    "InvocationID": GLib.Variant("s", invocation),
                    "Enforcement": GLib.Variant("s", how.strength),
                })
        return False

    def announce(
        self, unit: str, cgroup: str, cgroup_id: int, action: Action, pages: int, detail: dict[str, Any]
    ) -> None:
        if self.face is not None:
            self.face.data_lost(unit, cgroup, cgroup_id, str(action), pages, detail)

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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command cgpolicy. Modules are imported where they are used: apply holds up a service's start."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cgpolicy import __version__
from cgpolicy.action import Action
from cgpolicy.error import InvalidAction, InvalidMachineName, InvalidUnitName, NoSuchUnit, UserError
from cgpolicy.unitname import mangle

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_SUCH_UNIT = 4


class Output:
    """Where results go: plain or JSON, through a pager if a person reads them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.as_json: bool = options.json
        self.quiet: bool = options.quiet
        self.terminal = sys.stdout.isatty()
        self.pager = self.terminal and not options.no_pager and not self.as_json
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def show(self, value: Any, render: Callable[[], str]) -> None:
        """Print a value as JSON, or as render() puts it for people."""
        if self.as_json:
            print(json.dumps(value, indent=None if not self.terminal else 2))
            return
        text = render()
        pager = os.environ.get("PAGER", "less")
        if not self.pager or pager in ("", "cat"):
            print(text)
            return
        # As systemctl: quit if it fits on a screen, keep colours.
        environment = {"LESS": "FRSXMK", **os.environ}
        try:
            subprocess.run(["/bin/sh", "-c", pager], input=text + "\n", text=True, env=environment, check=False)
        except OSError:
            print(text)

    def say(self, text: str) -> None:
        """Tell what was done, unless told to be quiet."""
        if not self.quiet and not self.as_json:
            print(text)


def status(options: argparse.Namespace, output: Output) -> int:
    """Show what happens to each unit if its data is lost, where that was decided, and how strong it is."""
    from cgpolicy.client import Client
    from cgpolicy.status import Paint, of_interest, render_status

    client = Client()
    manager, rows = client.manager(), client.units()
    names = [row.unit for row in rows if options.all or of_interest(row)]
    units = []
    for name in names:
        try:
            units.append(client.unit(name))
        except NoSuchUnit:  # unloaded since
            continue
    others = len(rows) - len(names)
    output.show(
        {**manager, "Units": units, "NOthers": others},
        lambda: render_status(manager, units, others, Paint(output.colour)),
    )
    return EXIT_FAILED if manager["NFailed"] else 0


def list_units(options: argparse.Namespace, output: Output) -> int:
    """List units as a table."""
    from cgpolicy.client import Client
    from cgpolicy.status import Paint, of_interest, table

    rows = Client().units(options.pattern)
    if not options.pattern and not options.all:
        rows = [row for row in rows if of_interest(row)]
    heads = ("unit", "configured", "source", "effective", "state")
    cells = [tuple(str(getattr(row, head)) or "-" for head in heads) for row in rows]
    output.show(
        [{head: getattr(row, head) for head in heads} for row in rows],
        lambda: "\n".join(table([head.upper() for head in heads], cells, Paint(output.colour))),
    )
    return 0


def show(options: argparse.Namespace, output: Output) -> int:
    """Show everything known of units."""
    from cgpolicy.client import Client
    from cgpolicy.status import render_unit

    client = Client()
    manager = client.manager()
    units = [client.unit(mangle(name)) for name in options.unit]
    output.show(units, lambda: "\n\n".join(render_unit(unit, manager) for unit in units))
    return 0


def explain(options: argparse.Namespace, output: Output) -> int:
    """Show each place that was looked at for a unit's policy, and why it won or lost."""
    from cgpolicy.client import Client
    from cgpolicy.status import Paint, table

    name = mangle(options.unit)
    client = Client()
    rows = client.explain(name)
    unit = client.unit(name)

    def render() -> str:
        head = f"{name}: {unit['MemoryFailureDirtyAction'] or 'nothing configured'}, state {unit['State']}"
        if not rows:
            return f"{head}\nno file of the unit, its machine or its slices has [X-CgPolicy] MemoryFailureDirtyAction="
        heads = ("SOURCE", "WHERE", "VALUE", "VERDICT")
        cells = [
            (row.kind, f"{row.path}:{row.line}" if row.line else row.path, row.value or "-", row.verdict)
            for row in rows
        ]
        return "\n".join([head, *table(heads, cells, Paint(output.colour))])

    heads = ("kind", "path", "line", "value", "verdict")
    output.show([{head: getattr(row, head) for head in heads} for row in rows], render)
    return 0


def set_policy(options: argparse.Namespace, output: Output) -> int:
    """Write a policy and apply it at once."""
    from cgpolicy.client import NO_RELOAD, Client

    if options.machine:
        refuse_unit_options(options)
        Client().set_machine(options.machine, options.action)
        output.say(f"machine {options.machine}: {options.action}")
        return 0
    name = unit_argument(options)
    client = Client()
    client.set_unit(name, options.action, runtime=options.runtime, flags=NO_RELOAD if options.no_reload else 0)
    report(client, name, output)
    return 0


def unset_policy(options: argparse.Namespace, output: Output) -> int:
    """Remove the policy that set wrote."""
    from cgpolicy.client import NO_RELOAD, Client

    if options.machine:
        refuse_unit_options(options)
        Client().unset_machine(options.machine)
        output.say(f"machine {options.machine}: nothing configured")
        return 0
    name = unit_argument(options)
    client = Client()
    client.unset_unit(name, runtime=options.runtime, flags=NO_RELOAD if options.no_reload else 0)
    report(client, name, output)
    return 0


def report(client: Any, name: str, output: Output) -> None:
    """Tell what a change has come to, which is not always what was asked for."""
    from cgpolicy.status import decided_by, outcome

    if output.quiet:
        return
    unit, manager = client.unit(name), client.manager()
    if output.as_json:
        print(json.dumps(unit))
        return
    print(f"{name}: {outcome(unit)}; {decided_by(unit)}; {unit['State']}; enforcement {manager['Enforcement']}")
    if unit["LastError"]:
        print(f"{name}: {unit['LastError']}", file=sys.stderr)


class Usage(UserError):
    """The command line makes no sense."""


def unit_argument(options: argparse.Namespace) -> str:
    if not options.unit:
        raise Usage(f"{options.command} needs a UNIT or --machine NAME")
    return mangle(options.unit)


def refuse_unit_options(options: argparse.Namespace) -> None:
    if options.unit or options.runtime or options.no_reload:
        raise Usage("--machine goes with no UNIT, --runtime or --no-reload: a machine's rule is a file in /etc")


def monitor(options: argparse.Namespace, output: Output) -> int:
    """Print losses and changes as they happen."""
    from cgpolicy.client import Client

    names = {
        "UnitPolicyChanged": ("unit", "configured", "effective", "state"),
        "DirtyDataLost": ("unit", "cgroup", "cgroup_id", "action", "pages", "detail"),
    }

    def seen(signal: str, values: tuple[Any, ...]) -> None:
        if signal not in names:
            return
        fields = dict(zip(names[signal], values, strict=True))
        if output.as_json:
            print(json.dumps({"signal": signal, **fields}), flush=True)
        else:
            print(f"{signal}: {' '.join(f'{key}={value}' for key, value in fields.items())}", flush=True)

    try:
        Client().monitor(seen)
    except KeyboardInterrupt:
        return 0
    return 0


def verify(options: argparse.Namespace, output: Output) -> int:
    """Check the [X-CgPolicy] sections of files, or of all loaded units."""
    from cgpolicy.setting import read_setting
    from cgpolicy.systemd import SystemdManager
    from cgpolicy.unitfile import Problem

    if options.file:
        files = [str(path) for path in options.file]
    else:
        systemd = SystemdManager()
        files = sorted({file for _, paths in systemd.unit_files_of_all() for file in paths})
        systemd.close()
    problems: list[Problem] = []
    for file in files:
        try:
            problems += read_setting([(file, Path(file).read_bytes())]).problems
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}", hint="nothing was checked after it") from None
    output.show(
        [{"path": problem.path, "line": problem.line, "message": problem.message} for problem in problems],
        lambda: "\n".join(map(str, problems)) or f"{len(files)} files, no problem",
    )
    return EXIT_FAILED if problems else 0


def apply(options: argparse.Namespace, output: Output) -> int:
    """Apply a unit's policy without the daemon, and fail unless it then stands."""
    from cgpolicy.offline import apply as apply_unit

    applied = apply_unit(mangle(options.unit))
    if applied.action is None:
        output.say(f"{applied.unit}: nothing configured")
    else:
        decision = applied.decision
        output.say(f"{applied.unit}: {applied.action}, from {decision.path}:{decision.line}, is in force")
    return 0


def doctor(options: argparse.Namespace, output: Output) -> int:
    """Check everything that a policy needs to be enforced, and name the cure for what is missing."""
    from cgpolicy.doctor import examine

    findings = examine()

    def render() -> str:
        lines = []
        for finding in findings:
            lines.append(f"{'ok' if finding.good else 'problem':8}{finding.what}: {finding.found}")
            if not finding.good:
                lines.append(f"{'':8}{finding.cure}")
        return "\n".join(lines)

    output.show(
        [{"what": each.what, "good": each.good, "found": each.found, "cure": each.cure} for each in findings], render
    )
    return 0 if all(finding.good for finding in findings) else EXIT_FAILED


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    main = argparse.ArgumentParser(
        prog="cgpolicy",
        description="What happens to systemd units when their dirty page cache is lost to a memory error.",
        epilog="Exit status: 0 done, 1 failed, 2 usage, 4 no such unit. See cgpolicy(1).",
    )
    output_options(main, default=False)
    main.add_argument("--version", action="version", version=f"cgpolicy {__version__}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace, Output], int]) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").rstrip(".")
        added = commands.add_parser(name, help=text[0].lower() + text[1:], description=f"{text}.")
        output_options(added, default=argparse.SUPPRESS)  # not to undo what stands before the command
        added.set_defaults(function=function)
        return added

    added = command("status", status)
    added.add_argument("--all", action="store_true", help="also units that have nothing configured")
    added = command("list", list_units)
    added.add_argument("--all", action="store_true", help="also units that have nothing configured")
    added.add_argument("pattern", nargs="*", metavar="PATTERN", help="shell patterns of unit names")
    added = command("show", show)
    added.add_argument("unit", nargs="+", metavar="UNIT")
    added = command("explain", explain)
    added.add_argument("unit", metavar="UNIT")
    added = command("set", set_policy)
    unit_or_machine(added)
    words = [action.value for action in Action]
    added.add_argument("action", metavar="ACTION", choices=words, help="panic, kill or continue")
    unit_or_machine(command("unset", unset_policy))
    command("monitor", monitor)
    added = command("verify", verify)
    added.add_argument("file", nargs="*", type=Path, metavar="FILE")
    added = command("apply", apply)
    added.add_argument("unit", metavar="UNIT")
    command("doctor", doctor)
    return main


def output_options(added: argparse.ArgumentParser, default: Any) -> None:
    added.add_argument("--json", action="store_true", default=default, help="print JSON")
    added.add_argument("--no-pager", action="store_true", default=default, help="do not start a pager")
    added.add_argument("-q", "--quiet", action="store_true", default=default, help="do not say what was done")


def unit_or_machine(added: argparse.ArgumentParser) -> None:
    added.add_argument("unit", nargs="?", metavar="UNIT")
    added.add_argument("--machine", metavar="NAME", help="a virtual machine's name or UUID instead of a unit")
    added.add_argument("--runtime", action="store_true", help="until the next boot only")
    added.add_argument("--no-reload", action="store_true", help="do not ask systemd to reload")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    if options.command is None:
        options = parser().parse_args([*words, "status"])
    try:
        status: int = options.function(options, Output(options))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"cgpolicy: {error}", file=sys.stderr)
        if isinstance(error, NoSuchUnit):
            return EXIT_NO_SUCH_UNIT
        usage = (Usage, InvalidAction, InvalidUnitName, InvalidMachineName)
        return EXIT_USAGE if isinstance(error, usage) else EXIT_FAILED
    except BrokenPipeError:
        # The reader went away, as head does; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130

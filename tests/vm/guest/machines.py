# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain of libvirt, started under one number after another; print what policy each run has, and lose its data."""

from __future__ import annotations

from pathlib import Path

from tests.vm.guest.cases import BUS, PATH, properties
from tests.vm.guest.scene import becomes, main_pid, must, run, setting, tell, wait_for, write
from tests.vm.guest.storm import LOSS_ID, PAGE, after_bus_restart, begin, page_frames, poison, records

NAME = "web01"
UUID = "f7f2a1d0-0c51-4b9e-9d0b-9a8a3c1f2e4d"
OFFSET = 1 << 19  # what the firmware reads, the beginning, is charged to the first run
DISK = Path("/var/lib/libvirt/images/web01.img")
DOMAIN = f"""<domain type='qemu'>
  <name>{NAME}</name>
  <uuid>{UUID}</uuid>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='writeback'/>
      <source file='{DISK}'/>
      <target dev='vda' bus='virtio'/>
      <shareable/>
    </disk>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def rule(machine: str, action: str) -> None:
    must("busctl", "call", BUS, PATH, f"{BUS}.Manager", "SetMachinePolicy", "sst", machine, action, "0")


def start(step: str, wanted: str) -> str:
    """Start the domain; tell its scope's policy, and return the scope's name."""
    must("virsh", "start", NAME)
    scopes = must("systemctl", "list-units", "--plain", "--no-legend", "--type=scope", r"machine-qemu*").split()
    scope = next(word for word in scopes if word.endswith(".scope"))
    value = becomes(scope, wanted)
    wait_for(lambda: properties(scope)["MemoryFailureDirtyAction"] == wanted)
    tell(step=step, scope=scope, value=value, **properties(scope))
    return scope


def stop(scope: str) -> None:
    must("virsh", "destroy", NAME)
    wait_for(lambda: run("systemctl", "is-active", "--quiet", scope)[0] != 0)


def lose(scope: str) -> None:
    """Have QEMU write to its disk as its guest would, and lose that."""
    invocation = must("systemctl", "show", "-P", "InvocationID", scope).strip()
    # By the node (shareable, or QEMU refuses) and not by the device, which without a guest's driver writes through.
    nodes = must("virsh", "qemu-monitor-command", NAME, '{"execute": "query-named-block-nodes"}')
    node = "libvirt-1-format" if "libvirt-1-format" in nodes else "libvirt-1-storage"
    said = must("virsh", "qemu-monitor-command", NAME, "--hmp", f'qemu-io {node} "write -P 7 {OFFSET} 16k"')
    if said.strip():
        raise SystemExit(f"qemu-io: {said}")  # its status is 0 all the same; what was written is said elsewhere
    poison(page_frames(DISK)[OFFSET // PAGE :][:1])
    wait_for(lambda: must("virsh", "domstate", NAME).strip() == "shut off")
    wait_for(lambda: len(records(scope, LOSS_ID)) > 0)
    (record,) = records(scope, LOSS_ID)
    tell(
        step="lost", state=must("virsh", "domstate", NAME).strip(), cgroup=record.get("CGPOLICY_CGROUP", ""),
        action=record["CGPOLICY_ACTION"], invocation=[record.get("INVOCATION_ID", ""), invocation],
    )


def broker() -> None:
    """Restart the bus once more: in this guest it is dbus-broker's."""
    before = main_pid("cgpolicyd")
    must("systemctl", "restart", "dbus.service")
    write(Path("/etc/systemd/system/noise.service"), "[Service]\nExecStart=/bin/sleep infinity\n" + setting("kill"))
    must("systemctl", "daemon-reload")
    must("systemctl", "start", "noise.service")
    after = becomes("noise.service", "kill")
    wait_for(lambda: run("busctl", "status", BUS)[0] == 0)
    unit = must("systemctl", "show", "-P", "Id", "dbus.service").strip()
    tell(step="broker", unit=unit, after=after, again=main_pid("cgpolicyd") != before)


def main() -> None:
    begin()
    DISK.parent.mkdir(parents=True, exist_ok=True)
    with open(DISK, "wb") as file:
        file.truncate(1 << 20)
    write(Path("/run/web01.xml"), DOMAIN)
    must("systemctl", "start", "libvirtd.service")
    must("virsh", "define", "/run/web01.xml")
    rule(NAME, "kill")
    stop(start("first", "kill"))
    stop(start("second", "kill"))
    rule(NAME, "continue")
    rule(UUID, "kill")
    lose(start("by uuid", "kill"))
    broker()
    after_bus_restart("again")


main()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's root file system: a small Debian with systemd, cached as a pristine ext4 image."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vm import debian
from vm.host import cache_dir, content_hash, install_packages, locked, progress, run, scratch_dir

HOST_PACKAGES = ("mmdebstrap", "e2fsprogs")
GUEST_FILES = Path(__file__).parent / "guest"

PACKAGES = (
    "dbus",
    "kmod",
    "polkitd",
    "procps",
    "python3",
    "python3-gi",
    "python3-pydbus",
    "python3-pystemd",
    "systemd",
    "systemd-sysv",
    "udev",
)

# Where the guest keeps what belongs to the machine and not to Debian or cgpolicy.
GUEST_LIBRARY = "usr/local/lib/cgpolicy-vm"

# Units that only cost time in a machine that lives for one command; each would run on a Debian host.
MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "getty.target",
    "ldconfig.service",
    "modprobe@.service",
    "remote-fs.target",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
)

# Debian's own documentation and translations: never read in the guest.
UNREAD = (
    "usr/share/doc/*",
    "usr/share/locale/*",
    "usr/share/man/*",
    "var/cache/apt/*",
    "var/lib/apt/lists/*",
)

SIZE = "3G"  # sparse; room for tests that write files

# Replaces the coldplug of every device: only block devices, so that systemd knows its .device units.
UDEV_TRIGGER = """\
[Service]
ExecStart=
ExecStart=-/usr/bin/udevadm trigger --action=add --subsystem-match=block
"""
JOURNALD = "[Journal]\nStorage=volatile\n"


def image(suite: str, extra_packages: Sequence[str] = ()) -> Path:
    """Return the path of the ext4 image of a suite with extra Debian packages, built if it is not cached."""
    packages = sorted({*PACKAGES, *extra_packages})
    key = content_hash(Path(__file__), GUEST_FILES / "init", suite, *packages)
    path = cache_dir("images") / f"{suite}-{key}.ext4"
    if path.exists():
        return path
    install_packages(HOST_PACKAGES)
    with locked(path.name):
        if not path.exists():
            build(path, suite, packages)
    return path


def build(path: Path, suite: str, packages: Sequence[str]) -> None:
    """Debootstrap the suite and write it as an image, renamed into place when it is complete."""
    log = path.with_name(f"{path.name}.log")
    progress(f"building the Debian {suite} image (about a minute; log: {log})")
    with scratch_dir("image") as scratch:
        root = scratch / "root"
        apt_options = [
            f'--aptopt={name} "{value}"'
            for name, _, value in (option.partition("=") for option in debian.acquire_options())
        ]
        run(
            [
                "mmdebstrap",
                "--variant=minbase",
                f"--keyring={debian.keyring()}",
                f"--include={','.join(packages)}",
                *apt_options,
                suite,
                root,
                "-",
            ],
            log=log,
            stdin=debian.sources(suite),
            hint=f"is every package of --packages in Debian {suite}? see {log}",
        )
        configure(root)
        complete = scratch / "complete.ext4"
        run(
            [
                "mke2fs",
                "-q",
                "-F",
                "-t",
                "ext4",
                "-O",
                "^metadata_csum_seed,^orphan_file",
                "-m",
                "0",
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1",
                "-d",
                root,
                complete,
                SIZE,
            ],
            log=log,
        )
        complete.rename(path)


def configure(root: Path) -> None:
    """Turn a Debian root directory into one that boots fast and unpacks a payload before systemd starts."""
    for pattern in UNREAD:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    units = root / "etc/systemd/system"
    for unit in MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    write(units / "systemd-udev-trigger.service.d/vm.conf", UDEV_TRIGGER)
    write(root / "etc/systemd/journald.conf.d/vm.conf", JOURNALD)
    write(root / "etc/hostname", "cgpolicy-vm\n")
    write(root / "etc/hosts", "127.0.0.1 localhost cgpolicy-vm\n::1 localhost\n")
    write(root / "etc/machine-id", f"{content_hash('cgpolicy-vm') * 2}\n")
    write(root / "etc/fstab", "")
    (units / "default.target").unlink(missing_ok=True)
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    for stamp in ("etc/.updated", "var/.updated"):
        (root / stamp).touch()
    (root / "mnt/share").mkdir()
    shutil.copy(GUEST_FILES / "init", write(root / GUEST_LIBRARY / "init", ""))
    (root / GUEST_LIBRARY / "init").chmod(0o755)


def write(path: Path, text: str) -> Path:
    """Write a text file, making its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

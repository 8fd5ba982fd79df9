# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's archive as this host reaches it: mirrors taken from apt's own configuration at run time."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

from vm.host import HarnessError, cache_dir, install_packages, locked, output, progress, run

SUITES = ("trixie", "bookworm")  # releases, of which the guest is one

# Kernel series, and the suites that have a kernel of it. The last one's move on to the next series some day.
BASES = {
    "v6.1": ("bookworm",),
    "v6.12": ("trixie",),
    "v7": ("trixie-backports", "forky", "sid"),
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# How this host fetches (proxies, certificates, a frozen archive): holds for other suites too.
ACQUIRE_OPTIONS = re.compile(r"Acquire::(https?::|Check-|Retries|ForceIPv|Max-FutureTime)")


@functools.cache
def mirrors() -> tuple[str, str | None]:
    """Return the URIs of the Debian archive and, if configured, of its security archive.

    apt itself parses its sources (one-line and deb822, sources.list(5)); other vendors' repositories
    are told apart by the Origin field of their Release files.
    """
    found = read_mirrors()
    if "Debian" not in found:
        run(["apt-get", "update"], log=cache_dir("log") / "apt.log")
        found = read_mirrors()
    if "Debian" not in found:
        raise HarnessError("apt is configured with no Debian archive", hint="add one to /etc/apt/sources.list.d")
    return found["Debian"], found.get("Debian-Security")


def read_mirrors() -> dict[str, str]:
    """Map the label of each of Debian's own archives in apt's configuration to its first URI."""
    rows = output(["apt-get", "indextargets", "--format", "$(CREATED_BY)|$(ORIGIN)|$(LABEL)|$(REPO_URI)"])
    found: dict[str, str] = {}
    for row in rows.splitlines():
        created_by, origin, label, uri = row.split("|", 3)
        if created_by == "Packages" and origin == "Debian":
            found.setdefault(label, uri)
    return found


def sources(suite: str) -> str:
    """Return sources.list(5) lines for a suite; a release's come with its updates and security archive."""
    archive, security = mirrors()
    lines = [f"deb {archive} {suite} main"]
    if suite in SUITES:
        lines.append(f"deb {archive} {suite}-updates main")
        if security:
            lines.append(f"deb {security} {suite}-security main")
    return "".join(f"{line}\n" for line in lines)


def acquire_options() -> list[str]:
    """Return this host's apt options on fetching, each as Name=Value."""
    options = []
    for line in output(["apt-config", "dump"]).splitlines():
        name, _, value = line.rstrip(";").partition(" ")
        if ACQUIRE_OPTIONS.match(name) and value.strip('"'):
            options.append(f"{name}={value.strip(chr(34))}")
    return options


def keyring() -> Path:
    """Return the archive's keyring, one that knows the newest suite."""
    if not (KEYRING.parent / f"debian-archive-{SUITES[0]}-stable.gpg").exists() or not KEYRING.exists():
        install_packages(["debian-archive-keyring"])
    return KEYRING


class Renewed(HarnessError):
    """The mirror no longer has a version that we knew of; the lists are new now: look it up again."""


class Archive:
    """A suite's packages, looked up with package lists of our own: the host's suite and lists do not matter.

    The lists are fetched once and kept, so that the versions stand still until the cache is removed or the
    mirror no longer has them.
    """

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.root = cache_dir("apt", suite)
        self.log = cache_dir("log") / f"apt-{suite}.log"

    def _options(self) -> list[str]:
        settings = [
            f"Dir::State={self.root}/state",
            f"Dir::State::status={self.root}/status",
            f"Dir::Cache={self.root}/cache",
            f"Dir::Etc::sourcelist={self.root}/sources.list",
            "Dir::Etc::sourceparts=-",
            f"Dir::Etc::trusted={keyring()}",
            "Dir::Etc::trustedparts=-",
            "Acquire::Languages=none",
            "APT::Sandbox::User=root",
            "APT::Install-Recommends=false",
        ]
        return [word for setting in settings for word in ("-o", setting)]

    def _update(self) -> None:
        progress(f"fetching the package lists of {self.suite}")
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        (self.root / "sources.list").write_text(sources(self.suite))
        run(["apt-get", *self._options(), "update"], log=self.log)
        (self.root / "updated").touch()

    def newest(self, package: str) -> tuple[str, str]:
        """Return the newest version of a package and the name under which to download it."""
        with locked(f"apt-{self.suite}"):
            if not (self.root / "updated").exists():
                self._update()
            policy = output(["apt-cache", *self._options(), "policy", package], env={"LC_ALL": "C"})
        match = re.search(r"Candidate: (\S+)", policy)
        if not match or match[1] == "(none)":
            raise HarnessError(f"Debian {self.suite} has no package {package}")
        return match[1], f"{package}={match[1]}"

    def depends(self, package: str) -> list[str]:
        """Return the names of a package's direct dependencies."""
        self.newest(package)
        text = output(["apt-cache", *self._options(), "show", "--no-all-versions", package])
        match = re.search(r"^Depends: (.*)$", text, re.MULTILINE)
        return [word.split()[0] for word in match[1].split(",")] if match else []

    def unpack(self, package: str, destination: Path) -> None:
        """Download the newest version of a package and unpack it below a directory."""
        _, wanted = self.newest(package)
        download = destination.with_name(f"{destination.name}.deb")
        download.mkdir()
        try:
            self._download(wanted, download)
            for deb in download.glob("*.deb"):
                run(["dpkg-deb", "--extract", deb, destination], log=self.log)
        finally:
            shutil.rmtree(download)

    def _download(self, wanted: str, directory: Path) -> None:
        command = ["apt-get", *self._options(), "download", wanted]
        with locked(f"apt-{self.suite}"):
            try:
                run(command, log=self.log, cwd=directory)
            except HarnessError:
                self._update()
                raise Renewed(f"{wanted} is not on the mirror any more") from None


class NotOffered(HarnessError):
    """Debian has no package of a kernel series any more, or not yet."""


def newest_archive(package: str, base: str) -> Archive:
    """Return the archive with the newest version of a package that belongs to a kernel series.

    Raises NotOffered, telling what each suite said instead, if there is none.
    """
    found: list[tuple[str, Archive]] = []
    instead = []
    for suite in BASES[base]:
        archive = Archive(suite)
        try:
            version, _ = archive.newest(package)
        except HarnessError as error:  # such as a mirror without this suite: the others will do
            instead.append(f"{suite}: {error.message}")
            continue
        if not version.startswith(f"{base.removeprefix('v')}."):
            instead.append(f"{suite}: {version}")
        elif not found or newer(version, found[0][0]):
            found = [(version, archive)]
    if not found:
        raise NotOffered(
            f"no {package} of {base} is to be had any more: {', '.join(instead)}",
            hint=f"choose another --base, or remove {cache_dir('apt')} to look it up again",
        )
    return found[0][1]


def newer(version: str, other: str) -> bool:
    """Tell whether a Debian version is later than another (deb-version(7))."""
    return subprocess.run(["dpkg", "--compare-versions", version, "gt", other], check=False).returncode == 0

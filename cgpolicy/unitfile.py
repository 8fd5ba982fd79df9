# SPDX-License-Identifier: LGPL-2.1-or-later
"""The syntax of unit files, exactly as systemd reads it.

Written after config_parse(), parse_line() and read_line_full() (systemd: src/shared/conf-parser.c,
src/basic/fileio.c) and compared with the library itself in tests/unit/test_unitfile.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

LINE_MAX = 1024 * 1024  # bytes; LONG_LINE_MAX, the first length that is too much
TOO_LONG = f"line of {LINE_MAX} bytes or more"
WHITESPACE = b" \t\n\r"
COMMENTS = b"#;"
BOM = b"\xef\xbb\xbf"
UNSAFE_IN_HEADER = frozenset(b"\"'\\\x7f") | frozenset(range(0x20))  # string_is_safe()


@dataclass(frozen=True, slots=True)
class Assignment:
    """A KEY=VALUE line inside a section; value is stripped, with its continuation lines joined."""

    section: str
    key: str
    value: str
    path: str
    line: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a file that systemd would ignore or stop at; section is None before the first header."""

    path: str
    line: int
    message: str
    section: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class UnitFile:
    """What one file says. If broken, systemd ignored it from the last problem's line on."""

    path: str
    assignments: tuple[Assignment, ...]
    problems: tuple[Problem, ...]
    broken: bool = False


class Malformed(Exception):
    """config_parse() failed, which ends the file."""


def physical_lines(data: bytes) -> Iterator[bytes | None]:
    r"""Yield lines as read_line_full() does: ended by NUL, or by \n and \r, each at most once; None if too long."""
    position, size = 0, len(data)
    while position < size:
        end = position
        while end < size and data[end] not in b"\n\r\0":
            end += 1
        if end - position >= LINE_MAX:
            yield None
            return
        line = data[position:end]
        seen = b""
        while end < size and data[end] in b"\n\r\0" and data[end] not in seen and 0 not in seen:
            seen += data[end : end + 1]
            end += 1
        yield line
        position = end


@dataclass(slots=True)
class _Reader:
    """The state that parse_line() keeps from line to line."""

    path: str
    section: str | None = None
    assignments: list[Assignment] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, line: int, message: str) -> None:
        self.problems.append(Problem(self.path, line, message, self.section))

    def logical_line(self, data: bytes, line: int) -> None:
        data = data.strip(WHITESPACE)
        if not data:
            return
        text = decode(data)
        if text.startswith("["):
            if not text.endswith("]"):
                raise Malformed(f"section header without ]: {shorten(text)}")
            if any(byte in UNSAFE_IN_HEADER for byte in data[1:-1]):
                raise Malformed(f"bad character in section header: {shorten(text)}")
            self.section = text[1:-1]
            return
        key, equals, value = text.partition("=")
        if self.section is None:
            self.problem(line, "assignment outside of a section")
        elif not equals:
            self.problem(line, f"no = in line: {shorten(text)}")
        elif not key:
            self.problem(line, "no key before =")
        else:
            strip = WHITESPACE.decode()
            self.assignments.append(Assignment(self.section, key.strip(strip), value.strip(strip), self.path, line))


def decode(data: bytes) -> str:
    """Return the text; raise Malformed where utf8_is_valid() says no, which also refuses noncharacters."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Malformed("not valid UTF-8") from None
    if any((char & 0xFFFE) == 0xFFFE or 0xFDD0 <= char <= 0xFDEF for char in map(ord, text) if char >= 0xFDD0):
        raise Malformed("not valid UTF-8")
    return text


def shorten(text: str) -> str:
    """Return the text fit for one line of a message."""
    printable = "".join(char if char.isprintable() else "?" for char in text[:61])
    return printable if len(printable) <= 60 else f"{printable[:57]}..."


def parse(data: bytes, path: str) -> UnitFile:
    """Return a unit file's assignments; what systemd would not take becomes a problem, nothing is raised.

    The line number of an assignment is that of the last line of its continuation, as in systemd's own messages.
    """
    reader = _Reader(path)
    broken = False
    number = 0
    try:
        continuation: bytearray | None = None
        bom_seen = False
        for physical in physical_lines(data):
            number += 1
            if physical is None:
                raise Malformed(TOO_LONG)
            # A comment inside a continuation is skipped and does not end it.
            if physical.lstrip(WHITESPACE)[:1] in (b"#", b";"):
                continue
            # Once in a file, but at the start of any line.
            if not bom_seen and physical.startswith(BOM):
                physical = physical.removeprefix(BOM)
                bom_seen = True
            if continuation is not None:
                if len(continuation) + len(physical) > LINE_MAX:
                    raise Malformed(TOO_LONG)
                continuation += physical
                logical = continuation
            else:
                logical = bytearray(physical)
            if (len(logical) - len(logical.rstrip(b"\\"))) % 2:
                logical[-1:] = b" "
                continuation = logical
                continue
            continuation = None
            reader.logical_line(bytes(logical), number)
        if continuation is not None:
            number += 1
            reader.logical_line(bytes(continuation), number)
    except Malformed as error:
        reader.problem(number, f"{error}; the file is ignored from here on")
        broken = True
    return UnitFile(path, tuple(reader.assignments), tuple(reader.problems), broken)

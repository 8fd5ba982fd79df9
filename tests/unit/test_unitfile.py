# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit-file parser beside systemd's own, which is called in libsystemd-shared."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator

import pytest

from cgpolicy.unitfile import TOO_LONG, UnitFile, parse
from tests.scale import scaled

LOG_TARGET_CONSOLE = 0  # src/basic/log.h
LOG_WARNING = 4

CASES = scaled(3_000, 100_000)

Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_uint,
    ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p,
)
Lookup = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p,
)

Seen = tuple[str, str, str, int]


class Oracle:
    """config_parse() of systemd (src/shared/conf-parser.h); its signature has been the same from 252 on."""

    def __init__(self, library: str) -> None:
        self.systemd = ctypes.CDLL(library)
        self.libc = ctypes.CDLL(None)
        self.libc.fmemopen.restype = ctypes.c_void_p
        self.libc.fmemopen.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
        self.libc.fclose.argtypes = [ctypes.c_void_p]
        self.systemd.config_parse.argtypes = [
            ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p, Lookup, ctypes.c_void_p,
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ]

    @contextlib.contextmanager
    def log(self) -> Iterator[Callable[[], bytes]]:
        """Have systemd log to where nobody sees it; yield what returns what it has logged since."""
        self.systemd.log_set_target(LOG_TARGET_CONSOLE)
        self.systemd.log_set_max_level(LOG_WARNING)
        self.systemd.log_open()
        before = os.dup(2)
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)

            def taken() -> bytes:
                file.seek(0)
                printed = file.read()
                file.seek(0)
                file.truncate()
                return printed

            try:
                yield taken
            finally:
                os.dup2(before, 2)
                os.close(before)

    def warnings(self, data: bytes, sections: list[str]) -> list[int]:
        """Return the numbers of the lines that systemd calls wrong, the sections being known to it."""
        known = b"".join(section.encode() + b"\0" for section in sections)
        with self.log() as taken:
            self.parse(data, known)
            printed = taken()
        return [int(line) for line in re.findall(rb"^test:(\d+): (?!Unknown section)", printed, re.MULTILINE)]

    def parse(self, data: bytes, sections: bytes | None = None) -> tuple[list[Seen], bool]:
        """Return what systemd assigns and whether it gave the file up."""
        seen: list[Seen] = []

        def assign(unit: bytes, file: bytes, line: int, section: bytes | None, section_line: int, key: bytes,
                   ltype: int, value: bytes, user: int, table: int) -> int:
            if section is not None:  # else outside of a section: let through only because every section is known
                seen.append((section.decode(), key.decode(), value.decode(), line))
            return 0

        callback = Callback(assign)

        def look_up(table, section, key, function, ltype, user, userdata):  # type: ignore[no-untyped-def]
            function[0] = ctypes.cast(callback, ctypes.c_void_p)
            ltype[0] = 0
            user[0] = None
            return 1

        file = self.libc.fmemopen(data, len(data), b"r") if data else self.libc.fopen(b"/dev/null", b"r")
        try:
            status = self.systemd.config_parse(None, b"test", file, sections, Lookup(look_up), None, 0, None, None)
        finally:
            self.libc.fclose(file)
        return seen, status < 0


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    libraries = glob.glob("/usr/lib/*/systemd/libsystemd-shared-*.so")
    assert libraries, "no libsystemd-shared: install systemd, or run ./tests/run unit"
    return Oracle(libraries[0])


def compare(oracle: Oracle, data: bytes) -> UnitFile:
    """Compare assignments with their lines, and of which lines it is said that something is wrong with them."""
    expected, gave_up = oracle.parse(data)
    got = parse(data, "test")
    assert [(a.section, a.key, a.value, a.line) for a in got.assignments] == expected, data[:2000]
    assert got.broken == gave_up, data[:2000]
    named = [*(each.section for each in got.assignments), *(each.section for each in got.problems)]
    if "" in named:
        return got  # a name that cannot be made known to systemd
    warned = oracle.warnings(data, [name for name in named if name])
    # Of a line that is too long systemd's caller says so, without the number of the line.
    assert [problem.line for problem in got.problems if TOO_LONG not in problem.message] == warned, data[:2000]
    return got


LONG = b"k=" + b"x" * (1024 * 1024 - 3)  # 1,048,575 bytes: the longest line that is taken

EXAMPLES = {
    "empty": b"",
    "plain": b"[A]\nk=v\n",
    "no newline at the end": b"[A]\nk=v",
    "lone carriage return ends a line": b"[A]\rk=v\rl=w",
    "NUL ends a line": b"[A]\0k=v\0l=w",
    "line ends combine once": b"[A]\r\nk=v\n\rl=w\n\0m=x\n\n\r\r[B]\nz=1",
    "comment inside a continuation": b"[A]\nk=a\\\n# no\n  ; neither\nb\n",
    "continuation keeps the indent": b"[A]\nk=a\\\n   b\\\n c\n",
    "escaped backslash does not continue": b"[A]\nk=a\\\\\nl=b\\\\\\\nc\n",
    "continuation at the end of the file": b"[A]\nk=a\\",
    "empty continuation": b"[A]\nk=\\\n\\\n\\\n",
    "byte order mark": b"\xef\xbb\xbf[A]\nk=v\n\xef\xbb\xbfl=w\n",
    "byte order mark before a comment": b"\xef\xbb\xbf#c\n[A]\nk=v\n",
    "byte order mark after a comment": b"#c\n\xef\xbb\xbf[A]\nk=v\n",
    "invalid UTF-8 ends the file": b"[A]\nk=v\nl=\xff\nm=x\n",
    "surrogate": b"[A]\nk=\xed\xa0\x80\nl=w\n",
    "noncharacter": b"[A]\nk=\xef\xbf\xbe\nl=w\n",
    "noncharacter in the reserved block": b"[A]\nk=\xef\xb7\x90\nl=w\n",
    "bad header ends the file": b"[A]\nk=v\n[B\nl=w\n",
    "header with a quote": b"[A]\nk=v\n[B\"]\nl=w\n",
    "header with spaces": b" [ A ] \nk=v\n",
    "empty header": b"[]\nk=v\n",
    "only a bracket": b"[\nk=v\n",
    "outside of a section": b"k=v\n[A]\nl=w\n",
    "no equals sign": b"[A]\nnothing\nk=v\n",
    "no key": b"[A]\n=v\n =w\nk=v\n",
    "spaces around": b"[A]\n \t k \t = \t v \t \n",
    "equals sign in the value": b"[A]\nk=a=b\n",
    "vertical tab is no white space": b"[A]\n\vk=v\v\n",
    "comment characters in the value": b"[A]\nk=a # b ; c\n",
    "longest line": b"[A]\n" + LONG + b"\nl=w\n",
    "too long a line": b"[A]\nk=v\n" + LONG + b"x\nl=w\n",
    "too long a continuation": b"[A]\n" + LONG[:-1] + b"\\\n" + b"y" * 20 + b"\nl=w\n",
}


@pytest.mark.parametrize("data", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example_as_systemd(oracle: Oracle, data: bytes) -> None:
    compare(oracle, data)


PIECES = [
    b"[A]", b"[X-CgPolicy]", b"[", b"]", b"[B\n", b"k=v", b"MemoryFailureDirtyAction=kill", b"=", b"\\", b"\\\\",
    b"\\\n", b"\n", b"\n", b"\n", b"\n", b"\r", b"\r\n", b"\0", b" ", b"\t", b"#", b";", b"# c\n", b" ; c\n",
    b"\xef\xbb\xbf", b"\xff", b"\xc3\xa9", b"\xf4\x90\x80\x80", b"\"", b"'", b"key", b"value", b"\v", b"\x7f", b"\x01",
    b"[C]\nx=y\n", b"a=\\\n b\n",
]


def test_generated_as_systemd(oracle: Oracle) -> None:
    generator = random.Random(20130417)
    taken = broken = 0
    for _ in range(CASES):
        start = generator.choice([b"", b"[A]\n", b"[X-CgPolicy]\n"])
        data = start + b"".join(generator.choices(PIECES, k=generator.randrange(1, 25)))
        got = compare(oracle, data)
        taken += bool(got.assignments)
        broken += got.broken
    # Otherwise the generator makes nothing worth comparing.
    assert taken > CASES / 4 and broken > CASES / 20


def test_a_problem_names_file_and_line() -> None:
    got = parse(b"[A]\nk=v\n\n[B\nl=w\n", "/etc/x.conf")
    assert [str(problem) for problem in got.problems] == [
        "/etc/x.conf:4: section header without ]: [B; the file is ignored from here on"
    ]
    assert [assignment.key for assignment in got.assignments] == ["k"]


def test_the_line_that_is_too_long_is_named() -> None:
    got = parse(b"[A]\nk=v\n" + b"x" * (2 << 20), "/etc/x.conf")
    assert (got.problems[0].line, got.broken) == (3, True)

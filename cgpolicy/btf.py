# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running kernel's own description of its structures (BTF): where a member lies, what an enumerator is worth.

Format: the kernel's Documentation/bpf/btf.rst and include/uapi/linux/btf.h. A kernel has some 150,000 types, of
which a few dozen are wanted: one pass notes where each begins, and nothing else is decoded until it is asked for.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cgpolicy.error import NotSupported

VMLINUX = Path("/sys/kernel/btf/vmlinux")

MAGICS = {b"\x9f\xeb": "little", b"\xeb\x9f": "big"}  # 0xeB9F
HEADER = "HBBIIIII"  # struct btf_header, up to str_len
LAYOUT = "II"  # layout_off and layout_len, which newer kernels add

# enum BTF_KIND_*
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO = range(1, 14)
VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(14, 20)

# A struct btf_type is three words; then come, in words, a fixed part and a part for each element.
BASE = 3
FIXED = {INT: 1, ARRAY: 3, VAR: 1, DECL_TAG: 1}
EACH = {STRUCT: 3, UNION: 3, ENUM: 2, FUNC_PROTO: 2, DATASEC: 3, ENUM64: 3}

# struct btf_type.info. Older kernels use fewer bits for both, and leave the others 0.
KINDS = 0x80
ELEMENTS = 0xFFFFFF

QUALIFIERS = {VOLATILE, CONST, RESTRICT, TYPE_TAG}
KEYWORDS = {"struct": {STRUCT}, "union": {UNION}, "enum": {ENUM, ENUM64}, "function": {FUNC}}
DEPTH = 64  # of types within types; more is a loop

T = TypeVar("T")


class NotInBtf(NotSupported, LookupError):
    """The kernel has no such type, member, enumerator or function."""


class MalformedBtf(NotSupported):
    """This is no BTF, or a damaged one."""

    def __init__(self, what: str) -> None:
        super().__init__(f"malformed BTF: {what}", hint="the kernel's type information cannot be used")


class Btf:
    """One kernel's types, asked about by names as in C: "struct page", "enum pageflags"."""

    def __init__(self, data: bytes) -> None:
        """Take BTF as the kernel presents it; raise MalformedBtf if it is something else."""
        order = MAGICS.get(data[:2], "")
        if not order:
            raise MalformedBtf("no magic number")
        mark = "<" if order == "little" else ">"
        size = struct.calcsize(mark + HEADER)
        layout: tuple[int, ...] = (0, 0)
        try:
            _, version, _, length, *sections = struct.unpack_from(mark + HEADER, data)
            if length >= size + struct.calcsize(mark + LAYOUT):
                layout = struct.unpack_from(mark + LAYOUT, data, size)
        except struct.error:
            raise MalformedBtf("truncated header") from None
        if version != 1:
            raise MalformedBtf(f"version {version}")
        types = section(data, length, *sections[:2])
        self._strings = section(data, length, *sections[2:])
        if len(types) % 4 or not self._strings.endswith(b"\0"):
            raise MalformedBtf("truncated section")
        self._words = array("I", types)
        if order != sys.byteorder:
            self._words.byteswap()
        self._starts, names = index(self._words, section(data, length, *layout))
        self._names = names.tobytes()
        self._numbers: dict[str, list[int]] = {}

    @classmethod
    def read(cls, path: Path = VMLINUX) -> Btf:
        """Read the running kernel's; raise NotSupported with the cure."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            hint = "boot a kernel that is built with CONFIG_DEBUG_INFO_BTF"
            raise NotSupported(f"no {path}: the kernel does not describe its structures", hint=hint) from None
        except OSError as error:
            raise NotSupported(f"{path}: {error.strerror}", hint="run as root") from None
        return cls(data)

    # Questions --------------------------------------------------------------------------------

    def offset(self, name: str, *members: str) -> int:
        """Return where a member begins in a structure or union, in bytes; raise NotInBtf, also for bit-fields.

        Each further member is one of the structure that the member before it is (not points to). Members of
        anonymous structures and unions are found as in C.
        """
        return self._one(name, lambda number: self._offset(number, name, members))

    def size(self, name: str) -> int:
        """Return the size of a structure, union or enumeration in bytes; raise NotInBtf."""
        return self._one(name, lambda number: self._type(number)[3])

    def enumerator(self, name: str, enumerator: str) -> int:
        """Return the value of an enumerator; raise NotInBtf."""
        return self._one(name, lambda number: self._enumerator(number, name, enumerator))

    def parameters(self, function: str) -> list[tuple[str, str]]:
        """Return names and types of a function's parameters, qualifiers left out; raise NotInBtf."""
        return self._one(f"function {function}", self._parameters)

    def _one(self, name: str, ask: Callable[[int], T]) -> T:
        """Return the answer for a name; where several types have it, they have to agree."""
        answers: list[T] = []
        refusal = NotInBtf(f"the kernel has no {name}")
        for number in self._named(name):
            try:
                answer = ask(number)
            except NotInBtf as error:
                refusal = error
            else:
                answers += [] if answer in answers else [answer]
        if len(answers) > 1:
            raise NotInBtf(f"the kernel has more than one {name}")
        if not answers:
            raise refusal
        return answers[0]

    # Answers ----------------------------------------------------------------------------------

    def _offset(self, number: int, name: str, members: tuple[str, ...]) -> int:
        total = 0
        for member in members:
            found = self._member(number, member.encode() + b"\0", DEPTH)
            if found is None:
                raise NotInBtf(f"the kernel's {name} has no {member}")
            number, bits, width = found
            if width or bits % 8:
                raise NotInBtf(f"{member} in the kernel's {name} is a bit-field")
            total += bits // 8
            name = f"{name}.{member}"
        return total

    def _member(self, number: int, wanted: bytes, depth: int) -> tuple[int, int, int] | None:
        """Return type, offset in bits and width in bits (0: no bit-field) of a member, at any anonymous depth."""
        number = self._bare(number)
        place, kind, flag, _ = self._type(number)
        if kind not in (STRUCT, UNION):
            return None
        for position in self._elements(place, EACH[kind]):
            name, member, bits = self._words[position : position + 3]
            width = bits >> 24 if flag else 0
            bits = bits & 0xFFFFFF if flag else bits
            if name:
                if self._strings.startswith(wanted, name):
                    return member, bits, width
                continue
            if depth == 0:
                raise MalformedBtf("types in a loop")
            found = self._member(member, wanted, depth - 1)
            if found is not None:
                return found[0], bits + found[1], found[2]
        return None

    def _enumerator(self, number: int, name: str, enumerator: str) -> int:
        place, kind, signed, _ = self._type(number)
        wanted = enumerator.encode() + b"\0"
        for position in self._elements(place, EACH[kind]):
            if self._strings.startswith(wanted, self._words[position]):
                value = self._words[position + 1]
                bits = 32
                if kind == ENUM64:
                    value |= self._words[position + 2] << 32
                    bits = 64
                return value - (1 << bits) if signed and value >> (bits - 1) else value
        raise NotInBtf(f"the kernel's {name} has no {enumerator}")

    def _parameters(self, number: int) -> list[tuple[str, str]]:
        place, kind, _, _ = self._type(self._type(number)[3])
        if kind != FUNC_PROTO:
            raise MalformedBtf("a function without a prototype")
        pairs = (self._words[position : position + 2] for position in self._elements(place, EACH[kind]))
        return [(self._string(name), self._text(type_number)) for name, type_number in pairs]

    def _text(self, number: int) -> str:
        """Return a type as C declares it, without qualifiers."""
        stars = ""
        for _ in range(DEPTH):
            if number == 0:
                return f"void{stars}"
            place, kind, union, target = self._type(number)
            if kind == PTR:
                stars = stars or " "
                stars += "*"
            elif kind not in QUALIFIERS:
                name = self._string(self._words[place])
                keyword = {STRUCT: "struct ", UNION: "union ", ENUM: "enum ", ENUM64: "enum "}.get(kind, "")
                if kind == FWD:
                    keyword = "union " if union else "struct "
                return f"{keyword}{name or '(anonymous)'}{stars}"
            number = target
        raise MalformedBtf("types in a loop")

    # Types ------------------------------------------------------------------------------------

    def _type(self, number: int) -> tuple[int, int, bool, int]:
        """Return where a type is, its kind, its flag, and its size or the type that it refers to."""
        if not 0 < number < len(self._starts):
            raise MalformedBtf(f"no type {number}")
        place = self._starts[number]
        info = self._words[place + 1]
        return place, (info >> 24) % KINDS, bool(info >> 31), self._words[place + 2]

    def _elements(self, place: int, words: int) -> range:
        """Return where the members, enumerators or parameters of a type are."""
        first = place + BASE
        return range(first, first + words * (self._words[place + 1] & ELEMENTS), words)

    def _bare(self, number: int) -> int:
        """Return the type behind typedefs and qualifiers."""
        for _ in range(DEPTH):
            if number == 0:
                return 0
            _, kind, _, target = self._type(number)
            if kind != TYPEDEF and kind not in QUALIFIERS:
                return number
            number = target
        raise MalformedBtf("types in a loop")

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset)
        if end < 0:
            raise MalformedBtf(f"no string {offset}")
        return self._strings[offset:end].decode(errors="replace")

    def _named(self, name: str) -> list[int]:
        """Return the types that have a name such as "struct page" or "function schedule"."""
        if name not in self._numbers:
            keyword, _, bare = name.partition(" ")
            kinds = KEYWORDS[keyword]
            self._numbers[name] = [number for number in self._spelled(bare) if self._type(number)[1] in kinds]
        return self._numbers[name]

    def _spelled(self, name: str) -> Iterator[int]:
        """Yield the types, of any kind, that have a name."""
        wanted = b"\0" + name.encode() + b"\0"
        place = self._strings.find(wanted)
        while place >= 0:
            offset = array("I", [place + 1]).tobytes()
            found = self._names.find(offset)
            while found >= 0:
                if found % 4 == 0:
                    yield found // 4
                found = self._names.find(offset, found + 1)
            place = self._strings.find(wanted, place + 1)


def section(data: bytes, header: int, offset: int, length: int) -> bytes:
    """Return a section, which the header places relative to its own end."""
    if header + offset + length > len(data):
        raise MalformedBtf("truncated section")
    return data[header + offset : header + offset + length]


def index(words: array[int], layout: bytes) -> tuple[array[int], array[int]]:
    """Return, by type number, where a type begins and where its name is; number 0 is void.

    The kernel may tell of kinds that this reader does not know: layout has two bytes and a spare half-word for each,
    the size of the fixed part and of an element, in bytes (struct btf_layout).
    """
    beyond = len(words)  # leads out of the section
    fixed, each = [beyond] * KINDS, [0] * KINDS
    for kind, (one, other) in enumerate(struct.iter_unpack("BBxx", layout[: len(layout) // 4 * 4])):
        if kind < KINDS:
            fixed[kind], each[kind] = BASE + one // 4, other // 4
    for kind in range(INT, ENUM64 + 1):
        fixed[kind], each[kind] = BASE + FIXED.get(kind, 0), EACH.get(kind, 0)
    starts, names = array("I", [0]), array("I", [0])
    note, name = starts.append, names.append
    position = 0
    try:
        while position < beyond:
            note(position)
            name(words[position])
            info = words[position + 1]
            kind = (info >> 24) & 0x7F
            position += fixed[kind] + each[kind] * (info & 0xFFFFFF)
    except IndexError:
        raise MalformedBtf("truncated type") from None
    if position > beyond:
        raise MalformedBtf(f"truncated type, or one of the unknown kind {kind}")
    return starts, names

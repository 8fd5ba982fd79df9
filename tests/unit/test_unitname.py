# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unit names beside systemd's own functions, which are called in libsystemd-shared."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpolicy import unitname
from cgpolicy.cgroupfs import unit_of_directory
from cgpolicy.error import InvalidUnitName

ANY = 1 | 2 | 4  # UNIT_NAME_PLAIN, _TEMPLATE, _INSTANCE


class Systemd:
    """Functions of src/basic/unit-name.c, bus-label.c and cgroup-util.c; the same from 252 on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.libc = ctypes.CDLL(None)
        self.libc.free.argtypes = [ctypes.c_void_p]
        library.unit_name_is_valid.argtypes = [ctypes.c_char_p, ctypes.c_int]
        library.unit_name_is_valid.restype = ctypes.c_bool
        library.cg_unescape.argtypes = [ctypes.c_char_p]
        library.cg_unescape.restype = ctypes.c_char_p
        library.bus_label_unescape_n.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        library.bus_label_unescape_n.restype = ctypes.c_void_p

    def is_valid(self, name: str) -> bool:
        return bool(self.library.unit_name_is_valid(encode(name), ANY))

    def made(self, function: str, text: str) -> str:
        """Call what returns a new string."""
        call = getattr(self.library, function)
        call.argtypes, call.restype = [ctypes.c_char_p], ctypes.c_void_p
        return self.take(call(encode(text)))

    def stored(self, function: str, text: str) -> str | None:
        """Call what stores a new string and returns its status; None if that is an error or nothing was stored."""
        call, out = getattr(self.library, function), ctypes.c_void_p()
        call.argtypes, call.restype = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)], ctypes.c_int
        return self.take(out.value) if call(encode(text), ctypes.byref(out)) >= 0 and out.value else None

    def take(self, pointer: int) -> str:
        try:
            return ctypes.string_at(pointer).decode(errors="surrogateescape")
        finally:
            self.libc.free(pointer)

    def bus_label_unescape(self, label: str) -> str:
        data = encode(label)
        return self.take(self.library.bus_label_unescape_n(data, len(data)))

    def cg_unescape(self, directory: str) -> str:
        name: bytes = self.library.cg_unescape(encode(directory))
        return name.decode(errors="surrogateescape")


def encode(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


@pytest.fixture(scope="session")
def systemd(libsystemd: ctypes.CDLL) -> Systemd:
    return Systemd(libsystemd)


def anything() -> st.SearchStrategy[str]:
    """Whatever an argument or a file name can hold: bytes other than NUL."""
    return st.lists(st.integers(1, 255)).map(lambda codes: bytes(codes).decode(errors="surrogateescape"))


def almost_names() -> st.SearchStrategy[str]:
    """Text of the pieces that the rules for unit names speak of, so that many of them are valid."""
    pieces = ["a", "web", "B", "7", ":", "-", "_", ".", "\\", "\\x2d", "@", "/", " ", "\u00e9", "\n", "x" * 120]
    suffixes = ["", ".", ".service", ".slice", ".scope", ".target", ".unit", ".Service", ".service."]
    return st.builds(lambda stem, suffix: "".join(stem) + suffix, st.lists(st.sampled_from(pieces)),
                     st.sampled_from(suffixes))


@given(name=almost_names() | anything())
def test_valid_as_systemd(systemd: Systemd, name: str) -> None:
    assert unitname.is_valid(name) == systemd.is_valid(name)


@pytest.mark.parametrize("length", [254, 255, 256])
@pytest.mark.parametrize("letter", ["a", "\u00e9"])
def test_length_as_systemd(systemd: Systemd, length: int, letter: str) -> None:
    suffix = ".service"
    name = letter * ((length - len(suffix)) // len(letter.encode())) + suffix
    assert unitname.is_valid(name) == systemd.is_valid(name) == (length < 256 and letter == "a")


@given(name=almost_names())
def test_template_as_systemd(systemd: Systemd, name: str) -> None:
    if systemd.is_valid(name):
        stem, _, instance = name.rpartition(".")[0].partition("@")
        expected = systemd.stored("unit_name_template", name) if stem and instance else None
        assert unitname.template(name) == expected


def slices() -> st.SearchStrategy[str]:
    words = st.lists(st.sampled_from(["a", "user", "1000", "_x", "\\x2d"]), min_size=1, max_size=5)
    return words.map("-".join).map("{}.slice".format) | st.just("-.slice")


@given(name=slices())
def test_parent_slices_as_systemd(systemd: Systemd, name: str) -> None:
    expected = [name]
    while (parent := systemd.stored("slice_build_parent_slice", expected[-1])) is not None:
        expected.append(parent)
    assert unitname.parent_slices(name) == expected
    assert expected[-1] == "-.slice"


@given(text=anything() | almost_names())
def test_escape_as_systemd(systemd: Systemd, text: str) -> None:
    assert unitname.escape(text) == systemd.made("unit_name_escape", text)


@given(text=anything() | almost_names())
def test_unescape_undoes_escape(systemd: Systemd, text: str) -> None:
    escaped = unitname.escape(text)
    assert unitname.unescape(escaped) == text == systemd.stored("unit_name_unescape", escaped)


@given(text=st.text("ab-\\x27dF/", max_size=12))
def test_unescape_as_systemd_where_it_agrees_to(systemd: Systemd, text: str) -> None:
    expected = systemd.stored("unit_name_unescape", text)
    if expected is not None:
        assert unitname.unescape(text) == expected


@pytest.mark.parametrize("text", ["\\", "a\\x", "\\x2", "\\xzz", "\\n"])
def test_what_is_no_escape_stands_for_itself(systemd: Systemd, text: str) -> None:
    assert systemd.stored("unit_name_unescape", text) is None
    assert unitname.unescape(text) == text


@given(text=anything())
def test_bus_label_as_systemd(systemd: Systemd, text: str) -> None:
    label = unitname.bus_label_escape(text)
    assert label == systemd.made("bus_label_escape", text)
    assert unitname.bus_label_unescape(label) == text == systemd.bus_label_unescape(label)


@given(label=st.text("a_2dF", max_size=12))
def test_bus_label_of_others_as_systemd(systemd: Systemd, label: str) -> None:
    assert unitname.bus_label_unescape(label) == systemd.bus_label_unescape(label)


@given(directory=st.text("_a.-", min_size=1, max_size=6))
def test_cgroup_directory_as_systemd(systemd: Systemd, directory: str) -> None:
    assert unit_of_directory(directory) == systemd.cg_unescape(directory)


@pytest.mark.parametrize(
    ("typed", "unit"),
    [
        ("web", "web.service"),
        ("web.service", "web.service"),
        ("web.1", "web.1.service"),
        ("web@a.b", "web@a.b.service"),
        ("web.slice", "web.slice"),
        ("web@", "web@.service"),
    ],
)
def test_typed_without_suffix_is_a_service(typed: str, unit: str) -> None:
    assert unitname.mangle(typed) == unit


@pytest.mark.parametrize("refuse", [unitname.check, unitname.mangle])
@pytest.mark.parametrize("name", ["", "@", "a/b", "/dev/sda", "web service", "x" * 256, "../etc"])
def test_a_bad_name_is_an_error_of_the_user(refuse: Callable[[str], str], name: str) -> None:
    with pytest.raises(InvalidUnitName) as caught:
        refuse(name)
    assert repr(name) in str(caught.value) and caught.value.bus_name == "InvalidUnitName"


@pytest.mark.parametrize(
    ("unit", "machine"),
    [
        (r"machine-qemu\x2d7\x2dweb01.scope", "web01"),
        (r"machine-qemu\x2d12\x2dweb\x2d01.scope", "web-01"),
        (r"machine-lxc\x2d7\x2dweb01.scope", "web01"),
        (r"machine-qemu\x2dweb01.scope", "qemu-web01"),
        (r"machine-qemu\x2dembed\x2d0123abcd\x2d1\x2dweb.scope", "web"),
        ("systemd-nspawn@db.service", "db"),
        ("systemd-vmspawn@db.service", "db"),
        ("systemd-nspawn@.service", None),
        ("libpod-0123.scope", None),
        (r"machine-vbox\x2d7\x2dweb01.scope", "vbox-7-web01"),
        ("machine-db.scope", "db"),
        ("machine-.scope", None),
        ("machine-db.service", None),
        ("session-1.scope", None),
    ],
)
def test_machine_of_a_scope(unit: str, machine: str | None) -> None:
    assert unitname.machine_name(unit) == machine


@given(identifier=st.integers(1, 99999), name=st.text("aZ0-._+:\\@", min_size=1, max_size=20))
def test_machine_of_libvirts_scope(systemd: Systemd, identifier: int, name: str) -> None:
    # virDomainDriverGenerateMachineName(), and machined's scope of it (src/machine/machine.c).
    scope = f"machine-{systemd.made('unit_name_escape', f'qemu-{identifier}-{name}')}.scope"
    assert unitname.machine_name(scope) == name


@pytest.mark.parametrize(
    ("domain", "unit", "same"),
    [
        ("web_01", r"machine-qemu\x2d7\x2dweb01.scope", True),
        ("web01", r"machine-qemu\x2d7\x2dweb01.scope", True),
        ("web 01!", r"machine-qemu\x2d7\x2dweb01.scope", True),
        ("_web--01.", r"machine-qemu\x2d7\x2dweb\x2d01.scope", True),
        ("w" * 80, rf"machine-qemu\x2d7\x2d{'w' * 57}.scope", True),
        ("w" * 80, rf"machine-qemu\x2d7\x2d{'w' * 56}.scope", False),
        ("web_02", r"machine-qemu\x2d7\x2dweb01.scope", False),
        ("we_b01", "machine-web01.scope", False),
        ("web_01", "web01.service", False),
        ("", r"machine-qemu\x2d7\x2dweb01.scope", False),
    ],
)
def test_domain_of_a_scope(domain: str, unit: str, same: bool) -> None:
    assert unitname.is_domain(domain, unit) == same

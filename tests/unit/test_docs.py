# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.cgpolicy1(5) beside the interface's XML: the same methods, properties and signals, with the same types."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cgpolicy.error import UserError
from cgpolicy.reconciler import State
from cgpolicy.resolve import SourceKind

TREE = Path(__file__).resolve().parents[2]
PAGE = (TREE / "docs/org.cgpolicy1.5.md").read_text()
XML = ElementTree.parse(TREE / "cgpolicy/org.cgpolicy1.xml").getroot()


def section(title: str) -> str:
    """Return what stands below a heading."""
    return re.split(r"^# ", PAGE.partition(f"\n# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def terms(title: str) -> list[str]:
    """Return the terms that a section defines, without their marks."""
    found = re.findall(r"^(\*\*.+)\n:   ", section(title), re.MULTILINE)
    return [term.replace("*", "") for term in found]


def interface(name: str) -> ElementTree.Element:
    found = XML.find(f"interface[@name='org.cgpolicy1.{name}']")
    assert found is not None
    return found


def arguments(member: ElementTree.Element, direction: str) -> str:
    found = [f"{arg.get('type')} {arg.get('name')}" for arg in member.findall("arg")
             if arg.get("direction", "in") == direction]
    return ", ".join(found)


def test_methods() -> None:
    expected = []
    for method in interface("Manager").findall("method"):
        out = arguments(method, "out")
        expected.append(f"{method.get('name')}({arguments(method, 'in')}){f' → {out}' if out else ''}")
    assert terms("MANAGER METHODS") == expected


def test_signals() -> None:
    signals = interface("Manager").findall("signal")
    assert terms("MANAGER SIGNALS") == [f"{signal.get('name')}({arguments(signal, 'in')})" for signal in signals]


@pytest.mark.parametrize(("name", "title"), [("Manager", "MANAGER PROPERTIES"), ("Unit", "UNIT PROPERTIES")])
def test_properties(name: str, title: str) -> None:
    expected = []
    for each in interface(name).findall("property"):
        writable = ", writable" if each.get("access") == "readwrite" else ""
        expected.append(f"{each.get('name')} ({each.get('type')}){writable}")
    listed = [part.strip() for term in terms(title) for part in re.split(r"(?<=\)), (?=[A-Z])", term)]
    assert listed == expected


@pytest.mark.parametrize("name", ["Manager", "Unit"])
def test_what_is_said_of_signals_for_properties(name: str) -> None:
    """An annotation says for each property whether its changes are told; the page says the same."""
    text = section(f"{name.upper()} PROPERTIES")
    for each in interface(name).findall("property"):
        annotation = each.find("annotation[@name='org.freedesktop.DBus.Property.EmitsChangedSignal']")
        emits = "true" if annotation is None else annotation.get("value")
        entry = text.partition(f"**{each.get('name')}** (")[2].partition("\n\n")[0]
        assert ("Constant." in entry) == (emits == "const"), each.get("name")
        assert ("no signal" in entry) == (emits == "false"), each.get("name")
    assert "told by **PropertiesChanged**" in text


def test_states_sources_and_errors() -> None:
    assert sorted(terms("STATES")) == sorted(State)
    properties = section("UNIT PROPERTIES")
    for kind in SourceKind:
        assert f"**{kind}**" in properties
    named = re.findall(r"\*\*(?:org\.cgpolicy1\.Error)?\.(\w+)\*\*", section("ERRORS"))
    kinds: list[type[UserError]] = [UserError, *UserError.__subclasses__()]
    own = {kind.bus_name for kind in kinds}
    assert own <= set(named)

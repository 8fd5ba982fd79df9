# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of another service by the thousand, on a connection that PyGObject has made.

PyGObject (3.42 at least) loses 140 bytes with every asynchronous call, and the whole of a large answer: megabytes at
every daemon-reload of a process that asks about every unit then. GLib's own functions, called with one callback for
all calls, lose nothing and take half the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any

PROPERTIES = "org.freedesktop.DBus.Properties"

_glib = ctypes.CDLL("libglib-2.0.so.0")
_gio = ctypes.CDLL("libgio-2.0.so.0")

_Ready = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)  # GAsyncReadyCallback


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


_call = _function(
    _gio, "g_dbus_connection_call", None,
    c_void_p, c_char_p, c_char_p, c_char_p, c_char_p, c_void_p, c_void_p, c_uint, c_int, c_void_p, _Ready, c_void_p,
)
_call_finish = _function(_gio, "g_dbus_connection_call_finish", c_void_p, c_void_p, c_void_p, c_void_p)
_new_string = _function(_glib, "g_variant_new_string", c_void_p, c_char_p)
_new_tuple = _function(_glib, "g_variant_new_tuple", c_void_p, ctypes.POINTER(c_void_p), c_size_t)
_ref_sink = _function(_glib, "g_variant_ref_sink", c_void_p, c_void_p)
_unref = _function(_glib, "g_variant_unref", None, c_void_p)
_type = _function(_glib, "g_variant_get_type_string", c_char_p, c_void_p)
_child = _function(_glib, "g_variant_get_child_value", c_void_p, c_void_p, c_size_t)
_children = _function(_glib, "g_variant_n_children", c_size_t, c_void_p)
_variant = _function(_glib, "g_variant_get_variant", c_void_p, c_void_p)
_string = _function(_glib, "g_variant_get_string", c_char_p, c_void_p, c_void_p)


@cache
def _arguments(interface: str, name: str) -> int:
    """Return the arguments of Get, which are few and used again for every object."""
    strings = (c_void_p * 2)(_new_string(interface.encode()), _new_string(name.encode()))
    return int(_ref_sink(_new_tuple(strings, 2)))


def _text(variant: int) -> str:
    """Return a string or object path."""
    return str(_string(variant, None).decode())


@contextlib.contextmanager
def _inside(container: int, position: int) -> Iterator[int]:
    """Yield one element of a container."""
    element = _child(container, position)
    try:
        yield element
    finally:
        _unref(element)


def _property(reply: int) -> str | list[str] | None:
    """Return what Get has answered, None of a type other than string and array of strings."""
    with _inside(reply, 0) as boxed:
        value = _variant(boxed)
    try:
        if _type(value) == b"s":
            return _text(value)
        if _type(value) != b"as":
            return None
        values = []
        for position in range(_children(value)):
            with _inside(value, position) as element:
                values.append(_text(element))
        return values
    finally:
        _unref(value)


def _columns(columns: Sequence[int], reply: int) -> Iterator[tuple[str, ...]]:
    """Yield some columns, which must be strings, of an answer that is an array of structures."""
    with _inside(reply, 0) as rows:
        for position in range(_children(rows)):
            with _inside(rows, position) as row:
                found = []
                for column in columns:
                    with _inside(row, column) as cell:
                        found.append(_text(cell))
            yield tuple(found)


class DirectCalls:
    """Calls of one service; done() of each gets None if it failed."""

    def __init__(self, connection: Any, service: str, timeout_ms: int) -> None:
        self._connection = connection
        self._pointer = hash(connection)  # PyGObject's is the address of the C object
        self._service = service.encode()
        self._timeout_ms = timeout_ms
        self._callback = _Ready(self._answered)
        self._waiting: dict[int, Callable[[int | None], None]] = {}
        self._last = 0

    def get(self, path: str, interface: str, name: str, done: Callable[[object], None]) -> None:
        """Hand over a property that is a string or an array of strings."""
        arguments = _arguments(interface, name)
        self._call(path, PROPERTIES, "Get", arguments, lambda reply: done(_property(reply) if reply else None))

    def table(
        self, path: str, interface: str, method: str, columns: Sequence[int],
        done: Callable[[Iterable[tuple[str, ...]] | None], None],
    ) -> None:
        """Hand over columns of the table that a method without arguments returns, good until done() returns."""
        self._call(path, interface, method, None, lambda reply: done(_columns(columns, reply) if reply else None))

    def _call(
        self, path: str, interface: str, method: str, arguments: int | None, done: Callable[[int | None], None]
    ) -> None:
        self._last += 1
        self._waiting[self._last] = done
        _call(
            self._pointer, self._service, path.encode(), interface.encode(), method.encode(), arguments, None, 0,
            self._timeout_ms, None, self._callback, self._last,
        )

    def _answered(self, connection: int, result: int, number: int) -> None:
        # Nothing may be raised through GLib: ctypes would only print it, and not as the daemon's other errors.
        try:
            reply = _call_finish(connection, result, None)
            try:
                self._waiting.pop(number)(reply)
            finally:
                if reply:
                    _unref(reply)
        except Exception:
            sys.excepthook(*sys.exc_info())

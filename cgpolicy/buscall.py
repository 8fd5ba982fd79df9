# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls to other services that are answered later, and timers, at no lasting cost.

PyGObject makes a C function of the callback of each asynchronous call and of each timeout_add(). That of Debian 12
(3.42) never frees it, about 140 bytes a call: on a host where units come and go, tens of megabytes a day. Here all
calls share one such function. What is asked by the thousand, properties of units and the list of them, is read from
the answers without PyGObject, which loses the large ones as a whole and takes twice the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_char_p, c_int, c_size_t, c_ssize_t, c_uint, c_void_p
from functools import cache
from typing import Any

from gi.repository import Gio, GLib

from cgpolicy.rawglib import address, function, gio, glib, object_unref, wrapped

PROPERTIES = "org.freedesktop.DBus.Properties"

# The values of the answer, or None and the name of the error.
Done = Callable[[tuple[Any, ...] | None, str], None]


class _Error(ctypes.Structure):
    """GError (glib/gerror.h)."""

    _fields_ = (("domain", ctypes.c_uint32), ("code", c_int), ("message", c_char_p))


_Ready = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)  # GAsyncReadyCallback
_SourceFunc = ctypes.CFUNCTYPE(c_int, c_void_p)

_send = function(
    gio, "g_dbus_connection_send_message_with_reply", None,
    c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, _Ready, c_void_p,
)
_send_finish = function(
    gio, "g_dbus_connection_send_message_with_reply_finish", c_void_p,
    c_void_p, c_void_p, ctypes.POINTER(ctypes.POINTER(_Error)),
)
_error_free = function(glib, "g_error_free", None, ctypes.POINTER(_Error))
_call = function(
    gio, "g_dbus_connection_call", None,
    c_void_p, c_char_p, c_char_p, c_char_p, c_char_p, c_void_p, c_void_p, c_uint, c_int, c_void_p, _Ready, c_void_p,
)
_call_finish = function(gio, "g_dbus_connection_call_finish", c_void_p, c_void_p, c_void_p, c_void_p)
_timeout_add = function(glib, "g_timeout_add_full", c_uint, c_int, c_uint, _SourceFunc, c_void_p, c_void_p)
_new_string = function(glib, "g_variant_new_string", c_void_p, c_char_p)
_new_tuple = function(glib, "g_variant_new_tuple", c_void_p, ctypes.POINTER(c_void_p), c_size_t)
_new_strv = function(glib, "g_variant_new_strv", c_void_p, ctypes.POINTER(c_char_p), c_ssize_t)
_ref_sink = function(glib, "g_variant_ref_sink", c_void_p, c_void_p)
_unref = function(glib, "g_variant_unref", None, c_void_p)
_type = function(glib, "g_variant_get_type_string", c_char_p, c_void_p)
_child = function(glib, "g_variant_get_child_value", c_void_p, c_void_p, c_size_t)
_children = function(glib, "g_variant_n_children", c_size_t, c_void_p)
_variant = function(glib, "g_variant_get_variant", c_void_p, c_void_p)
_string = function(glib, "g_variant_get_string", c_char_p, c_void_p, c_void_p)

_numbers = itertools.count(1)
_under_way: dict[int, Callable[[int, int], None]] = {}  # what takes a connection and the result of a call
_timers: dict[int, tuple[Callable[[], bool], int]] = {}


def _answered(connection: int, result: int, number: int) -> None:
    # Nothing may be raised through GLib: ctypes would only print it, and not as the daemon's other errors.
    try:
        _under_way.pop(number)(connection, result)
    except Exception:
        sys.excepthook(*sys.exc_info())


_ready = _Ready(_answered)


def _expect(answered: Callable[[int, int], None]) -> int:
    """Return the number by which a call's answer is told from others."""
    number = next(_numbers)
    _under_way[number] = answered
    return number


# Any call -------------------------------------------------------------------------------------


def call(
    connection: Any, service: str, path: str, interface: str, method: str, arguments: Any, timeout_ms: int, done: Done,
    *, start_service: bool = True,
) -> None:
    """Send a call and return; arguments is a variant or None. done comes from the main loop, always once."""
    message = Gio.DBusMessage.new_method_call(service, path, interface, method)
    if not start_service:
        message.set_flags(Gio.DBusMessageFlags.NO_AUTO_START)
    if arguments is not None:
        message.set_body(arguments)

    def answered(source: int, result: int) -> None:
        error = ctypes.POINTER(_Error)()
        answer = _send_finish(source, result, ctypes.byref(error))
        if not answer:  # in time, or the connection is gone
            said = error.contents.message.decode()
            _error_free(error)
            done(None, said)
            return
        reply = wrapped(answer)
        object_unref(answer)
        if reply.get_message_type() == Gio.DBusMessageType.ERROR:
            done(None, reply.get_error_name())
            return
        body = reply.get_body()
        done(body.unpack() if body is not None else (), "")

    _send(address(connection), address(message), 0, timeout_ms, None, None, _ready, _expect(answered))


# Questions by the thousand --------------------------------------------------------------------


def get(
    connection: Any, service: str, path: str, interface: str, name: str, timeout_ms: int,
    done: Callable[[str | list[str] | None], None],
) -> None:
    """Hand over a property that is a string or an array of strings, None if that failed."""
    arguments = _get_arguments(interface, name)
    _ask(connection, service, path, PROPERTIES, "Get", arguments, timeout_ms, lambda reply: done(_property(reply)))


def table(
    connection: Any, service: str, path: str, interface: str, method: str, lists: Sequence[Sequence[str]],
    columns: Sequence[int], timeout_ms: int, done: Callable[[Iterable[tuple[str, ...]] | None], None],
) -> None:
    """Hand over columns, which must be strings, of the table that a method whose arguments are lists returns.

    The rows are good until done() returns; it gets None if the call failed.
    """
    strings = [(c_char_p * len(words))(*(word.encode() for word in words)) for words in lists]
    arguments = (c_void_p * len(lists))(*(_new_strv(words, len(words)) for words in strings))

    def answered(reply: int | None) -> None:
        done(_columns(columns, reply) if reply else None)

    _ask(connection, service, path, interface, method, _new_tuple(arguments, len(lists)), timeout_ms, answered)


def _ask(
    connection: Any, service: str, path: str, interface: str, method: str, arguments: int, timeout_ms: int,
    done: Callable[[int | None], None],
) -> None:
    def answered(source: int, result: int) -> None:
        reply = _call_finish(source, result, None)
        try:
            done(reply)
        finally:
            if reply:
                _unref(reply)

    words = (word.encode() for word in (service, path, interface, method))
    _call(address(connection), *words, arguments, None, 0, timeout_ms, None, _ready, _expect(answered))


@cache
def _get_arguments(interface: str, name: str) -> int:
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


def _property(reply: int | None) -> str | list[str] | None:
    """Return what Get has answered, None of a type other than string and array of strings."""
    if not reply:
        return None
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
    """Yield some columns of an answer that is an array of structures."""
    with _inside(reply, 0) as rows:
        for position in range(_children(rows)):
            with _inside(rows, position) as row:
                found = []
                for column in columns:
                    with _inside(row, column) as cell:
                        found.append(_text(cell))
            yield tuple(found)


# Timers ---------------------------------------------------------------------------------------


def after(milliseconds: int, function: Callable[[], bool], priority: int = GLib.PRIORITY_DEFAULT) -> int:
    """Call a function from the main loop, again and again while it returns True; return the number to cancel() by."""
    number = next(_numbers)
    _timers[number] = function, _timeout_add(priority, milliseconds, _due, number, None)
    return number


def cancel(number: int) -> None:
    """Take back after()."""
    _, source = _timers.pop(number)
    GLib.source_remove(source)


def _fire(number: int) -> bool:
    function, _ = _timers[number]
    more = False
    try:
        more = function()
    except Exception:
        sys.excepthook(*sys.exc_info())
    if not more:
        _timers.pop(number, None)
    return more


_due = _SourceFunc(_fire)

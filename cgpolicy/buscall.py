# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls to other services that are answered later, and timers, at no lasting cost.

PyGObject makes a C function of the callback of each asynchronous call and of each timeout_add(). That of Debian 12
(3.42) never frees it, about 140 bytes a call: on a host where units come and go, tens of megabytes a day. Here all
calls share one such function.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

from gi.repository import Gio, GLib, GObject

# The values of the answer, or None and the name of the error.
Done = Callable[[tuple[Any, ...] | None, str], None]


class _Error(ctypes.Structure):
    """GError (glib/gerror.h)."""

    _fields_ = (("domain", ctypes.c_uint32), ("code", ctypes.c_int), ("message", ctypes.c_char_p))


_gio = ctypes.CDLL("libgio-2.0.so.0")
_AsyncReadyCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_gio.g_dbus_connection_send_message_with_reply.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
    _AsyncReadyCallback, ctypes.c_void_p,
]
_gio.g_dbus_connection_send_message_with_reply.restype = None
_gio.g_dbus_connection_send_message_with_reply_finish.argtypes = [
    ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.POINTER(_Error)),
]
_gio.g_dbus_connection_send_message_with_reply_finish.restype = ctypes.c_void_p
_gio.g_object_unref.argtypes = [ctypes.c_void_p]
_gio.g_list_store_append.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_gio.g_list_store_append.restype = None

_glib = ctypes.CDLL("libglib-2.0.so.0")
_SourceFunc = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_glib.g_timeout_add.argtypes = [ctypes.c_uint, _SourceFunc, ctypes.c_void_p]
_glib.g_timeout_add.restype = ctypes.c_uint
_glib.g_error_free.argtypes = [ctypes.POINTER(_Error)]
_glib.g_error_free.restype = None

_numbers = itertools.count(1)
_timers: dict[int, tuple[Callable[[], bool], int]] = {}
_under_way: dict[int, Done] = {}
_finished = Gio.ListStore.new(GObject.Object)  # where PyGObject can take over what C has


def address(thing: Any) -> int:
    """Return where the C object is that PyGObject wraps."""
    return hash(thing)


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
    number = next(_numbers)
    _under_way[number] = done
    _gio.g_dbus_connection_send_message_with_reply(
        address(connection), address(message), 0, timeout_ms, None, None, _ready, number
    )


def _answered(source: int, result: int, number: int) -> None:
    done = _under_way.pop(number)
    error = ctypes.POINTER(_Error)()
    answer = _gio.g_dbus_connection_send_message_with_reply_finish(source, result, ctypes.byref(error))
    if not answer:  # in time, or the connection is gone
        message = error.contents.message.decode()
        _glib.g_error_free(error)
        done(None, message)
        return
    _gio.g_list_store_append(address(_finished), answer)
    _gio.g_object_unref(answer)
    reply = _finished.get_item(0)
    _finished.remove_all()
    if reply.get_message_type() == Gio.DBusMessageType.ERROR:
        done(None, reply.get_error_name())
        return
    body = reply.get_body()
    done(body.unpack() if body is not None else (), "")


_ready = _AsyncReadyCallback(_answered)


def after(milliseconds: int, function: Callable[[], bool]) -> int:
    """Call a function from the main loop, again and again while it returns True; return the number to cancel() by."""
    number = next(_numbers)
    _timers[number] = function, _glib.g_timeout_add(milliseconds, _fire, number)
    return number


def cancel(number: int) -> None:
    """Take back after()."""
    _, source = _timers.pop(number)
    GLib.source_remove(source)


def _due(number: int) -> bool:
    function, _ = _timers[number]
    more = False
    try:
        more = function()
    finally:
        if not more:
            _timers.pop(number, None)
    return more


_fire = _SourceFunc(_due)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Thousands of D-Bus objects of one interface for the memory of one (g_dbus_connection_register_subtree()).

Each object that is registered by itself costs nearly a kibibyte, idle or not. PyGObject cannot register a subtree,
whose functions are C's.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable
from ctypes import POINTER, c_char_p, c_size_t, c_uint, c_void_p
from typing import Any

from cgpolicy.rawglib import INVOCATIONS_COUNTED, address, function, gio, glib, object_unref, wrapped

_Enumerate = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_char_p, c_char_p, c_void_p)
_Introspect = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_char_p, c_char_p, c_char_p, c_void_p)
_Dispatch = ctypes.CFUNCTYPE(
    c_void_p, c_void_p, c_char_p, c_char_p, c_char_p, c_char_p, POINTER(c_void_p), c_void_p
)
_MethodCall = ctypes.CFUNCTYPE(
    None, c_void_p, c_char_p, c_char_p, c_char_p, c_char_p, c_void_p, c_void_p, c_void_p
)


class _SubtreeVTable(ctypes.Structure):
    _fields_ = [
        ("enumerate", _Enumerate), ("introspect", _Introspect), ("dispatch", _Dispatch), ("padding", c_void_p * 8)
    ]


class _InterfaceVTable(ctypes.Structure):
    # Without getter and setter GDBus hands Properties.Get and .Set to method_call, which can answer later.
    _fields_ = [("method_call", _MethodCall), ("get", c_void_p), ("set", c_void_p), ("padding", c_void_p * 8)]


DISPATCH_TO_UNENUMERATED_NODES = 1

_register = function(
    gio, "g_dbus_connection_register_subtree", c_uint,
    c_void_p, c_char_p, POINTER(_SubtreeVTable), c_uint, c_void_p, c_void_p, c_void_p,
)
_info_ref = function(gio, "g_dbus_interface_info_ref", c_void_p, c_void_p)
_malloc0 = function(glib, "g_malloc0", c_void_p, c_size_t)
_strdup = function(glib, "g_strdup", c_void_p, c_char_p)


def _references(number: int) -> int:
    """Return a GObject's count of references, which is public: struct _GObject has had it in this place ever since."""
    return int(c_uint.from_address(number + ctypes.sizeof(c_void_p)).value)


Call = Callable[[str, str, Any, Any], None]  # label of the object, method, arguments, invocation


class Subtree:
    """Objects below a path, each under a label, all with one interface.

    exists tells whether there is one, labels lists them for those who introspect the path. Calls, and getting and
    setting of properties, come as they are on the bus; GDBus has checked them against the interface.
    """

    def __init__(
        self, connection: Any, path: str, interface: Any, exists: Callable[[str], bool],
        labels: Callable[[], Iterable[str]], call: Call,
    ) -> None:
        self._interface = interface
        self._exists = exists
        self._labels = labels
        self._call = call
        self._objects = _InterfaceVTable(_MethodCall(self._called))
        self._vtable = _SubtreeVTable(
            _Enumerate(self._enumerate), _Introspect(self._introspect), _Dispatch(self._dispatch)
        )
        number = _register(
            address(connection), path.encode(), ctypes.byref(self._vtable), DISPATCH_TO_UNENUMERATED_NODES, None, None,
            None,
        )
        if not number:
            raise RuntimeError(f"{path} is taken on this connection")

    def _enumerate(self, connection: int, sender: bytes, path: bytes, data: int) -> int:
        labels = list(self._labels())
        found = (c_void_p * (len(labels) + 1)).from_address(_malloc0(ctypes.sizeof(c_void_p) * (len(labels) + 1)))
        for position, label in enumerate(labels):
            found[position] = _strdup(label.encode())
        return ctypes.addressof(found)

    def _introspect(self, connection: int, sender: bytes, path: bytes, node: bytes | None, data: int) -> int | None:
        if node is None or not self._exists(node.decode()):
            return None
        found = (c_void_p * 2).from_address(_malloc0(2 * ctypes.sizeof(c_void_p)))
        found[0] = _info_ref(address(self._interface))
        return ctypes.addressof(found)

    def _dispatch(
        self, connection: int, sender: bytes, path: bytes, interface: bytes, node: bytes | None, out_data: Any,
        data: int,
    ) -> int | None:
        if node is None or not self._exists(node.decode()):
            return None
        return ctypes.addressof(self._objects)

    def _called(
        self, connection: int, sender: bytes, path: bytes, interface: bytes, method: bytes, arguments: int,
        number: int, data: int,
    ) -> None:
        # Nothing may be raised through GLib: ctypes would only print it, and not as the daemon's other errors.
        with contextlib.suppress(Exception):
            try:
                before = _references(number)
                invocation = wrapped(number)
                # PyGObject's own is one; older ones leave another behind.
                for _ in range(_references(number) - before - 1):
                    object_unref(number)
                if INVOCATIONS_COUNTED:
                    object_unref(number)  # came with the call, and not through PyGObject
                label = path.decode().rpartition("/")[2]
                self._call(label, method.decode(), invocation.get_parameters(), invocation)
            except Exception:
                sys.excepthook(*sys.exc_info())

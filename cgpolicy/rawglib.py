# SPDX-License-Identifier: LGPL-2.1-or-later
"""GLib's own functions, called by ctypes, for what PyGObject cannot do or loses memory with."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from typing import Any

from gi.repository import Gio, GLib, GObject

# Since then PyGObject knows that a call's invocation is handed over to whoever is to answer it, and keeps the count.
# Before, the reference that comes with a call has to be dropped by hand.
INVOCATIONS_COUNTED = (GLib.MAJOR_VERSION, GLib.MINOR_VERSION) >= (2, 84)

glib = ctypes.CDLL("libglib-2.0.so.0")
gio = ctypes.CDLL("libgio-2.0.so.0")
_gobject = ctypes.CDLL("libgobject-2.0.so.0")


def function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """Return a C function with the types of its result and arguments."""
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


def address(thing: Any) -> int:
    """Return where the C object is that PyGObject wraps: what its hash() is."""
    return hash(thing)


object_unref = function(_gobject, "g_object_unref", None, c_void_p)
_append = function(gio, "g_list_store_append", None, c_void_p, c_void_p)
_handed_over = Gio.ListStore.new(GObject.Object)  # C puts an object in, PyGObject takes it out


def wrapped(number: int) -> Any:
    """Return PyGObject's wrapper, with a reference of its own, of the object at an address."""
    _append(address(_handed_over), number)
    wrapper = _handed_over.get_item(0)
    _handed_over.remove_all()
    return wrapper

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception type for what a user can put right."""


QUOTED_MAX = 256  # characters, of which each may become ten


def quoted(text: str) -> str:
    """Return somebody's text in quotes for a message, cut if it is long.

    What a client of the bus sends may be 128 MiB, and an answer longer than that ends the connection.
    """
    return repr(text) if len(text) <= QUOTED_MAX else f"{text[:QUOTED_MAX]!r}..."


class UserError(Exception):
    """A failure that names what is wrong and, as hint, the next step.

    ``bus_name`` is the last part of the D-Bus error name, org.cgpolicy1.Error.<bus_name>
    (docs: org.cgpolicy1(5)).
    """

    bus_name = "Failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidAction(UserError):
    bus_name = "InvalidAction"


class InvalidUnitName(UserError):
    bus_name = "InvalidUnitName"


class InvalidMachineName(UserError):
    bus_name = "InvalidMachineName"


class NoSuchUnit(UserError):
    bus_name = "NoSuchUnit"


class NotSupported(UserError):
    """The unit type, the kernel or the cgroup has no such setting."""

    bus_name = "NotSupported"


class NotAuthorized(UserError):
    bus_name = "NotAuthorized"


class WriteFailed(UserError):
    """A drop-in, a machine rule or a cgroup file could not be written; the old content stands."""

    bus_name = "WriteFailed"

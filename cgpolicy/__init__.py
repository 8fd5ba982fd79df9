# SPDX-License-Identifier: LGPL-2.1-or-later
"""cgpolicy: what happens to a systemd unit when its dirty page cache is lost."""

__version__ = "0.1"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Virtual machines to run cgpolicy in: a kernel, a Debian image, a machine, a channel into it."""

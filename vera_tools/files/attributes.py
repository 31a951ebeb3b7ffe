"""What a file or folder has beside its content: owner, group, permissions and extended attributes, ACLs among them."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def keep(old: Path, new: Path, *, follow_symlinks: bool = True) -> None:
    """Give `new` the owner, permissions (setgid included) and extended attributes of `old`, as far as we may.

    Raises:
        OSError: one of them cannot be looked at.
    """
    status = old.stat(follow_symlinks=follow_symlinks)
    # Only root may give a file away, and Windows has no owners of this kind.
    with contextlib.suppress(PermissionError, AttributeError):
        os.chown(new, status.st_uid, status.st_gid, follow_symlinks=follow_symlinks)
    _keep_extended(old, new, follow_symlinks=follow_symlinks)
    if follow_symlinks:
        # After the owner, whose change takes setuid and setgid away, and after the attributes, which only who may write
        # to a file may set: it may be read-only.
        new.chmod(status.st_mode & 0o7777)


def keep_group(old: Path, new: Path) -> None:
    """Give a new folder the group of `old`, and its setgid bit, so that what is made in it has the same group."""
    status = old.stat()
    with contextlib.suppress(PermissionError, AttributeError):
        os.chown(new, -1, status.st_gid)
    new.chmod(stat.S_IMODE(new.stat().st_mode) | status.st_mode & stat.S_ISGID)


def _keep_extended(old: Path, new: Path, *, follow_symlinks: bool) -> None:
    if not hasattr(os, "listxattr"):
        return
    # Some belong to the system alone, and some file systems have none.
    with contextlib.suppress(OSError):
        for name in os.listxattr(old, follow_symlinks=follow_symlinks):
            with contextlib.suppress(OSError):
                value = os.getxattr(old, name, follow_symlinks=follow_symlinks)
                os.setxattr(new, name, value, follow_symlinks=follow_symlinks)

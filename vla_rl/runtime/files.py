"""Files that are whole or absent: written to a temporary name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vla_rl.runtime.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden path into one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left while writing {path}; what was finished before is kept, free some space and run the same command again"
            ) from error
        if error.errno in (
            errno.EACCES,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EPERM,
            errno.EISDIR,
            errno.EEXIST,
            errno.ENAMETOOLONG,
            errno.ENOENT,
        ):
            raise UserError(f"cannot use {error.filename or path}: {error.strerror}") from error
        raise


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep every other command off a folder (made if missing) or a file until this one ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    made = not path.exists()
    with disk_errors(path):
        if made:
            path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is working on {path}; wait for it, or choose another place") from error
        except OSError:
            pass  # a network file system that knows no locks
        yield
    finally:
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()  # nothing came of it; a folder with something in it stays


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary path beside ``path``, make it durable and rename it into place.

    Raises:
        UserError: the disk is full or the place forbidden; nothing half-written is left.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomically(path, lambda p: _write(p, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically; a number that JSON cannot hold (NaN, infinity) is refused."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raise UserError if the file is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no file {str(path)!r}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def append_line(path: Path, line: str) -> None:
    """Append one line durably. A line cut short by a kill is dropped by ``read_lines``."""
    with disk_errors(path), path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[str]:
    """Return the complete lines of a file that may end in a line cut short, and cut that line off."""
    if not path.exists():
        return []
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole) + len(newline))
    return whole.decode().splitlines()


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary directory with ``write`` and rename it to ``path``, which must not exist."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            _fsync_directory(temporary)
            os.rename(temporary, path)
            _fsync_directory(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def copy_directory(source: Path, target: Path) -> None:
    """Copy a directory to a place that does not exist; whole or not at all."""

    def fill(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    write_directory(target, fill)


def sha256_file(path: Path) -> str:
    """Content hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Content hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_tree(path: Path) -> str:
    """Content hash of a file, or of the names and contents of all files below a directory."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != TEMPORARY_SUFFIX)
    return sha256_text("\n".join(f"{p.relative_to(path)} {sha256_file(p)}" for p in files))

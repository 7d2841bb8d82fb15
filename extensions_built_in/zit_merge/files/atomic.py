"""Whole files or none: written beside their place under a lock, synced, then renamed.

A reader sees the old file or the new one, never a part. A part begins with a mark until the rest of it is on the disk, and where
the file system has modes it has the sticky bit, which means nothing on a file, until it has its final name: by these, what a
killed run left is recognised and overwritten. Anything else in its place stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import SettingError, ZitMergeError

_MARK = b"zit_merge.part\n\n"
PART_KEY = _MARK.decode().strip()  # of the metadata of a LoRA that never gets its final name, before all others


def part_path(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".part")


def check_part(path: Path) -> None:
    """Raises unless the part of a file can be written: there is none, or one of ours.

    Raises:
        SettingError: Something else is in its place.
    """
    with contextlib.suppress(OSError), contextlib.closing(_open_part(part_path(path))) as part:
        _check_ours(part, part_path(path))


def check_unused(path: Path) -> None:
    """Raises if another run is writing a file now."""
    with contextlib.suppress(OSError), contextlib.closing(_open_part(part_path(path))) as part:
        if _lock(part) is False:
            raise _in_use(part_path(path))


def remove_part(path: Path) -> None:
    """Removes what a killed run left of a file; a part that another run is writing now stays, and stops this one in its turn."""
    _remove_ours(part_path(path))


def remove_parts(folder: Path) -> None:
    """Removes what killed runs left in a folder. On a disk without locks nobody knows which of them are dead: all stay."""
    for part in folder.glob("*.part") if folder.is_dir() else ():
        _remove_ours(part, sure=True)


def _remove_ours(part: Path, *, sure: bool = False) -> None:
    with contextlib.suppress(OSError, ZitMergeError), contextlib.closing(_open_part(part)) as file:
        is_mine = _lock(file)
        if sure and not os.fstat(file.fileno()).st_size:
            return  # another run may have made it just now
        if (is_mine or (is_mine is None and not sure)) and _is_still(file, part):
            _check_ours(file, part)
            if os.name == "nt":  # Windows removes no open file
                file.close()
            _tidy(part.with_name(part.name.removesuffix(".part")))
            part.unlink()


@contextlib.contextmanager
def hold_part(part: Path) -> Iterator[None]:
    """Keeps a finished part, which later steps read, from other runs; removes it at the end.

    Args:
        part: Its path.

    Raises:
        ZitMergeError: Another run has taken it.
    """
    with os_errors(part):
        file = _open_part(part)
    try:
        if _lock(file) is False:
            raise _in_use(part)
        yield
    finally:
        file.close()
        _remove_ours(part)


def copy_file(source: Path, folder: Path) -> Path:
    """Puts a whole file into another folder under its own name.

    Args:
        source: The file.
        folder: Where the copy goes.
    """
    target = folder / source.name
    with os_errors(target), source.open("rb") as whole:
        return write_whole(target, iter(lambda: whole.read(1 << 22), b""))


def write_whole(path: Path, chunks: Iterable[bytes]) -> Path:
    """Writes a file beside its place, syncs and renames it: an older one is replaced at once or not at all, nothing is left over.

    Args:
        path: The file.
        chunks: Its content.

    Raises:
        ZitMergeError: It can't be written, or another process is writing it now.
    """
    with os_errors(path), open_exclusively(part_path(path)) as part:
        try:
            head = b""
            for chunk in chunks:
                if len(head) < len(_MARK):
                    head, chunk = (head + chunk)[: len(_MARK)], chunk[len(_MARK) - len(head) :]
                part.write(chunk)
            seal(part, head)
            publish_file(part, part_path(path), path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.close()
            part_path(path).unlink(missing_ok=True)
            raise
    return path


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Makes a folder beside its place and moves it there when it is whole; an older one of this name is replaced.

    A part of the folder's name holds the lock meanwhile: by it, what a killed run left is recognised and removed.

    Args:
        path: The folder.

    Yields:
        Where its files are written.

    Raises:
        ZitMergeError: It can't be written, another process is writing it now, or something else is in its place.
    """
    part, work = part_path(path), _work_folder(path)
    new, old = (work / name for name in _OF_WORK)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(work) and not (part.exists() and _is_work(work)):
            raise _in_the_way(work)
        lock = open_exclusively(part)
        try:
            _tidy(path)
            new.mkdir(parents=True)
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
            _sync_folder(path.parent)
        finally:
            _tidy(path)
            lock.close()
            _remove_ours(part)


_OF_WORK = ("new", "old")  # what is written, and the older one that it replaces


def _work_folder(path: Path) -> Path:
    """Where a folder lies until it is whole, and the older one while it is replaced."""
    return path.with_name(f"{path.name}.parts")


def _is_work(work: Path) -> bool:
    return work.is_dir() and not work.is_symlink() and {p.name for p in work.iterdir()} <= set(_OF_WORK)


def _tidy(path: Path) -> None:
    """Removes what is left of the writing of a folder; an older one whose place is empty goes back there."""
    work = _work_folder(path)
    if not _is_work(work):
        return
    old = work / _OF_WORK[1]
    if old.is_dir() and not os.path.lexists(path):
        old.rename(path)
    shutil.rmtree(work, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network disks sync no folders; the file itself is safe
        os.fsync(opened)
    os.close(opened)


def seal(part: BinaryIO, head: bytes) -> None:
    """Puts the first bytes of a part in the place of its mark, once the rest is on the disk.

    Args:
        part: The part, open.
        head: As many bytes as the mark has, or more; fewer are the whole file.
    """
    part.flush()
    os.fsync(part.fileno())
    part.seek(0)
    part.write(head)
    if len(head) < len(_MARK):
        part.truncate()
    part.flush()
    os.fsync(part.fileno())


def publish_file(file: BinaryIO, part: Path, path: Path) -> None:
    """Renames a synced part file to its final name and makes the rename durable.

    Args:
        file: The part, open.
        part: Its path.
        path: The final name.
    """
    if os.name == "nt":  # Windows renames no open file
        file.close()
    os.replace(part, path)
    _stick(file, False)
    file.close()
    _sync_folder(path.parent)


def open_exclusively(path: Path) -> BinaryIO:
    """Opens a part for writing, under a lock that ends with this process; what a dead process left of one is overwritten.

    Returns:
        The file, with the mark at its start and positioned behind it: see `seal`.

    Raises:
        ZitMergeError: Another process is writing it now, or something else is in its place.
    """
    with os_errors(path):
        while True:
            try:
                file = _open_part(path)
            except FileNotFoundError:
                try:
                    file = _open_part(path, os.O_CREAT | os.O_EXCL)
                except FileExistsError:
                    continue
            try:
                if _lock(file) is False:
                    raise _in_use(path)
                if os.name == "nt" or _is_still(file, path):
                    _check_ours(file, path)
                    file.seek(0)
                    file.truncate()
                    file.write(_MARK)
                    file.flush()
                    _stick(file, True)
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # it was published under its final name between open and lock: that file is not ours to empty


def _open_part(path: Path, more: int = 0) -> BinaryIO:
    """Opens a part as it is; neither through a link, nor a pipe that waits.

    Raises:
        FileNotFoundError: It is not there.
        ZitMergeError: It is no regular file.
    """
    if not more and not stat.S_ISREG(os.lstat(path).st_mode):
        raise _in_the_way(path)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        more |= getattr(os, name, 0)
    return os.fdopen(os.open(path, os.O_RDWR | more, 0o666), "r+b")


def _check_ours(part: BinaryIO, path: Path) -> None:
    """Raises unless an open file is a part that zit_merge wrote, under no other name, or empty."""
    facts = os.fstat(part.fileno())
    part.seek(0)
    is_marked = facts.st_mode & stat.S_ISVTX or not facts.st_size or PART_KEY.encode() in part.read(64)
    if facts.st_nlink > 1 or not stat.S_ISREG(facts.st_mode) or not is_marked:
        raise _in_the_way(path)


def _stick(file: BinaryIO, on: bool) -> None:
    """Sets or clears the sticky bit of an open file, where there is one."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        os.fchmod(file.fileno(), mode | stat.S_ISVTX if on else mode & ~stat.S_ISVTX)


def _in_the_way(path: Path) -> SettingError:
    return SettingError(f"{path}: is in the way and was not left by zit_merge, which writes there first: move it away")


def _in_use(path: Path) -> ZitMergeError:
    return ZitMergeError(f"{path}: another run is writing this file now: wait for it or stop it")


def _is_still(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one that lies at `path`."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _lock(file: BinaryIO) -> bool | None:
    """Takes the system's lock on an open file; False if another process has it, None on a disk without locks."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file.fileno(), 1 << 40, os.SEEK_SET)  # behind the end: bytes that are locked can't be read
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]  # of Windows
            finally:
                os.lseek(file.fileno(), 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return False if e.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """The system's errors as one sentence that says what to do."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            smaller = " or a smaller rank" if path.suffix == ".safetensors" else ""
            raise ZitMergeError(f"{path}: no space left on the disk: free some, or set another output_dir{smaller}") from e
        raise ZitMergeError(f"{path}: can't be written ({e.strerror}): check the folder and its permissions") from e

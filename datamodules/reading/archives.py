"""Safe unpacking of archives from elsewhere: checked before a byte is written, unpacked whole or not at all.

An archive may name files outside of its folder, hold links and devices, or be a few kilobytes that unpack to
terabytes. ``extract`` refuses these. Sizes that are stated are added up; compressed streams, of which nothing is stated
that could be relied on, are read once and counted, up to the limit and no further.

Read are ``.zip``, ``.tar`` plain or compressed, and single files compressed by gzip, bzip2 or xz.
"""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

MAX_BYTES = 256 * 2**30
"""Bytes that an archive may unpack to. ImageNet's training images, the largest of the known sets, are 138 GB."""
MAX_RATIO = 200
"""Bytes unpacked for each byte of the archive. Images hardly shrink, lists of names some tenfold."""
MAX_MEMBERS = 1_000_000
"""Files and folders. Food101 has a hundred thousand."""
HARMLESS = 64 * 2**20
"""Bytes that may come out of an archive whatever its ratio."""
MAX_DEPTH = 32
"""Folders inside each other."""
MAX_HEADER = 2**20
"""Bytes of a tar archive's extended headers, which are read into memory."""

_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".tbz": bz2.open,
    ".tbz2": bz2.open,
    ".xz": lzma.open,
    ".txz": lzma.open,
}
_TARS = {".tar", ".tgz", ".tbz", ".tbz2", ".txz"}
_HEADERS = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, lzma.LZMAError, EOFError)


class UnsafeArchiveError(ValueError):
    """An archive that is not unpacked, because of what is in it. Its message is one line with the path."""


@dataclass(frozen=True)
class _Member:
    """A file or a folder in an archive; ``open`` is None for a folder."""

    name: str
    size: int
    open: Callable[[], Any] | None


def check(
    path: str | os.PathLike[str],
    max_bytes: int = MAX_BYTES,
    max_ratio: float = MAX_RATIO,
    max_members: int = MAX_MEMBERS,
) -> None:
    """Checks an archive's members and sizes, and writes nothing.

    Args:
        path: The archive; its ending says what it is.
        max_bytes: What it may unpack to.
        max_ratio: What it may unpack to, in multiples of its own size; 64 MiB are always allowed.
        max_members: Files and folders it may hold.

    Raises:
        UnsafeArchiveError: If it would unpack to more, or holds links, devices, or names that lead out of its folder.
        ValueError: If it is damaged, or no archive of a known kind.
    """
    path = Path(path)
    limit = _limit(path, max_bytes, max_ratio)
    total = 0
    with _damage(path), _opened(path, limit) as members:
        for count, member in enumerate(members, 1):
            if count > max_members:
                raise UnsafeArchiveError(f"{path} is not unpacked: it holds more than {max_members:,} files")
            _place(path, member.name)
            total += member.size
            if total > limit:
                raise _too_large(path, limit)


def extract(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    max_bytes: int = MAX_BYTES,
    max_ratio: float = MAX_RATIO,
    max_members: int = MAX_MEMBERS,
) -> None:
    """Unpacks an archive that passes :func:`check` into a folder.

    It is unpacked beside and moved to its place at the end: what is interrupted leaves a hidden folder, never half of
    a set. Owners, permissions and times of the archive are not taken over.

    Args:
        path: The archive.
        to: The folder, which may hold other files.
        max_bytes, max_ratio, max_members: See :func:`check`.

    Raises:
        UnsafeArchiveError, ValueError: See :func:`check`.
        OSError: If the folder cannot be written to.
    """
    path, to = Path(path), Path(to)
    check(path, max_bytes, max_ratio, max_members)
    to.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=to))
    try:
        with _damage(path), _opened(path, _limit(path, max_bytes, max_ratio)) as members:
            for member in members:
                place = beside / _place(path, member.name)
                if member.open is None:
                    place.mkdir(parents=True, exist_ok=True)
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, open(place, "wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
        _settle(beside, to)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _limit(path: Path, max_bytes: int, max_ratio: float) -> int:
    return int(min(max_bytes, max(HARMLESS, max_ratio * path.stat().st_size)))


def _too_large(path: Path, limit: int) -> UnsafeArchiveError:
    return UnsafeArchiveError(
        f"{path} is not unpacked: its {path.stat().st_size:,} bytes would become more than {limit:,}"
    )


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Raises ValueError, in a line, for a damaged archive."""
    try:
        yield
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged, or no archive of its kind: {error}") from error


@contextmanager
def _opened(path: Path, limit: int) -> Iterator[Iterator[_Member]]:
    """The members of an archive, each to be read before the next is asked for."""
    opener = _OPENERS.get(path.suffix)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield _zipped(archive)
    elif path.suffix in _TARS or (opener and Path(path.stem).suffix == ".tar"):
        with (opener or open)(path, "rb") as file:
            # A plain one is skipped through from header to header: of 138 GB, a second's work.
            stream: Any = _Counted(path, file, limit) if opener else file
            with tarfile.open(str(path), fileobj=stream, mode="r|" if opener else "r:", tarinfo=_Header) as tar:
                yield _tarred(path, tar)
    elif opener:
        with opener(path, "rb") as file:
            counted = _Counted(path, file, limit)
            yield iter([_Member(path.stem, counted.measure(), partial(opener, path, "rb"))])
    else:
        raise ValueError(f"{path} is no archive of a known kind: expected .zip, .tar, {', '.join(_OPENERS)}")


def _zipped(archive: zipfile.ZipFile) -> Iterator[_Member]:
    for info in archive.infolist():
        mode = info.external_attr >> 16
        if mode & 0o170000 not in (0, 0o100000, 0o040000):  # what Unix programs say of a file's kind
            raise UnsafeArchiveError(f"{archive.filename} is not unpacked: {info.filename} is a link or a device")
        # Reading ends at the stated size, whatever the compressed bytes hold beyond.
        yield _Member(info.filename, info.file_size, None if info.is_dir() else partial(archive.open, info))


def _tarred(path: Path, tar: tarfile.TarFile) -> Iterator[_Member]:
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # they would all be kept
        if not (info.isreg() or info.isdir()):
            raise UnsafeArchiveError(f"{path} is not unpacked: {info.name} is a link or a device")
        yield _Member(info.name, info.size, None if info.isdir() else partial(tar.extractfile, info))


def _place(path: Path, name: str) -> PurePosixPath:
    """The relative path of a member, below the folder that the archive is unpacked to."""
    place, there = PurePosixPath(name.replace("\\", "/")), PureWindowsPath(name)
    if place.is_absolute() or there.drive or ".." in place.parts or len(place.parts) > MAX_DEPTH or "\0" in name:
        raise UnsafeArchiveError(f"{path} is not unpacked: {name!r:.200} leads out of its folder, or far too deep")
    return place


def _settle(source: Path, target: Path) -> None:
    """Moves what is in a folder into another on the same disk; folders that are in both are merged."""
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _settle(entry, place)
        else:
            os.replace(entry, place)


class _Counted:
    """A stream that ends with an error where it has given more than it may."""

    def __init__(self, path: Path, file: IO[bytes], limit: int) -> None:
        self.path, self.file, self.limit, self.total = path, file, limit, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.total += len(data)
        if self.total > self.limit:
            raise _too_large(self.path, self.limit)
        return data

    def measure(self) -> int:
        """Number of bytes from here to the end."""
        while self.read(2**20):
            pass
        return self.total


class _Header(tarfile.TarInfo):
    """A tar archive's header whose extensions, which are read into memory at once, are of reasonable size."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADERS and self.size > MAX_HEADER:
            raise UnsafeArchiveError(f"{tar.name!s} is not unpacked: one of its headers is {self.size:,} bytes long")
        return super()._proc_member(tar)  # type: ignore[misc]

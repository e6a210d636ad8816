"""Looking at checkpoints that lie on the disk, without running code."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from zoo._lightning import rank_zero_warn

SKEW = 60 * 10**9  # nanoseconds by which the clock of a file server may be behind


def damage(path: str | Path) -> str | None:
    """The damage of a checkpoint, in words, or None. It is read once, and no code is run.

    A file has to be the archive that torch writes, with all its records, each as its checksum says. Of a distributed
    checkpoint, a folder, only what is written last is looked for.
    """
    path = Path(path)
    if path.is_dir():
        missing = next((name for name in (".metadata", "meta.pt") if not (path / name).exists()), None)
        return damage(path / "meta.pt") if missing is None else f"it has no {missing}"
    try:
        whole_content(path, "meta")  # without the tensors' bytes
    except pickle.UnpicklingError:  # Python objects, and its bytes are right
        return None
    except DamagedError as error:
        return str(error)
    return None


class DamagedError(ValueError):
    """A checkpoint file that is not as it was written. Its message says in what, without the path."""


def whole_content(path: Path, map_location: str) -> Any:
    """Content of a checkpoint file, after all of its bytes have been compared with their checksums. No code is run.

    Raises:
        DamagedError: If it cannot be read, or is not what was written.
        pickle.UnpicklingError: If it holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # Bit 4 makes a record a folder, in place of which torch's reader gives whatever lies in memory.
            folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
            wrong = folders[0] if folders else archive.testzip()
        if wrong is not None:
            raise DamagedError(f"{wrong} in it is not what was written")
        return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except (DamagedError, pickle.UnpicklingError):
        raise
    except OSError as error:
        reason = error.strerror or str(error)
    except zipfile.BadZipFile:
        reason = "it is empty" if path.stat().st_size == 0 else "it was cut short, or is no checkpoint"
    except Exception as error:  # what a wrong byte makes of an archive's index: a dozen kinds
        reason = f"it cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    raise DamagedError(reason)


def newest(folder: str | Path | Sequence[str | Path], accept: Callable[[Path], bool] | None = None) -> Path | None:
    """The newest whole checkpoint under a folder, by when it was saved; links are not followed.

    When that was is in the checkpoint, since copying a run gives its files new times in any order; where it is not,
    the file's own time counts. Damaged ones that are newer are passed over with a warning.

    Args:
        folder: Where to look, however deep: files and folders named ``*.ckpt``. Several are looked at as one.
        accept: Says of a checkpoint whether it may be taken; :func:`configuration` helps. It is asked before the file
            is read as a whole. None: all are.
    """
    folders = [folder] if isinstance(folder, str | Path) else folder
    paths = (path for place in folders for path in Path(place).rglob("*.ckpt") if not path.is_symlink())
    files = {path.resolve(): path for path in paths}
    found, damaged = newest_of(files.values(), accept)
    for path, reason in damaged:
        instead = f"taking {found}" if found else f"and there is no whole one in {', '.join(map(str, folders))}"
        rank_zero_warn(f"{path} is damaged, {reason}: {instead}")
    return found


def made_by(path: str | Path) -> dict[str, Any]:
    """The provenance in a checkpoint, see :class:`zoo.callbacks.Provenance`; empty if there is none to be read."""
    return _head(Path(path))[0]


def configuration(path: str | Path) -> str | None:
    """The YAML configuration of the run that wrote a checkpoint; None if there is none, or the file cannot be read."""
    found = made_by(path).get("config")
    return found if isinstance(found, str) else None


def hyperparameters_of(path: str | Path) -> dict[str, Any]:
    """The arguments of the module that a checkpoint is of, by name; nothing if it does not say."""
    found = content_of(path).get("hyper_parameters")
    return found if isinstance(found, dict) else {}


def saved_at(path: str | Path) -> int:
    """The time of saving a checkpoint, in nanoseconds since 1970; if it does not say, that of its last change."""
    saved = _head(Path(path))[1]
    return _changed(Path(path)) if saved is None else saved


def _head(path: Path) -> tuple[dict[str, Any], int | None]:
    """The provenance in a checkpoint, and when it was saved."""
    content = content_of(path)
    made, saved = content.get("provenance"), None
    with suppress(AttributeError):  # whatever is in a file that is not ours
        saved = content.get("callbacks", {}).get("Provenance", {}).get("saved")
    return made if isinstance(made, dict) else {}, saved if isinstance(saved, int) else None


def content_of(path: str | Path) -> dict[str, Any]:
    """Content of a checkpoint, its tensors on the meta device and not read; empty if it cannot be read."""
    path = Path(path)
    try:
        content = torch.load(
            path / "meta.pt" if path.is_dir() else path, map_location="meta", weights_only=True, mmap=True
        )
    except Exception:  # whatever a file that is no checkpoint makes torch raise
        return {}
    return content if isinstance(content, dict) else {}


def newest_of(
    paths: Iterable[Path], accept: Callable[[Path], bool] | None = None
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole one of some checkpoints, and the newer ones that are damaged, each with its reason."""
    found, when, damaged = None, -1, []
    changed = {path: _changed(path) for path in paths}
    # Of several names of one file, that which says what it is comes before "last".
    for path in sorted(changed, key=lambda path: (changed[path], not path.stem.startswith("last")), reverse=True):
        if changed[path] < when - SKEW:  # a file is not changed before it is saved: what follows is older
            break
        made, saved = _head(path)
        saved = changed[path] if saved is None else saved
        if saved <= when or (accept is not None and made and not accept(path)):
            continue
        if reason := damage(path):  # such a file does not say whose it is
            damaged.append((saved, path, reason))
        elif accept is None or made or accept(path):
            found, when = path, saved
    return found, [(path, reason) for saved, path, reason in damaged if saved > when]


def _changed(path: Path) -> int:
    """The time of a checkpoint's change, in nanoseconds since 1970: a folder's own time is that of its first file."""
    last = path / "meta.pt"
    try:
        return (last if last.exists() else path).stat().st_mtime_ns
    except OSError:  # another run has just replaced it
        return -1


def free_path(folder: str | Path, name: str, replaceable: Callable[[Path], bool]) -> str:
    """The first of ``NAME.ckpt``, ``NAME-v1.ckpt`` and so on that is not there, or that may be replaced.

    Args:
        folder: A folder, or a URL, where nothing is looked at.
        name: NAME.
        replaceable: Says of a checkpoint that is there whether it may be replaced.
    """
    for number in count():
        path = f"{str(folder).rstrip('/')}/{name}{f'-v{number}' if number else ''}.ckpt"
        if "://" in path or not Path(path).exists() or replaceable(Path(path)):
            return path
    raise AssertionError("there is no end of numbers")


def is_distributed(path: Path) -> bool:
    """True if a folder is one checkpoint, of several processes' parts."""
    return (path / ".metadata").exists() or (path / "meta.pt").exists()


def best_in(folder: str | Path) -> Path | None:
    """The best checkpoint of the newest run in a folder, by its ModelCheckpoint, or else its newest; None without one.

    Only whole ones count: a best one that is damaged is passed over with a warning.
    """
    last = newest(folder)
    best = None if last is None else best_path(content_of(last), last)
    if last is None or best is None or not best.exists():
        return last
    if reason := damage(best):
        rank_zero_warn(f"{best}, the best checkpoint, is damaged, {reason}: taking {last}")
        return last
    return best


def best_path(checkpoint: Mapping[str, Any], path: Path) -> Path | None:
    """The best checkpoint of the run that wrote this one, by its first ModelCheckpoint with a ``monitor``.

    Args:
        checkpoint: Its content.
        path: Where it lies.
    """
    there = checkpoint.get("provenance", {}).get("cwd", "")
    for key, state in checkpoint.get("callbacks", {}).items():
        if "ModelCheckpoint" in key and state.get("monitor") and state["best_model_path"]:
            return moved(state["best_model_path"], state.get("dirpath"), path, there)
    return None


def moved(path: str, dirpath: Any, continued: Path, there: str) -> Path | None:
    """The path of a checkpoint of a run that may have moved: beside the one it is continued from, or where it was."""
    if "://" in path:
        return Path(path)
    places = [Path(there, path), Path(path)]
    if dirpath is not None and "://" not in str(dirpath):
        places.insert(0, Path(os.path.normpath(continued.parent / os.path.relpath(path, dirpath))))
    found = next((place for place in places if place.exists()), None)
    return None if found is None else Path(os.path.relpath(found)) if not Path(path).is_absolute() else found

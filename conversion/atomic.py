"""Files and folders that are complete as soon as they exist: written beside their place, synced, then renamed."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields the path of a temporary sibling, which replaces ``path`` when the block ends, or vanishes when it raises.

    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with new_file(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in folder.iterdir()], (folder / "a.txt").read_text()
    (['a.txt'], 'whole')
    """
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        # mkstemp makes files private; the umask's mode is what any other file of the user would get.
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: str | os.PathLike, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling folder ``target.tmp-…``, which becomes ``target`` when the block ends, or vanishes when it raises.

    With ``overwrite`` the old folder is moved aside only when the new one is complete; its weights are then deleted, and
    what else it held and the new one lacks is moved into the new one. A crash between the two renames leaves both folders,
    complete, as ``target.old-…`` and ``target.tmp-…``.

    Raises:
      FileExistsError: if the target is a file, or a folder that is not empty and ``overwrite`` is False.
      OSError: if the disk has less than ``needed_bytes`` free; the message has both figures.
    """
    target = pathlib.Path(target).absolute()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; expected a folder, or nothing")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty; choose another folder, or say overwrite=True")
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, needed_bytes)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _sync_tree(temporary)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def files_into(folder: str | os.PathLike, *, last: str | None = None) -> Iterator[pathlib.Path]:
    """Yields a temporary folder whose files replace those of ``folder`` when the block ends, each at once; its other files stay.

    ``last`` names the file without which the others mean nothing: it is removed first and put in place last, so that a
    crash in between leaves a folder that is visibly incomplete rather than a mixture of old and new.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        yield temporary
        _sync_tree(temporary)
        if last is not None:
            (folder / last).unlink(missing_ok=True)
            _sync(folder)
        for file in sorted((f for f in temporary.rglob("*") if f.is_file()), key=lambda f: f.name == last):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_space(folder: pathlib.Path, needed_bytes: int) -> None:
    """Raises OSError (ENOSPC), with the figures, if the disk of ``folder`` has less than ``needed_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{folder} has {free / 2**30:.2f} GiB free, but {needed_bytes / 2**30:.2f} GiB are needed")


def _swap(temporary: pathlib.Path, target: pathlib.Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(temporary, target)
        _sync(target.parent)
        return
    old = pathlib.Path(tempfile.mkdtemp(prefix=f"{target.name}.old-", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    _sync(target.parent)
    for path in list(old.iterdir()):
        if not (target / path.name).exists() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            os.replace(path, target / path.name)
    _sync(target)
    shutil.rmtree(old)


def _sync_tree(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # Linux has no way to read the mask but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask

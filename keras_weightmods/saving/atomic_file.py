"""Files that replace others whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
import stat
import time

from keras_weightmods.utils import checks

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# How the names of folders begin that hold unfinished files.
BEGINNING = ".kwm-"
# Seconds after which one that no process has locked is a killed one's.
_ABANDONED = 60


def check_filepath(filepath, overwrite=True):
    """Return the path of the file to write, links followed.

    Raises:
        ValueError: If `filepath` is no place for a file.
        FileExistsError: If there is a file and `overwrite` is False.
    """
    path: str = os.path.realpath(checks.check_path("filepath", filepath))
    is_other = os.path.lexists(path) and not os.path.isfile(path)
    if not os.path.isdir(os.path.dirname(path)) or is_other:
        # A device or a pipe would be replaced by a file, where that is allowed.
        expected = "a regular file, or a new one in a folder that exists"
        raise checks.error("filepath", expected, os.fspath(filepath))
    if not checks.check_bool("overwrite", overwrite) and os.path.exists(path):
        raise FileExistsError(
            "The file exists. Pass `overwrite=True` to replace it. Received: "
            f"filepath={checks.shown(os.fspath(filepath))}, overwrite=False"
        )
    return path


@contextlib.contextmanager
def unfinished(folder):
    """Yield a new hidden folder in `folder`, for unfinished files.

    It goes at the end, and so do those of processes that were killed: a
    process holds a lock on its own.
    """
    for each in pathlib.Path(folder).glob(f"{BEGINNING}*"):
        with contextlib.suppress(OSError), _locked(each):
            if time.time() - each.stat().st_mtime > _ABANDONED:
                shutil.rmtree(each)
    made = pathlib.Path(folder, BEGINNING + secrets.token_hex(8))
    made.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            # Where there are no locks, on some file systems, none is removed.
            with contextlib.suppress(OSError):
                stack.enter_context(_locked(made))
            yield str(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def replace_all(made, names):
    """Move files out of a folder of `unfinished`, in place of old ones.

    On an error all are as before. Nothing reads the others without the last
    file. It goes first and comes last, so a kill leaves no mixture of two
    writes.

    Args:
        made: String, the folder.
        names: List of strings, the files and folders in it.
    """
    folder = os.path.dirname(made)
    moves = [(os.path.join(made, n), os.path.join(folder, n)) for n in names]
    if len(moves) > 1 or any(os.path.isdir(end) for _, end in moves):
        old = [(end, f"{start}.replaced") for start, end in reversed(moves)]
        moves = [each for each in old if os.path.lexists(each[0])] + moves
    try:
        for start, end in moves:
            os.replace(start, end)
    except BaseException:
        for start, end in reversed(moves):
            if os.path.lexists(end) and not os.path.lexists(start):
                os.replace(end, start)
        raise


@contextlib.contextmanager
def _locked(folder):
    """Lock a folder; raise OSError where another process has done so."""
    if fcntl is None:
        raise OSError("no locks")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(filepath):
    """Yield the path of a file to write, which then replaces `filepath`.

    It lies in a folder beside, has the same ending, and gets the rights of the
    file that it replaces. On an error it is removed, and `filepath` stays.
    """
    filepath = check_filepath(filepath)
    folder, name = os.path.split(filepath)
    with unfinished(folder) as made:
        # Short, where the name is as long as the file system allows.
        temporary = os.path.join(made, f"new{pathlib.Path(name).suffix[-32:]}")
        yield temporary
        if os.path.exists(filepath):
            os.chmod(temporary, stat.S_IMODE(os.stat(filepath).st_mode))
        os.replace(temporary, filepath)
        if os.name == "posix":
            # So that the name survives a power cut. Some file systems, of
            # networks mostly, have no such thing.
            descriptor = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
            os.close(descriptor)

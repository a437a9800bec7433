"""Files that replace others whole or not at all."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import secrets
import stat
import time

from keras_weightmods.utils import checks

_DAY = 24 * 60 * 60
# The digest of a name, that of the machine, the process.
_LEFTOVER = re.compile(r"\.kwm-[0-9a-f]{16}-([0-9a-f]{8})-(\d+)-")


def check_filepath(filepath, overwrite=True):
    """Return the path of the file to write, links followed.

    Raises:
        ValueError: If `filepath` is no place for a file.
        FileExistsError: If there is a file and `overwrite` is False.
        OSError: If the file system takes no such name.
    """
    path: str = os.path.realpath(checks.check_path("filepath", filepath))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        # A name that is too long is said before the file is written beside.
        os.lstat(path)
    is_other = os.path.lexists(path) and not os.path.isfile(path)
    if not os.path.isdir(os.path.dirname(path)) or is_other:
        # A device or a pipe would be replaced by a file, where that is allowed.
        expected = "a regular file, or a new one in a folder that exists"
        raise checks.error("filepath", expected, os.fspath(filepath))
    if not checks.check_bool("overwrite", overwrite) and os.path.exists(path):
        raise FileExistsError(
            "The file exists. Pass `overwrite=True` to replace it. Received: "
            f"filepath={os.fspath(filepath)!r}, overwrite=False"
        )
    return path


@contextlib.contextmanager
def replacing(filepath):
    """Yield the path of a file to write, which then replaces `filepath`.

    Of the same ending, and with the rights of the file that it replaces. On an
    error it is removed, and `filepath` stays. What a process that was killed
    has left of an earlier one is removed first.
    """
    filepath = check_filepath(filepath)
    folder, name = os.path.split(filepath)
    remove_leftovers(folder, name)
    # Short, where the name is as long as the file system allows. Not by
    # `tempfile`, which makes files that only their owner may read.
    ending = "".join(pathlib.Path(name).suffixes[-2:])[-32:]
    unique = f"{os.getpid()}-{secrets.token_hex(8)}"
    temporary = os.path.join(folder, f"{_beginning(name)}{unique}{ending}")
    try:
        yield temporary
        if os.path.exists(filepath):
            os.chmod(temporary, stat.S_IMODE(os.stat(filepath).st_mode))
        os.replace(temporary, filepath)
        _sync_folder(folder)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def remove_leftovers(folder, name=None):
    """Remove the unfinished files of processes that were killed.

    Of this machine, whose processes can be asked for; those of others once
    they are a day old.

    Args:
        folder: String.
        name: String, the name of the file that they were to replace; `None`
            for any.
    """
    beginning = ".kwm-" if name is None else _beginning(name, host="")
    for each in os.listdir(folder or "."):
        found = _LEFTOVER.match(each)
        if found is None or not each.startswith(beginning):
            continue
        path = os.path.join(folder, each)
        host, process = found.groups()
        with contextlib.suppress(OSError):
            if host == _host() and _runs(int(process)):
                continue
            is_old = time.time() - os.path.getmtime(path) > _DAY
            if host == _host() or is_old:
                os.remove(path)


def _beginning(name, host=None):
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return f".kwm-{digest[:16]}-{_host() + '-' if host is None else host}"


def _host():
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _runs(process):
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _sync_folder(folder):
    """Have the names in a folder survive a power cut, where that exists."""
    if os.name != "posix":
        return
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems, of networks mostly, have no such thing.
        pass
    finally:
        os.close(descriptor)

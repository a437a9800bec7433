"""Files that replace others whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import stat

from keras_weightmods.utils import checks

# How the names of unfinished files begin.
BEGINNING = ".kwm-"


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
            f"filepath={os.fspath(filepath)!r}, overwrite=False"
        )
    return path


@contextlib.contextmanager
def replacing(filepath):
    """Yield the path of a file to write, which then replaces `filepath`.

    It lies in the same folder, has the same ending, and gets the rights of the
    file that it replaces. On an error it is removed, and `filepath` stays.
    """
    filepath = check_filepath(filepath)
    folder, name = os.path.split(filepath)
    # Short, where the name is as long as the file system allows. Not by
    # `tempfile`, which makes files that only their owner may read.
    ending = pathlib.Path(name).suffix[-32:]
    unique = f"{BEGINNING}{secrets.token_hex(8)}{ending}"
    temporary = os.path.join(folder, unique)
    try:
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
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

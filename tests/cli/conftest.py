import pytest

from keras_weightmods.cli import main as cli


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs words, or a line of them, in a folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(line, code=0):
        words = line.split() if isinstance(line, str) else line
        assert cli.main(words) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.err if code else printed.out

    return run

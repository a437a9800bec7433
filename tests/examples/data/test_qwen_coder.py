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

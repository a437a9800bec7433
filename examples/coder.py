"""A coder from a GGUF file, packed, answers a question.

    python -m examples.coder
    python -m examples.coder "Write a Python function that reverses a list."

Qwen2.5-Coder-0.5B-Instruct (491 MB, downloaded once) in int8. What each form of
its weights solves is measured by `python -m benchmarks.humaneval`. The default
question is answered with

    def is_palindrome(word):
        ...
        # Normalize the word by removing spaces and converting to lowercase
        normalized_word = word.replace(" ", "").lower()
        # Check if the normalized word is equal to its reverse
        return normalized_word == normalized_word[::-1]
"""

from examples import command_line
from examples.data import qwen_coder


def main():
    parser = command_line.make_parser(__doc__)
    command_line.add_backend(parser)
    parser.add_argument(
        "question",
        nargs="?",
        default="Write a Python function that says whether a word is a "
        "palindrome. Code alone.",
    )
    args = parser.parse_args()
    command_line.choose_backend(args.backend)
    answer(args.question)


def answer(question):
    import keras_weightmods as kwm

    model = qwen_coder.load_qwen_coder()
    print(kwm.pack(model, "int8").totals)
    model.compile(sampler="greedy")
    kwm.compile_generate(model)
    template = model.preprocessor.tokenizer.chat_template
    prompt = qwen_coder.chat_prompt(template, question)
    print(model.generate(prompt, max_length=320, strip_prompt=True))


if __name__ == "__main__":
    main()

"""Models, texts and images of the examples, from packages on PyPI."""

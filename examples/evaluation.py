"""Perplexity, as the examples and benchmarks measure it: the library's."""

from keras_weightmods import Perplexity as Perplexity
from keras_weightmods import perplexity as perplexity

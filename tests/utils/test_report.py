import dataclasses
import json

import numpy as np
import pytest

from keras_weightmods.utils.report import Report, Skipped, Table

pytestmark = pytest.mark.one_backend


@dataclasses.dataclass(frozen=True)
class Sizes(Report):
    sizes: dict[str, int]
    skipped: tuple[Skipped, ...] = ()
    array: object = None
    hidden: object = dataclasses.field(default=None, repr=False)
    title: str = "Sizes"
    caption: str = "in bytes"

    @property
    def totals(self):
        return {"size": np.int64(sum(self.sizes.values()))}

    def tables(self):
        total = "whole", str(self.totals["size"])
        rows = list(self.sizes.items())
        yield Table(self.title, rows, "kernel size", total, self.caption)


def make(count, skipped=0, reasons=1, **kwargs):
    sizes = {f"layer_{i}/kernel": i for i in range(count)}
    left_out = tuple(
        Skipped(f"norm_{i}/gamma", f"reason <{i % reasons}>")
        for i in range(skipped)
    )
    return Sizes(sizes, left_out, **kwargs)


def test_print():
    assert str(make(2, 3)) == (
        "Sizes\n"
        "kernel          size\n"
        "────────────────────\n"
        "layer_0/kernel     0\n"
        "layer_1/kernel     1\n"
        "────────────────────\n"
        "whole              1\n"
        "in bytes\n"
        "Left as they are\n"
        "weights  the first     reason\n"
        "─────────────────────────────────\n"
        "      3  norm_0/gamma  reason <0>"
    )
    assert str(make(0)) == "Sizes\nin bytes"
    sizes = Sizes({"x" * 300: 5})
    assert max(map(len, str(sizes).splitlines())) == 100
    assert "…  " in str(sizes)
    assert "x" * 300 in sizes.table()


@dataclasses.dataclass
class Weight:
    name: str
    shape: tuple[int, ...]
    size: int | None


def test_columns_are_attributes_with_formats():
    @dataclasses.dataclass(frozen=True)
    class Weights(Report):
        weights: tuple[Weight, ...]

        def tables(self):
            columns = "the_weight=name shape size:,"
            yield Table("Weights", self.weights, columns)

    rows = Weight("a", (64, 32), 2048), Weight("b", (), None)
    assert str(Weights(rows)).splitlines()[1:] == [
        "the weight  shape    size",
        "─────────────────────────",
        "a           64x32   2,048",
        "b           scalar",
    ]


@pytest.mark.parametrize("reasons", [1, 40])
@pytest.mark.parametrize("words", [1, 60])
@pytest.mark.parametrize("count", [0, 1, 20, 210])
def test_prints_of_at_most_30_lines_lose_no_row(count, words, reasons):
    sizes = make(count, 210, reasons, title="title " * words)
    lines = str(sizes).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    more = sum(int(x.split()[1]) for x in lines if x.startswith("... "))
    shown = sum("/" in line for line in lines)
    assert shown + more == count + reasons
    lines = sizes.table().splitlines()
    assert sum("layer_" in line for line in lines) == count
    assert sum("norm_" in line for line in lines) == 210


def test_to_dict():
    values = make(1, 1, array=np.zeros((2, 3)), hidden=object()).to_dict()
    assert values == {
        "sizes": {"layer_0/kernel": 0},
        "skipped": [{"path": "norm_0/gamma", "reason": "reason <0>"}],
        "array": {"shape": [2, 3], "dtype": "float64"},
        "title": "Sizes",
        "caption": "in bytes",
        "totals": {"size": 0},
    }
    json.dumps(values)


def test_html():
    text = make(1, 1)._repr_html_()
    assert text.startswith("<pre>Sizes\n")
    assert "reason &lt;0&gt;" in text

import numpy as np
from rich.console import Console

from examples import robustness_patch


def test_tables_and_plots(tmp_path):
    names = robustness_patch.CORRUPTIONS
    row = {
        "clean": 0.2,
        "robust": 0.8,
        "scales": {s: [0.9, s / 2] for s in robustness_patch.SCALES},
        "matrix": dict.fromkeys(names, 0.65),
        "statistics replaced": 0.7,
    }
    results = {
        "on_clean": 0.95,
        "bytes": {"model": 1000, "float32": 100, "8 bits": 25},
        "corruptions": dict.fromkeys(names, row),
        "similarity": np.eye(len(names)).tolist(),
    }
    console = Console(width=100)
    with console.capture() as capture:
        console.print(*robustness_patch.tables("resnet_like", results))
    for part in ("0.75", "65.0%", "70.0%", "40.0", "95.0%"):
        assert part in capture.get(), part
    robustness_patch.plot(results, names, tmp_path)
    plots = {path.name for path in tmp_path.iterdir()}
    names = "corruption_by_signature", "scale", "similarity"
    assert plots == {f"{name}.png" for name in names}

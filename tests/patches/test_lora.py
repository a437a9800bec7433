"""Deltas as LoRA adapters against NumPy's SVD and peft."""

import json
import os

import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models
from tests.models import normal, weights_of

pytest.importorskip("keras_hub")

TOKENS = np.array([[3, 1, 4, 1, 5, 9]])
X = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
RANK = 3

# Files, NumPy's SVD, and `low_rank_factors`, which has tests on each backend.
pytestmark = pytest.mark.one_backend


def make(family="llama3", **sizes):
    return models.randomize(models.causal_lm(family, **sizes), scale=0.2)


def change(model, targets):
    """Change kernels; return what was added, {key: array}."""
    added = {}
    for i, target in enumerate(targets):
        new = added[target.key] = 0.1 * normal(*target.shape, seed=i)
        target.variable.assign(target.variable + new)
    return added


@pytest.fixture
def task():
    """A base, the weights of it, a delta, and what it adds to kernels."""
    model = make()
    base = weights_of(model)
    targets = kwm.find_targets(model)
    added = change(model, targets)
    delta = kwm.Patch.from_models(model, base, dtype="float32")
    model.set_weights(base)
    return model, delta, added


def nearest(matrix, rank):
    """The best approximation of a rank, and what it lacks, in float64."""
    u, s, vh = np.linalg.svd(matrix.astype("float64"), full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return kept, (np.sum(s[rank:] ** 2) / np.sum(s**2)) ** 0.5


def matrix_of(target, array):
    """The matrix that peft's factors make, (in, out)."""
    order = (*target.contraction_axes, *target.output_axes)
    size = target.contraction_size
    return array.transpose(order).reshape(size, -1)


def test_peft_s_folder(task, tmp_path):
    from safetensors.numpy import load_file

    model, delta, added = task
    targets = kwm.find_targets(model)
    path = tmp_path / "adapter"
    report = delta.to_lora(model, path, RANK)
    lost = total = 0.0
    for kernel in report.kernels:
        matrix = matrix_of(targets[kernel.key], added[kernel.key])
        _, error = nearest(matrix, RANK)
        assert abs(kernel.error - error) < 1e-4
        lost += np.sum(matrix**2.0) * error**2
        total += np.sum(matrix**2.0)
    assert len(report.kernels) == len(added)
    assert abs(report.error - (lost / total) ** 0.5) < 1e-4
    assert f"{report.error:.1%}" in str(report)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == RANK
    assert config["fan_in_fan_out"] is False
    modules = [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    modules = {f"model.layers.0.{module}" for module in modules}
    assert {*config["target_modules"]} == modules
    arrays = load_file(path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    query = next(t for t in targets if "query" in t.path)
    kept, _ = nearest(matrix_of(query, added[query.key]), RANK)
    a, b = (arrays[key.format("q", which)] for which in "AB")
    np.testing.assert_allclose((b @ a).T, kept, atol=1e-5)

    # Back, and twice as much with another alpha.
    back = kwm.Patch.from_lora(model, path, "float32")
    back.apply(model)
    once = models.numpy(query.variable)
    back.remove(model)
    zero = models.numpy(query.variable)
    np.testing.assert_allclose(matrix_of(query, once - zero), kept, atol=1e-5)
    for changed, times in (
        ({"lora_alpha": 2 * RANK}, 2),
        ({"use_rslora": True}, RANK**0.5),
    ):
        new = json.dumps({**config, **changed})
        (path / "adapter_config.json").write_text(new)
        with kwm.Patch.from_lora(model, path, None).applied(model):
            found = models.numpy(query.variable) - zero
        np.testing.assert_allclose(found, times * (once - zero), atol=1e-5)


def test_what_else_is_in_peft_s_folder_stays(task, tmp_path):
    """A folder as the training of transformers leaves it."""
    model, delta, _ = task
    path, new = tmp_path / "run", tmp_path / "new"
    delta.to_lora(model, new, RANK)
    ours = {p.name: p.read_bytes() for p in new.iterdir()}
    assert sorted(ours) == ["adapter_config.json", "adapter_model.safetensors"]
    path.mkdir()
    for name in ("adapter_config.json", "README.md", "training_args.bin"):
        (path / name).write_text("{}")
    delta.to_lora(model, path, RANK)
    found = {p.name: p.read_bytes() for p in path.iterdir()}
    assert found == {**ours, "README.md": b"{}", "training_args.bin": b"{}"}


def test_a_folder_is_that_of_one_adapter(task, tmp_path, monkeypatch):
    """Killed between any two renames, it is the old one, the new one or none.

    On Ctrl-C it is the old one.
    """
    model, delta, _ = task
    path = tmp_path / "adapter"

    def content():
        return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}

    delta.to_lora(model, path, 2)
    old = content()
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1
    delta.to_lora(model, path, 3)
    new = content()
    replace, seen = os.replace, []

    def watched(start, end):
        replace(start, end)
        seen.append(content())
        if len(seen) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", watched)
    for stop in (1, 2, 3, 4, None):
        seen.clear()
        (path / ".kwm-left").mkdir()
        os.utime(path / ".kwm-left", (0, 0))
        if stop:
            with pytest.raises(KeyboardInterrupt):
                delta.to_lora(model, path, 2)
            assert content() == new
        else:
            delta.to_lora(model, path, 2)
            assert content() == old
        assert len([*path.iterdir()]) == 2
    for each in seen[:-1]:
        assert "adapter_config.json" not in each


def test_peft_multiplies_by_it(task, tmp_path):
    """The logits of the base and the adapter in transformers."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    import torch

    model, delta, added = task
    kwm.export(model, tmp_path / "base", "transformers")
    delta.to_lora(model, tmp_path / "adapter", RANK)
    for target in kwm.find_targets(model):
        kept, _ = nearest(matrix_of(target, added[target.key]), RANK)
        order = (*target.contraction_axes, *target.output_axes)
        shape = [target.shape[axis] for axis in order]
        kept = kept.reshape(shape).transpose(np.argsort(order))
        target.variable.assign(target.variable + kept)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = found(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, models.numpy(model(X)), atol=1e-4)


def test_what_an_adapter_cannot_hold_is_named(tmp_path):
    """GPT-2's query is a part of a tensor there, and biases are no kernels."""
    model = make("gpt2")
    base = weights_of(model)
    targets = kwm.find_targets(model, include=["query", "intermediate"])
    change(model, targets)
    biases = [v for v in model.weights if "intermediate" in v.path]
    biases[1].assign(biases[1] + 1)
    delta = kwm.Patch.from_models(model, base)
    model.set_weights(base)
    with pytest.warns(UserWarning, match="changes of 2 of the patch's 3"):
        report = delta.to_lora(model, tmp_path / "adapter", 16)
    (kernel,) = report.kernels
    assert "intermediate" in kernel.key
    assert kernel.error < 1e-3
    assert report.error > 0.9
    assert {s.reason.split(",")[0] for s in report.skipped} == {
        "no kernel that is one tensor of transformers"
    }
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    # It is a Conv1D, whose weight is (in, out).
    assert json.loads(config)["fan_in_fan_out"] is True


def test_what_is_no_adapter_of_the_model_is_refused(task, tmp_path):
    model, delta, _ = task
    moved, companded, patched = make(), make(), make()
    moved.set_weights([array + 1 for array in weights_of(model)])
    kwm.attach_compander(companded, a=0.5)
    kwm.Patch.from_models(moved, weights_of(patched)).apply(patched)
    (tmp_path / "other").touch()
    to, back = delta.to_lora, kwm.Patch.from_lora
    path, ready = tmp_path / "adapter", tmp_path / "ready"
    to(model, ready, 2)
    half = tmp_path / "half"
    half.mkdir()
    (half / "adapter_model.safetensors").touch()
    before = sorted(os.listdir(tmp_path))
    for match, call in (
        ("`rank` must be", lambda: to(model, path, 0)),
        ("in one that exists", lambda: to(model, path / "no" / "x")),
        ("be a folder", lambda: to(model, __file__)),
        ("does not fit", lambda: to(models.mlp(), path)),
        ("a folder of peft", lambda: back(model, __file__)),
        (r"without patches\. Call .* with \[", lambda: to(patched, path)),
        ("must be the base", lambda: to(moved, path)),
        ("must be plain", lambda: to(companded, path)),
        ("must be plain", lambda: back(companded, ready)),
        ("an adapter of this model", lambda: back(make(hidden_dim=8), ready)),
        ("over", lambda: to(model, ready, overwrite=False)),
        ("over", lambda: to(model, half, overwrite=False)),
    ):
        with pytest.raises((ValueError, FileExistsError), match=match):
            call()
        assert sorted(os.listdir(tmp_path)) == before


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"}
# What a config has beyond its factors, or arrays that are no factors, and the
# error.
REFUSED = [
    *(
        ({name: value}, {}, (f"{name}={value!r}", "1 problem:"))
        for name, values in {
            "init_lora_weights": ("pissa", "olora", "new", 2),
            "lora_alpha": (None, "8", True, float("nan")),
            "alora_invocation_tokens": ([1, 2],),
            "peft_type": ("LOHA",),
            "use_dora": (True,),
            "use_rslora": ("false", 2),
            "modules_to_save": (["head"],),
        }.items()
        for value in values
    ),
    *(
        ({"r": r}, {}, (f"r={r!r}, and factors of rank [2]", "one training"))
        for r in (16, None, "2")
    ),
    ({"rank_pattern": [2]}, {}, ("rank_pattern=[2], not an object",)),
    *(
        ({"lora_alpha": alpha}, {}, ("query", "a change that is not finite"))
        for alpha in (1e300, -(10**60))
    ),
    ([], {}, ("[]",)),
    ([1] * 9999, {}, ("holds [1, 1",)),
    ({"bias": "x" * 9999}, {}, ("bias='xx",)),
    ("{", {}, ("JSON",)),
    ({}, {"A": None}, ("None and (2, 16) of factors",)),
    *(
        ({}, {"B": normal(*shape)}, ("query", "(16, 16) of the kernel"))
        for shape in ((16, 3), (2, 2, 2), (), (8, 2))
    ),
    *(
        ({}, {"A": normal(2, 16).astype(dtype)}, ("lora_A", dtype, "floats"))
        for dtype in ("complex64", "int8")
    ),
    ({}, {"A": np.full((2, 16), np.nan)}, ("lora_A", "not finite")),
    (
        {},
        {"B": None, "C": normal(2, 16)},
        ("lora_C", "no factors of its kernels"),
    ),
]


def of_unknown_dtypes():
    """Yield files of dtypes that safetensors has, and NumPy has not."""
    for dtype, size in (("F8_E4M3", 32), ("F4", 16)):
        places = (0, size), (size, 2 * size)
        header = {
            f"{QUERY}{name}.weight": dict(
                zip(("dtype", "shape", "data_offsets"), (dtype, shape, place))
            )
            for name, shape, place in zip("AB", ((2, 16), (16, 2)), places)
        }
        text = json.dumps(header).encode()
        yield len(text).to_bytes(8, "little") + text + bytes(2 * size)


def test_what_is_more_than_its_factors_is_refused(tmp_path):
    """And what changes nothing of the base is not."""
    from safetensors.numpy import save_file

    model, file = make(), tmp_path / "adapter_model.safetensors"

    def write(config, factors):
        """None leaves out a factor of the query's."""
        if isinstance(config, dict):
            config = {**PLAIN, **config}
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter_config.json").write_text(text)
        given = {"A": normal(2, 16), "B": normal(16, 2), **factors}
        given = {k: v for k, v in given.items() if v is not None}
        save_file({f"{QUERY}{k}.weight": v for k, v in given.items()}, file)

    def check(*parts):
        with pytest.raises(ValueError, match="`lora` must be") as error:
            kwm.Patch.from_lora(model, tmp_path)
        for part in (str(tmp_path), *parts):
            assert part in str(error.value)
        assert len(str(error.value)) < 2000

    for config, factors, parts in REFUSED:
        write(config, factors)
        check(*parts)
    for junk in (b"junk" * 9, *of_unknown_dtypes()):
        file.write_bytes(junk)
        check(file.name)
    for init in (None, True, False, "gaussian", "eva", "orthogonal"):
        write({"init_lora_weights": init}, {})
        kwm.Patch.from_lora(model, tmp_path)
    write({"r": 8, "rank_pattern": {"q_proj": 2}}, {})
    kwm.Patch.from_lora(model, tmp_path)

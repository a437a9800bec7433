"""Ways to change a file, by its kind; its checksums are right again."""

import contextlib
import functools
import hashlib
import io
import json
import math
import pathlib
import zipfile
import zlib

import h5py
import numpy as np
import ruamel.yaml


def mutant_of(name, data, rng):
    """Return the bytes of a file, changed in one way or a few.

    Half of the files are changed in their bytes, cut or lengthened. In the
    others something is changed that lies behind what a reader checks first.

    Args:
        name: String; its ending says what kind of file it is.
        data: Bytes.
        rng: `random.Random`.
    """
    # A folder is packed here, and no reader of ours unpacks it.
    if not name.endswith(".zip") and rng.random() < 0.5:
        return MUTATIONS[""](data, rng)
    return _other(name, data, rng)


def signed(data):
    """Return a file of the container with the checksums it should have."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), data[start:]
    checksums = {
        name: hashlib.sha256(body[slice(*row["data_offsets"])]).hexdigest()
        for name, row in header.items()
        if name != "__metadata__"
    }
    header["__metadata__"]["sha256"] = json.dumps(checksums)
    return _with_header(header, body)


def _with_header(header, body):
    """Return a file with the checksum of its header, any value of JSON."""

    def text_of(header):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and "header_sha256" in metadata:
        metadata["header_sha256"] = "0" * 64
        digest = hashlib.sha256(text_of(header)).hexdigest()
        metadata["header_sha256"] = digest
    return text_of(header) + body


def _other(name, data, rng):
    ending = pathlib.PurePath(name).suffix
    return MUTATIONS.get(ending, MUTATIONS[""])(data, rng)


def _other_parts(parts, rng):
    """Change some parts of a file, a dict from names to bytes."""
    names = sorted(parts)
    described = [name for name in names if name.endswith(".json")] or names
    for name in {
        rng.choice(described if rng.random() < 0.7 else names): None
        for _ in range(rng.choice((1, 1, 1, 2, 5)))
    }:
        if rng.random() < 0.9:
            parts[name] = _other(name, parts[name], rng)
        elif len(parts) > 1:
            parts.pop(name)


def _other_arrays(data, rng):
    """Change a file of the container, or one of safetensors' own."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), data[start:]
    if rng.random() < 0.3:
        return _with_header(_other_value(header, rng), body)
    metadata = header.pop("__metadata__", {})
    old = {n: body[slice(*f["data_offsets"])] for n, f in header.items()}
    _other_parts(parts := dict(old), rng)
    fields, body = {"__metadata__": metadata}, b""
    for name, part in parts.items():
        fields[name] = row = dict(header[name])
        width = len(old[name]) // (math.prod(row["shape"]) or 1) or 1
        part = part[: len(part) // width * width]
        if len(part) != len(old[name]) or rng.random() < 0.1:
            size = len(part) // width
            row["shape"] = rng.choice(([size], [size], [size, 1], [1, size]))
        row["data_offsets"] = len(body), len(body) + len(part)
        body += part
    data = _with_header(fields, body)
    return signed(data) if "sha256" in metadata else data


# Texts that stand in for one of JSON.
_JSON = (
    *(b"[]", b"3", b"null", b'"x"', b"NaN", b"", b"\xff", b"{", b"9" * 5000),
    *(
        b"[" * 10**5,
        b'{"a": ' * 10**4,
        b'{"a": 1, "a": 2}',
        b"[" + b" " * 10**6,
    ),
)


def _other_json(data, rng):
    if rng.random() < 0.1:
        return rng.choice(_JSON)
    return json.dumps(_other_value(json.loads(data), rng)).encode()


# Lines that YAML has beyond JSON.
_YAML = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefg", "bcdefgh")
    )
    + "models: *h",
    *(
        "a: &a {b: *a}",
        "<<: &a {<<: [*a]}",
        "models: *a",
        "base_model: &a [*a]",
    ),
    *("? [a, {b: c}]\n: d", "? {a: b}\n: c", "? []", "a: ? b", "? !!null"),
    *("!!python/object/apply:os.abort []", "a: !!python/name:os.abort"),
    *("a: !!binary x", "a: !!set {b, c}", "a: !!omap [b: c]", "a: !x y"),
    *("a: 2001-01-01", "2001-01-01: a", "a: 190:20:30", "a: !!int x"),
    *("merge_method: !!float x", "models: !!timestamp x", "a: !!str [b]"),
    *("a: .nan", "a: 1e999", f"a: 0x{'f' * 9000}", f"a: {'9' * 5000}"),
    *("dtype: |\n  x", "%YAML 9.9", "%TAG ! x", "---", "...", "--- a", "\t"),
    *("\0", "'", '"', "{", "}", "@", "`", "- a", "a: - b", "a:\n- b\n c"),
    *("models: " + "[" * n for n in (50, 500, 5000)),
    "models: " + "[" * 500 + "]" * 500,
    "models:\n" + "".join(f"{' ' * n}-\n" for n in range(200)),
    "".join(f"k{n}: {n}\n" for n in range(500)),
)


def _other_yaml(data, rng):
    if rng.random() < 0.5:
        lines = data.decode().splitlines()
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_YAML))
        return "\n".join(lines).encode()
    value = ruamel.yaml.YAML(typ="safe", pure=True).load(data)
    text = json.dumps(_other_value(value, rng)).encode()
    # A thousand models may take their time.
    return text if len(text) < 50_000 else data


def _other_folder(data, rng, change=lambda info: None):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    _other_parts(parts, rng)
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
            change(archive.infolist()[-1])
    return file.getvalue()


@functools.cache
def _bomb():
    """Return what 256 MiB of spaces are deflated to, about 1 in 1000."""
    coder = zlib.compressobj(wbits=-15)
    return coder.compress(b" " * 2**28) + coder.flush()


# What the directory of an archive may say of a member.
_ZIP = {
    "CRC": (0, 2**32 - 1),
    "compress_size": (0, 1, 2**20, 2**31, 2**40),
    "compress_type": (1, 8, 12, 14, 93, 99),
    "file_size": (0, 1, 2**20, 2**31, 2**40),
    "filename": ("", "/", "../x", "x" * 60000, "config.json", "metadata.json"),
    "flag_bits": (1, 8, 32, 64, 2**11, 2**13),
    "header_offset": (0, 7, 2**20, 2**40),
}


def _other_zip(data, rng):
    """Change parts of an archive, or what its directory says of them."""
    if rng.random() < 0.5:
        return _other_folder(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    chosen, field = rng.choice(sorted(parts)), rng.choice(("", *_ZIP))
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, part in parts.items():
            is_bomb = name == chosen and not field
            archive.writestr(name, _bomb() if is_bomb else part)
            info = archive.infolist()[-1]
            if is_bomb:
                info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 2**28
            elif name == chosen:
                setattr(info, field, rng.choice(_ZIP[field]))
    return file.getvalue()


def _deep(group):
    for _ in range(100):
        group = group.create_group("x")


_TEXT, _BIG = h5py.string_dtype(), (30000, 25000)
# What is put into a group under the name "x".
_HDF5 = (
    _deep,
    lambda group: [group.create_group(f"x{i}") for i in range(300)],
    lambda group: group.create_group("9" * 5000),
    lambda group: group.create_group(b"\xff\xfe"),
    lambda group: group.create_group("\n[red]\x1b[31m"),
    lambda group: group.create_dataset("x", _BIG, fillvalue=1.0),
    lambda group: group.create_dataset("x", _BIG, chunks=(1, 9), fillvalue=1.0),
    lambda group: group.create_dataset("x", (1,) * 32),
    lambda group: group.create_dataset("x", (2**31, 2**31), chunks=(9, 9)),
    lambda group: group.create_dataset("x", (2, 0)),
    lambda group: group.create_dataset("x", data=h5py.Empty("f4")),
    lambda group: group.create_dataset("x", (2,), _TEXT),
    lambda group: group.create_dataset("x", (2,), h5py.vlen_dtype("f4")),
    lambda group: group.create_dataset("x", (2,), h5py.ref_dtype),
    lambda group: group.create_dataset("x", (2,), h5py.enum_dtype({"a": 1})),
    lambda group: group.create_dataset("x", (2,), [("a", "f4"), ("b", "i8")]),
    lambda group: group.create_dataset("x", (2,), h5py.opaque_dtype("M8[s]")),
    lambda group: group.create_dataset("x", (2,), ("f4", (2, 2))),
    lambda group: group.create_dataset("x", (2,), "c16"),
    lambda group: group.create_dataset("x", (2,), "V9"),
    lambda group: group.create_dataset(
        "x", (9,), "u1", external=[("/etc/hostname", 0, 9)]
    ),
    lambda group: group.__setitem__("x", np.dtype("f4")),
    lambda group: group.__setitem__("x", h5py.SoftLink("/")),
    lambda group: group.__setitem__("x", h5py.SoftLink("x")),
    lambda group: group.__setitem__("x", h5py.ExternalLink("x.h5", "/")),
    lambda group: group.__setitem__("x", group),
)


def _other_hdf5(data, rng):
    """Change an object of a file: delete, move or replace it, or add one."""
    with h5py.File(file := io.BytesIO(data), "r+") as opened:
        names = []
        opened.visit(names.append)
        name = rng.choice(names)
        group = opened[name].parent
        kind = rng.random()
        if kind < 0.1:
            del opened[name]
        elif kind < 0.2:
            opened.move(name, "/".join("x" * rng.randrange(1, 9)))
        else:
            if isinstance(opened[name], h5py.Group) and kind < 0.6:
                group = opened[name]
            with contextlib.suppress(KeyError):
                del group["x"]
            rng.choice(_HDF5)(group)
            if "x" in group and kind > 0.8:
                del opened[name]
                group.move("x", name.rpartition("/")[-1])
    return file.getvalue()


def _other_bytes(data, rng):
    place = rng.randrange(len(data) + 1)
    other = rng.randrange(len(data) + 1)
    first, last = sorted((place, other))
    if rng.random() < 0.5:
        last = min(first + rng.randrange(1, 9), len(data))
    return rng.choice(
        (
            lambda: data[:first],
            lambda: data[first:],
            lambda: data[:first] + data[last:],
            lambda: data[:last] + data[first:],
            lambda: data[:first] + rng.randbytes(last - first) + data[last:],
            lambda: data[:first] + bytes(last - first) + data[last:],
            lambda: data[:first] + rng.randbytes(8) + data[first:],
            lambda: data + rng.randbytes(rng.randrange(1, 100)),
        )
    )()


def _array_of(dtype):
    config = {"value": [0, 1], "dtype": dtype}
    return {"class_name": "__numpy__", "config": config}


def _layer(name, **config):
    layer = {"module": "keras.layers", "registered_name": None}
    return {**layer, "class_name": name, "config": {"name": "x", **config}}


# What stands in for a value of the JSON.
_VALUES = (
    *(0, 1, -1, 7, 2**31, 2**40, 2**63, 2**70, -(2**40), 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), True, False, None, "", "x" * 2000, "\0"),
    *("stateless scope", "float32", "../../x", "layers/x", "[red]x[/]"),
    *([], {}, [[]], [None], [2**40] * 40, [-1, 2**31], {"a": {"b": []}}),
    json.loads("[" * 51 + "]" * 51),
    json.loads("[" * 151 + "]" * 151),
    ["x"] * 5000,
    _array_of("V1000000000"),
    _array_of("S500000000"),
    _array_of("O"),
    {"class_name": "__tensor__", "config": {"value": 1, "dtype": "x"}},
    {"class_name": "__bytes__", "config": {"value": 3}},
    {"class_name": "__keras_tensor__", "config": {"shape": [2**40]}},
    {"class_name": "__lambda__", "config": {"value": "x"}},
    _layer("Dense", units=2**40),
    _layer("Dense", units=2**28),
    _layer("Reshape", target_shape=[2**20, 2**20]),
    _layer("RepeatVector", n=2**31),
    _layer("Embedding", input_dim=2**40, output_dim=2**10),
    _layer("InputLayer", batch_shape=[2**20, 2**20]),
    _layer("GaussianNoise", stddev=2**70),
    _layer("stateless scope"),
)


def _other_value(value, rng):
    """Return a JSON value of which one part is another one."""
    value = json.loads(json.dumps(value))
    places = []

    def find(inner):
        keys = range(len(inner)) if isinstance(inner, list) else list(inner)
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], (list, dict)):
                find(inner[key])

    if isinstance(value, (list, dict)):
        find(value)
    if not places:
        return rng.choice(_VALUES)
    owner, key = rng.choice(places)
    old = owner[key]
    kind = rng.randrange(8)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, list):
        owner.insert(key, old)
    elif kind == 1:
        owner["x" * rng.randrange(3)] = old
    elif kind == 2:
        other, its = rng.choice(places)
        owner[key] = json.loads(json.dumps(other[its]))
    elif kind == 3 and isinstance(old, (int, float)):
        owner[key] = rng.choice((-old, old + 1, old * 1000, str(old), [old]))
    elif kind == 3 and isinstance(old, list):
        owner[key] = old * rng.choice((0, 2, 500))
    elif kind == 3 and isinstance(old, str):
        place = rng.randrange(len(old) + 1)
        owner[key] = old[:place] + rng.choice("aZ0/.[\n\0é") + old[place:]
    else:
        owner[key] = json.loads(json.dumps(rng.choice(_VALUES)))
    return value


# What changes a file or a part of one, by the ending of its name.
MUTATIONS = {
    "": _other_bytes,
    ".h5": _other_hdf5,
    ".json": _other_json,
    ".keras": _other_zip,
    ".safetensors": _other_arrays,
    ".yaml": _other_yaml,
    ".zip": _other_folder,
}

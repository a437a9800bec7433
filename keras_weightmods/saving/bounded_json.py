"""JSON from files, read only where its values fit into memory."""

import json

import numpy as np

# JSON may become this large in memory; what follows each of these characters
# takes so many bytes there, at least. Some 2 million strings fit.
_MAX_JSON = 160 * 2**20
_JSON_SIZES = {b"{": 240, b"[": 64, b",": 64, b":": 64}


def json_array(value):
    """Return the array of bytes that `Reader.read_json` reads `value` from.

    Raises:
        ValueError: If it would be too large for it.
    """
    text = json.dumps(value, separators=(",", ":")).encode()
    check_json(text)
    return np.frombuffer(text, "uint8")


def parse_json(text):
    """Return the value of a JSON text; raise ValueError if it is not valid."""

    def unique(pairs):
        once = dict(pairs)
        if len(once) != len(pairs):
            raise ValueError("a key appears twice in an object")
        return once

    if isinstance(text, str):
        text = text.encode()
    check_json(text)
    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_json(text):
    """Raise ValueError for a text of more values than are read."""
    size = sum(text.count(each) * n for each, n in _JSON_SIZES.items())
    if size > _MAX_JSON:
        raise ValueError(
            f"JSON that takes {size} bytes in memory, and not at most "
            f"{_MAX_JSON}"
        )

"""Reading what a stranger may have made: right, or refused in a sentence that names the file.

`BadInput` is that sentence. `read_json` and `check_json` hold what a JSON file says against a schema,
`check_weights` what a tensor holds against what weights can be.
"""
import json
import os
import re
import reprlib
import sys
from functools import cache

import torch


class BadInput(ValueError):
    """A mistake in what the caller gave, told in one sentence. Scripts print it and exit with 2."""


@cache
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


def existing_folder(folder):
    """`folder`, or BadInput if it is not there; what looks like a name on Hugging Face's hub is
    told apart from a path."""
    if os.path.isdir(folder):
        return folder
    hint, owner = "", os.path.dirname(folder)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(folder)) and not os.path.exists(owner):
        name = os.path.basename(folder)
        hint = (f"; if it is a name on Hugging Face's hub, download it with: hf download {folder} "
                f"--local-dir {name}, and give --weights {name}")
    raise BadInput(f"{folder}: no such model folder{hint}")


def existing_file(file, what="file"):
    """`file`, or BadInput if it is not there, not a regular file, or a pointer of Git LFS."""
    if not os.path.exists(file):
        raise BadInput(f"{file}: no such {what}")
    if not os.path.isfile(file):
        raise BadInput(f"{file}: is not a {what} but a folder, device or pipe")
    with open_file(file, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise BadInput(f"{file}: is a pointer of Git LFS, not the file itself; run "
                           "git lfs pull")
    return file


def open_file(file, mode):
    try:
        return open(file, mode)
    except OSError as e:
        raise BadInput(f"{file}: cannot be read ({e.strerror})") from None


WORDS = {str: "text", int: "a whole number", float: "a number that is finite",
         bool: "true or false"}


def check_json(value, schema, where, name="what it holds"):
    """BadInput, naming `where` and the key, unless `value`, read from a file, has the form
    `schema`: str, int, float (any finite number) or bool; [schema], a list; {key: schema}, an
    object, in which a key written with "?" may be missing or null."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            raise BadInput(f"{where}: {name} is {reprlib.repr(value)}, but must be a list")
        for item in value:
            check_json(item, schema[0], where, f"an entry of {name}")
    elif isinstance(schema, dict):
        if not isinstance(value, dict):
            raise BadInput(f"{where}: {name} is {reprlib.repr(value)}, but must be an object")
        for key, inner in schema.items():
            key, optional = key.rstrip("?"), key.endswith("?")
            if value.get(key) is not None:
                check_json(value[key], inner, where, key)
            elif not optional:
                raise BadInput(f"{where}: has no {key}")
    elif not is_json(value, schema):
        raise BadInput(f"{where}: {name} is {reprlib.repr(value)}, but must be {WORDS[schema]}")


def is_json(value, kind):
    """Whether a value of JSON is of a kind: a bool is not a number, a number is finite, a whole
    number has 64 bits."""
    if kind is int:
        return type(value) is int and -2**63 <= value < 2**63
    if kind is float:
        return type(value) in (int, float) and -1e300 < value < 1e300
    return type(value) is kind


def read_json(file, schema={}):
    """The object in a JSON file; BadInput if it cannot be read or is not of the form `schema`."""
    existing_file(file)
    try:
        with open_file(file, "rb") as f:
            value = json.loads(f.read().decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{file}: not readable as JSON ({e})") from None
    check_json(value, schema, file)
    return value


def check_weights(name, tensor, file, kept=None):
    """BadInput unless a tensor read from `file` can be weights: floating point, and finite, also in
    the dtype in which it is `kept` (default: its own)."""
    kept = tensor if kept is None else kept
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(f"{file}: {name} holds {str(tensor.dtype).removeprefix('torch.')}; weights "
                       "must be float32, bfloat16 or float16")
    if kept.numel() and not all(extreme.isfinite() for extreme in kept.detach().aminmax()):
        what = str(kept.dtype).removeprefix("torch.")
        raise BadInput(f"{file}: {name} holds values that are not finite in {what}; it is damaged "
                       "or diverged, or needs another --dtype")

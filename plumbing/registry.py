"""What stands in extras/ is found by its name in a flag or a file; the core knows none of it."""
import importlib
import os

from plumbing.files import BadInput


def extra(name, what):
    """The module extras/NAME.py, which `what` (a flag, or what stood in a file) asks for."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as e:
        if e.name not in ("extras", f"extras.{name}"):
            raise
        raise BadInput(f"{what} needs extras/{name}.py, which is not here") from None


def find(name, known, attribute, sentence):
    """known[name], or what extras/NAME.py calls `attribute`; otherwise BadInput with `sentence`."""
    if not isinstance(name, str):
        raise BadInput(sentence)
    if name in known:
        return known[name]
    try:
        return getattr(extra(name, name) if name.isidentifier() else None, attribute)
    except (BadInput, AttributeError):
        raise BadInput(sentence) from None


def is_blend(name):
    """Whether a name is no file but 'FILE*WEIGHT + FILE*WEIGHT', of extras/blend.py."""
    return not os.path.exists(name) and ("*" in name or "+" in name)

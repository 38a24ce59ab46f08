"""What the core finds by a name in a flag or a file, without knowing extras/."""
import importlib

from plumbing.files import BadInput


def extra(name, what):
    """The module extras/NAME.py, which `what` (a flag, or what stood in a file) asks for."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as e:
        if e.name not in ("extras", f"extras.{name}"):
            raise
        raise BadInput(f"{what} needs extras/{name}.py, which is not here") from None

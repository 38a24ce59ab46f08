"""Writing files: nothing that is not ours is overwritten, and nothing of ours is lost.

Outputs are found out before the work (`check_writable`), written after it in one piece
(`open_output`, `write_json`, `save_tensors`), by one process at a time (`locked`).
"""
import contextlib
import json
import os
import stat
import sys

from safetensors import SafetensorError
from safetensors.torch import save, save_file

from plumbing.files import BadInput


def save_tensors(tensors, file, metadata):
    """Write a safetensors file."""
    with open_output(file) as f:
        if written_through(file):
            f.write(save(tensors, metadata))
        else:   # not by way of memory: a base model may fill most of it
            save_file(tensors, f.name, metadata)


def write_json(file, value):
    """Write a JSON file."""
    with open_output(file) as f:
        f.write(json.dumps(value, indent=1).encode() + b"\n")


@contextlib.contextmanager
def open_output(file):
    """The one way in which a file is written: open for bytes under a temporary name, and renamed
    when all is written, so that a kill or a full disk leaves what was there. Links are followed;
    devices and pipes are written to as they stand. BadInput, naming the file, if it cannot be."""
    try:
        through = written_through(file)
        if through is None:
            with replacing(os.path.realpath(file)) as f:
                yield f
        else:
            with open(os.dup(through) if isinstance(through, int) else through, "wb") as f:
                yield f
    except (OSError, RuntimeError, SafetensorError) as e:
        reason = e
        while reason is not None and not isinstance(reason, (OSError, SafetensorError)):
            reason = reason.__context__   # torch.save hides the OSError behind an error of its own
        if reason is None:
            raise
        reason = getattr(reason, "strerror", None) or reason
        raise BadInput(f"{file}: cannot be written ({reason})") from e


def written_through(file):
    """What to write to if `file` is not to be replaced: the path of a device or pipe, the number
    of this process's output if it is that file; otherwise None."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(stream)):
                return stream
    return None if stat.S_ISREG(found.st_mode) else file


@contextlib.contextmanager
def temporary(file):
    """A file open for bytes beside `file`; it is gone at the end, unless it was renamed."""
    name = f"{file}.{os.getpid()}.tmp"
    try:
        with open(name, "wb") as f:
            yield f
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def replacing(file):
    """A temporary file which, once written, takes the place and the permissions of `file`."""
    with temporary(file) as f:
        mode = os.stat(file if os.path.exists(file) else f.name).st_mode
        yield f
        f.flush()
        os.fsync(f.fileno())
        os.chmod(f.name, stat.S_IMODE(mode))
        os.replace(f.name, file)


JSON, PNG = (b"{", b"["), (b"\x89PNG",)   # how such files begin


def check_writable(file, flag, begins=None, make_folder=False):
    """BadInput, before the work, if `file`, which `flag` names, could not be written after it: for
    want of a folder, a permission or room for a small file, or because what is there is not of the
    kind that would replace it (`begins`: JSON or PNG). Nothing for None."""
    if file is None:
        return
    target, held = os.path.realpath(file), b""
    try:
        if os.path.isdir(target) or not os.path.basename(file):
            raise BadInput(f"{flag} {file}: is a folder; name a file")
        if written_through(file):
            return
        if make_folder:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.exists(target):
            with open(target, "r+b") as f:
                held = f.read(64).lstrip()
        with temporary(target) as f:
            f.write(bytes(4096))
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise BadInput(f"{flag} {file}: cannot be written ({e.strerror})") from None
    if begins and held and not held.startswith(begins):
        raise BadInput(f"{flag} {file}: holds something else than this writes; move it away, or "
                       f"choose another {flag}")
    if begins == PNG and os.path.splitext(file)[1].lower() not in ("", ".png"):
        raise BadInput(f"{flag} {file}: this writes a PNG; choose a name that ends in .png")


def write_each(*writes):
    """Call all of these functions, also after one that raises BadInput, which is raised last."""
    failed = []
    for write in writes:
        try:
            write()
        except BadInput as e:
            failed.append(str(e))
    if failed:
        raise BadInput("; ".join(failed))


@contextlib.contextmanager
def locked(path, flag):
    """Inside, this process alone writes `path`, a folder or a file; BadInput if another one does.
    The lock dies with its process. flag names the path."""
    try:
        import fcntl
    except ImportError:   # Windows
        print(f"{flag} {path}: without POSIX's fcntl nothing keeps a second process from writing "
              "there", file=sys.stderr)
        yield
        return
    folder, mine = os.path.isdir(path), False
    if written_through(path) and not folder:
        yield
        return
    path = os.path.realpath(path)
    lock = path
    if not folder:
        lock = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock")
    try:
        handle = os.open(lock, os.O_RDONLY | (0 if folder else os.O_CREAT), 0o666)
    except OSError as e:
        raise BadInput(f"{flag} {path}: cannot be written ({e.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.stat(lock), os.fstat(handle))   # not removed meanwhile
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:   # a file system without locks
            mine = True
        if not mine:
            raise BadInput(f"{flag} {path}: another process is writing there; wait for its end, or "
                           f"choose another {flag}")
        yield
    finally:
        if mine and not folder:
            os.unlink(lock)
        os.close(handle)


def save_figure(figure, file, dpi=130):
    """Write a matplotlib figure as PNG."""
    figure.tight_layout()
    with open_output(file) as f:
        figure.savefig(f, format="png", dpi=dpi, bbox_inches="tight")   # a legend below too

"""Run an untrusted program, contained, and say how it ended: contained(command, file, text, ...).

Each program runs in a process group and an empty folder of its own, without this process's
environment and standard input, under LIMITS on memory (per process), on processes, on the size of
a file and of its output, and under a limit on time. Where this process is root's, it runs as a
user that owns nothing. Where Linux allows it (most containers do not), namespaces contain it
further: it sees no network and no process but its own, all of which end with it, and can write
nowhere but in its folder, which holds LIMITS["disk"] bytes. describe() tells which holds here.

NOT contained: a program can read what its user may read: world-readable files, and its own
source, so that a program written to cheat can print what passing prints. It can use the CPU until
its time is up. No sandbox of this size withstands an attack on the kernel. Without namespaces a
program also reaches the network, whatever its user may write and, unless you are root, your own
processes. For code of unknown intent use a machine or a container that holds nothing else.

The containing itself is done by extras/launcher.py, one fresh interpreter for each program.
"""
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

LIMITS = dict(memory=1 << 30, processes=64, file=16 << 20, disk=64 << 20)   # bytes; a count
LAUNCHER = str(Path(__file__).resolve().parent / "launcher.py")
PASSED_ON = ("PATH", "PERL5LIB", "LUA_PATH", "LUA_CPATH", "GEM_PATH", "R_LIBS", "R_LIBS_USER",
             "NODE_PATH")
NEXT_USER = itertools.count(64 * os.getpid())   # as root: one that no program running now has


class Spec(NamedTuple):
    """What the launcher is told."""
    command: list          # interpreter, its flags, file_name
    file_name: str
    text: str              # what the file holds
    folder: str            # where the file is written, and the program runs
    timeout: float         # seconds of wall time
    env: dict
    user: int | None       # user id of the program, where the launcher is root's
    stdout: int            # file descriptors
    stderr: int
    namespaces: bool
    address_space: bool    # limit the address space too, not only data
    memory: int            # these are LIMITS
    processes: int
    file: int
    disk: int


class Ended(NamedTuple):
    """How a program ended."""
    code: int | str    # exit code, -signal, "timeout", "disk" (full) or "killed" (out of memory)
    over: str | None   # "timeout" or "limit" where it went over one
    out: str           # the last 4096 bytes of its standard output
    err: str           # and of its standard error


def contained(command, file_name, text, timeout, address_space=True, namespaces=None):
    """Run a command on a file that holds `text`, contained as the top of this file says -> Ended.

    command: (path of the interpreter, *flags). timeout: seconds of wall time. address_space: False
    for an interpreter that reserves more than it uses. namespaces: by default, where they can be
    had. Raises OSError where the program could not be started.
    """
    if namespaces is None:
        namespaces = not no_namespaces()
    user = 61184 + next(NEXT_USER) % 4096 if os.getuid() == 0 else None
    folder = tempfile.mkdtemp(prefix="program-")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        spec = Spec(
            [*command, file_name], file_name, text, folder, timeout, environment(folder), user,
            out.fileno(), err.fileno(), namespaces, address_space, **LIMITS)
        try:
            answer = ask_launcher(spec)
        finally:
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)   # of any depth
        if "error" in answer:
            raise OSError(answer["error"])
        return ended(answer["code"], out, err)


def environment(folder):
    """The environment of a program: where its interpreter finds itself and its libraries."""
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    one_thread = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    return env | one_thread | dict(HOME=folder, TMPDIR=folder, LANG="C.UTF-8")


def ask_launcher(spec):
    """Have a fresh interpreter contain and run the program -> its answer, {"code" or "error"}."""
    try:
        ran = subprocess.run(
            [sys.executable, "-I", "-S", LAUNCHER], input=json.dumps(spec._asdict()).encode(),
            capture_output=True, pass_fds=(spec.stdout, spec.stderr), cwd="/",
            start_new_session=True, timeout=spec.timeout + 15)
    except subprocess.TimeoutExpired:
        return {"code": "timeout"}
    return json.loads(ran.stdout or b'{"code": "killed"}')


def ended(code, out, err):
    """Judge a program's code and the size of its output files, read their ends -> Ended."""
    sizes = [os.fstat(f.fileno()).st_size for f in (out, err)]
    beyond = code in ("disk", "killed", -signal.SIGXCPU, -signal.SIGXFSZ)
    over = None
    if code == "timeout":
        over = "timeout"
    elif beyond or max(sizes) >= LIMITS["file"]:
        over = "limit"
    return Ended(code, over, *(read_end(f, size) for f, size in zip((out, err), sizes)))


def read_end(f, size):
    return os.pread(f.fileno(), 4096, max(0, size - 4096)).decode(errors="replace")


@functools.cache
def no_namespaces():
    """Why programs cannot have namespaces of their own here; "" where they can."""
    try:
        contained(("/bin/sh",), "program.sh", "true", 10, namespaces=True)
        return ""
    except OSError as e:
        return str(e)


def describe():
    """How programs are contained here, in one line."""
    why = no_namespaces()
    if why:
        return (f"sandbox: limits, but no namespaces ({why}): programs reach the network and "
                "whatever their user may write")
    return ("sandbox: limits and namespaces: programs see no network and no other process, and "
            "write nowhere but in their folder; they read what their user may")

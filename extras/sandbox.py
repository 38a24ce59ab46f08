"""Run an untrusted program, contained, and say how it ended: contained(steps, file, text, ...).

Each program runs in a process group and an empty folder of its own, without this process's
environment and standard input, under LIMITS on memory, on processes, on open files, on the size of
a file and of its output, and under a limit on time. setuid programs give it no privileges. Where
this process is root's, it runs as a user that owns nothing. Where Linux allows it (most containers
do not), namespaces contain it further: it sees no network and no process but its own, all of which
end with it, and can write nowhere but in its folder, which holds LIMITS["disk"] bytes. Where
cgroups can be had (root on most systems), LIMITS["memory"] holds for all its processes together,
and otherwise for each. Where the kernel takes filters (x86-64, arm64), it cannot make namespaces
of its own, nor hold memory in files without a name or in System V segments. describe() tells which
of these hold here.

NOT contained: a program can read what its user may read: world-readable files, and its own source.
It can use the CPU until its time is up. Without a cgroup, LIMITS["processes"] processes can hold
LIMITS["memory"] each, and about 60 MB each in the buffers of sockets and pipes; a program in
JavaScript, Julia or Swift, whose address space is not limited, more in shared mappings. Without
namespaces it also reaches the network and writes whatever its user may write, in /dev/shm too,
unseen by the limit on disk. If, besides, you are not root, its user is you: it reaches your files
and your processes, this one too, and what it starts before it kills this one's helpers outlives
its run. Without a filter of system calls it can mount file systems of its own, in memory that only
a cgroup counts. No sandbox of this size withstands an attack on the kernel. For code of unknown
intent use a machine or a container that holds nothing else.

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

from extras import launcher
from plumbing.files import BadInput

LIMITS = dict(memory=1 << 30, processes=64, files=256, file=16 << 20, disk=64 << 20)
LAUNCHER = str(Path(launcher.__file__).resolve())
SIGN = 99   # the file descriptor on which a program leaves its sign of success
PASSED_ON = ("PATH", "PERL5LIB", "LUA_PATH", "LUA_CPATH", "GEM_PATH", "R_LIBS", "R_LIBS_USER",
             "NODE_PATH", "PLTCOLLECTS", "JULIA_LOAD_PATH")
NEXT_USER = itertools.count(64 * os.getpid())   # as root: one that no program running now has


class Spec(NamedTuple):
    """What the launcher is told."""
    steps: list            # (command, seconds of wall time) each; one that fails is the last
    file_name: str
    text: str              # what the file holds
    folder: str            # where the file is written, and the program runs
    env: dict
    user: int | None       # user id of the program, where the launcher is root's
    stdout: int            # file descriptors
    stderr: int
    sign: int
    sign_number: int       # what `sign` is in the program
    namespaces: bool
    address_space: bool    # limit the address space too, not only data
    memory: int            # these are LIMITS
    processes: int
    files: int             # open at once, in a process
    file: int
    disk: int


class Ended(NamedTuple):
    """How a program ended."""
    code: int | str    # exit code, -signal, "timeout", "disk" (full) or "killed" (out of memory)
    over: str | None   # "timeout" or "limit" where it went over one
    out: str           # the last 4096 bytes of its standard output
    err: str           # and of its standard error
    sign: str          # and of what it wrote to the file descriptor SIGN


def contained(steps, file_name, text, address_space=True, namespaces=None):
    """Run commands on a file that holds `text`, contained as the top of this file says -> Ended.

    steps: a list of (command, seconds of wall time), run one after another in the file's folder
    until one fails. address_space: False for an interpreter that reserves more than it uses.
    namespaces: by default, where they can be had. Raises OSError where a command could not be
    started, UnicodeEncodeError for a text that UTF-8 cannot hold.
    """
    if launcher.resource is None:
        raise BadInput("programs run in limits that Windows does not have; use Linux, macOS or WSL")
    text.encode()
    if namespaces is None:
        namespaces = not no_namespaces()
    user = 61184 + next(NEXT_USER) % 4096 if os.getuid() == 0 else None
    parent = tempfile.mkdtemp(prefix="program-")   # the program cannot rename a folder in it
    folder = os.path.join(parent, "folder")
    try:
        os.mkdir(folder)
        os.chmod(parent, 0o511)
        files = [tempfile.TemporaryFile() for _ in range(3)]
        spec = Spec(
            steps, file_name, text, folder, environment(folder), user,
            *(f.fileno() for f in files), SIGN, namespaces, address_space, **LIMITS)
        answer = ask_launcher(spec)
        if "error" in answer:
            raise OSError(answer["error"])
        return ended(answer["code"], *files)
    finally:
        remove(parent)


def environment(folder):
    """The environment of a program: where its interpreter finds itself and its libraries."""
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    one_thread = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", JULIA_NUM_THREADS="1")
    return env | one_thread | dict(HOME=folder, TMPDIR=folder, LANG="C.UTF-8")


def ask_launcher(spec):
    """Have a fresh interpreter contain and run the program -> its answer, {"code" or "error"}."""
    seconds = sum(seconds for _, seconds in spec.steps)
    try:
        ran = subprocess.run(
            [sys.executable, "-I", "-S", LAUNCHER], input=json.dumps(spec._asdict()).encode(),
            capture_output=True, pass_fds=(spec.stdout, spec.stderr, spec.sign), cwd="/",
            start_new_session=True, timeout=seconds + 15)
    except subprocess.TimeoutExpired:
        return {"code": "timeout"}
    return json.loads(ran.stdout or b'{"code": "killed"}')


def remove(folder):
    """Remove a folder of any depth, whatever it holds and may be read."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.chmod(folder, 0o700)
    if subprocess.run(["/bin/rm", "-rf", folder], **quiet).returncode:
        subprocess.run(["/bin/chmod", "-R", "u+rwx", folder], **quiet)
        subprocess.run(["/bin/rm", "-rf", folder], **quiet)


def ended(code, out, err, sign):
    """Judge a program's code and the size of its output files, read the files' ends -> Ended."""
    sizes = [os.fstat(f.fileno()).st_size for f in (out, err)]
    beyond = code in ("disk", "killed", -signal.SIGXCPU, -signal.SIGXFSZ)
    over = None
    if code == "timeout":
        over = "timeout"
    elif beyond or max(sizes) >= LIMITS["file"]:
        over = "limit"
    return Ended(code, over, read_end(out), read_end(err), read_end(sign))


def read_end(f):
    """The end of a file, which is closed."""
    with f:
        size = os.fstat(f.fileno()).st_size
        return os.pread(f.fileno(), 4096, max(0, size - 4096)).decode(errors="replace")


@functools.cache
def no_namespaces():
    """Why programs cannot have namespaces of their own here; "" where they can."""
    try:
        contained([(("/bin/sh", "program.sh"), 10)], "program.sh", "true", namespaces=True)
        return ""
    except OSError as e:
        return str(e)


@functools.cache
def no_memory_group():
    """Whether memory can be limited for each process only, not for a program."""
    group = launcher.memory_group(LIMITS["memory"])
    launcher.remove_group(group)
    return group is None


def describe():
    """How programs are contained here, in one line."""
    why = no_namespaces()
    if why:
        line = (f"sandbox: limits, but no namespaces ({why}): programs reach the network and "
                "whatever their user may write")
    else:
        line = ("sandbox: limits and namespaces: programs see no network and no other process, "
                "and write nowhere but in their folder; they read what their user may")
    if no_memory_group():
        line += "; no cgroup: the limit on memory is one for each process"
    if not launcher.can_forbid():
        line += "; no filter of system calls: memory in unnamed files is not limited"
    return line

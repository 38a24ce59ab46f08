"""extras/sandbox.py and its launcher: what contains a program, with namespaces and without."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from extras import languages, launcher, sandbox
from extras.languages import run_program
from extras.tests.test_languages import needs
from plumbing.files import BadInput


def need_namespaces():
    if sandbox.no_namespaces():
        pytest.skip(f"namespaces are not to be had here: {sandbox.no_namespaces()}")


@pytest.fixture(params=["namespaces", "no namespaces"])
def program_name(request, monkeypatch):
    """Both ways to contain programs, with small limits -> a file name that no other process has."""
    if request.param == "namespaces":
        need_namespaces()
    needs("py")
    if request.param == "no namespaces":
        monkeypatch.setattr(sandbox, "no_namespaces", lambda: "switched off by a test")
    for name, value in dict(memory=256 << 20, file=1 << 20, disk=4 << 20).items():
        monkeypatch.setitem(sandbox.LIMITS, name, value)
    name = f"hostile-{os.getpid()}-{time.monotonic_ns()}.py"
    monkeypatch.setitem(languages.LANGUAGES, "py", languages.LANGUAGES["py"]._replace(file=name))
    folder = tempfile.mkdtemp()  # not tmp_path, which other users cannot enter
    os.chmod(folder, 0o755)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield name
    os.rmdir(folder)  # nothing is left in it


HOSTILE = {  # (program, seconds it gets, outcomes that are right)
    "forks without end": ("""
import os
while True:
    try:
        os.fork()
    except OSError:
        pass""", 1, {"timeout"}),
    "leaves a daemon": ("""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)""", 60, {"passed"}),
    "writes one large file": ("open('a', 'w').write('x' * 2**24)", 60, {"failed", "limit"}),
    "writes many files": ("""
for i in range(10**9):
    open(f'{i}', 'w').write('x' * 2**19)""", 60, {"failed", "limit"}),
    "prints without end": ("while True: print('x' * 10000)", 60, {"limit"}),
    "prints without end and hides it": ("""
while True:
    try:
        print('x' * 10000, flush=True)
    except OSError:
        pass""", 1, {"timeout", "limit"}),
    "ignores SIGTERM": ("""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)""", 0.5, {"timeout"}),
    "takes memory without end": ("""
hoard = []
while True:
    hoard.append(bytearray(10**7))""", 60, {"failed"}),
    "exits before its tests": ("import os; os._exit(0)", 60, {"failed"}),
    "prints and exits before its tests": ("print('ok'); raise SystemExit(0)", 60, {"failed"}),
    "deletes its folder": (
        "import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True)", 60, {"passed"}),
    "nests folders without end": ("""
import os
for i in range(1500):
    os.mkdir('d'); os.chdir('d')""", 60, {"passed", "failed", "limit"}),
    "reads standard input": ("import sys; assert sys.stdin.read() == ''", 60, {"passed"}),
    "writes errors without end": ("""
import sys
while True: sys.stderr.write('x' * 10000)""", 60, {"limit"}),
    "makes a sparse file": ("open('a', 'w').truncate(2**40)", 60, {"failed", "limit"}),
    "fills its folder with links": ("""
import os
for name, to in [('root', '/'), ('loop', 'loop'), ('file', '/etc/passwd')]:
    os.symlink(to, name)""", 60, {"passed"}),
    "renames its folder": ("""
import os
open('a', 'w').write('x' * 2**19)
try:
    os.rename(os.getcwd(), '../elsewhere')
except OSError:
    os._exit(3)""", 60, {"failed"}),
    "forbids its removal": ("""
import os
os.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.chmod('a/b', 0); os.chmod('a', 0)""", 60,
                            {"passed"}),
    "kills its parent": ("""
import os, signal, time
os.kill(os.getppid(), signal.SIGKILL)
time.sleep(60)""", 1, {"failed", "limit", "timeout"}),
    "has a child kill its parent": ("""
import os, signal, time
parent = os.getppid()
if os.fork() == 0:
    os.setsid()
    os.kill(parent, signal.SIGKILL)
time.sleep(60)""", 1, {"failed", "limit", "timeout"}),
    "makes a device": ("import os, stat; os.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(8, 0))", 60,
                       {"failed"}),
    "holds memory in files without a name": ("""
import os
held = [os.memfd_create(str(i)) for i in range(400)]
for file in held:
    os.write(file, bytes(2**20))""", 60, {"failed", "limit"}),
    "holds memory in sockets": ("""
import socket
pairs, held = [], 0
while held < 2**28:
    pairs.append(socket.socketpair())
    pairs[-1][0].setblocking(False)
    try:
        while True:
            held += pairs[-1][0].send(bytes(2**16))
    except BlockingIOError:
        pass""", 60, {"failed", "limit"}),
}
FILTERED = {   # where the kernel takes filters
    "holds memory in a System V segment": ("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.shmget(0, 2**20, 0o1600) >= 0""", 60, {"failed"}),
    "mounts a file system in a namespace of its own": ("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000 | 0x20000) == 0   # user, mount""", 60, {"failed"}),
    "starts a process in a namespace of its own": ("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
child = libc.syscall(56, 0x10000000 | 17, None, None, None, None)   # clone
assert child >= 0""", 60, {"failed"}),
}
if launcher.can_forbid():
    HOSTILE |= FILTERED


def left_over(name):
    """Live processes with `name` on their command line, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = int(folder.name) == os.getpid()
            if name in (folder / "cmdline").read_text() and not mine:
                found.append(folder.name)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_program_neither_passes_nor_outlives_its_run(what, program_name):
    program, timeout, right = HOSTILE[what]
    outcome = run_program("py", program, timeout)
    assert outcome.outcome in right, outcome
    assert not left_over(program_name)


def test_all_processes_of_a_program_share_its_memory_where_cgroups_can_be_had(program_name):
    if sandbox.no_memory_group():
        pytest.skip("cgroups that limit memory are not to be had here")
    outcome = run_program("py", """
import os, time
for i in range(8):
    if os.fork() == 0:
        hoard = b'x' * (64 << 20)   # 512 MiB together
        time.sleep(60)
os.wait()""", 30)
    assert outcome.outcome == "limit" and outcome.code == "killed", outcome


def test_a_setuid_program_gains_nothing(program_name):
    if os.getuid():
        pytest.skip("only root can make a program setuid root")
    copy = Path(tempfile.tempdir) / "id"
    shutil.copy(shutil.which("id"), copy)
    copy.chmod(0o4755)
    outcome = run_program("py", f"""
import subprocess
assert subprocess.check_output(["{copy}", "-u"]).strip() != b"0"
assert "NoNewPrivs:\t1" in open("/proc/self/status").read()""", 60)
    copy.unlink()
    assert outcome.outcome == "passed", outcome


def test_a_debugger_cannot_take_over_what_contains_it(program_name):
    if os.getuid() and sandbox.no_namespaces():
        pytest.skip("without namespaces a program reaches the processes of its user, which is you")
    outcome = run_program("py", """
import ctypes, os
ATTACH = 16
assert ctypes.CDLL(None).ptrace(ATTACH, os.getppid(), None, None) == -1""", 60)
    assert outcome.outcome == "passed", outcome


def test_a_program_ends_with_the_process_that_evaluates_it(program_name):
    root = Path(sandbox.__file__).parents[1]
    evaluation = subprocess.Popen([sys.executable, "-c", f"""
import sys, tempfile
sys.path.insert(0, "{root}")
from extras import sandbox
tempfile.tempdir = "{tempfile.tempdir}"
sandbox.contained([(("/bin/sh", "{program_name}"), 60)], "{program_name}", "sleep 61; true",
                  namespaces={not sandbox.no_namespaces()})"""])
    try:
        # the program's own; until it calls exec, a child has the evaluation's command line
        wait_until(lambda: left_over(f"/bin/sh\0{program_name}"))
        groups = [group for group in Path("/sys/fs/cgroup").glob("**/flora-*")
                  if parent_of(group.name.removeprefix("flora-")) == evaluation.pid]
        assert sandbox.no_memory_group() or groups
    finally:
        evaluation.send_signal(signal.SIGKILL)
        evaluation.wait()
    wait_until(lambda: not left_over(program_name))
    wait_until(lambda: not any(map(os.path.exists, groups)))
    for folder in Path(tempfile.tempdir).iterdir():
        sandbox.remove(folder)


def parent_of(process):
    try:
        return int(Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:   # it has ended
        return None


def wait_until(happened):
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_namespace_hides_network_processes_and_files(tmp_path, monkeypatch):
    needs("py")
    need_namespaces()
    monkeypatch.setenv("SECRET", "1")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = run_program("py", f"""
import os, signal, socket
def refused(act, *args):
    try:
        act(*args)
    except OSError:
        return True
assert refused(socket.create_connection, ("127.0.0.1", {server.getsockname()[1]}), 1)
for file in ("{tmp_path}/a", "/tmp/a", "/dev/shm/a", "/var/tmp/a"):
    assert refused(open, file, "w"), file
open("own", "w").write("x")
assert "SECRET" not in os.environ and refused(os.kill, {os.getpid()}, 0)
refused(os.kill, os.getppid(), signal.SIGSTOP)
refused(os.kill, -1, signal.SIGKILL)""", 60)
    assert outcome.outcome == "passed", outcome


def test_programs_are_refused_where_there_are_no_limits(monkeypatch):
    monkeypatch.setattr(sandbox.launcher, "resource", None)   # as on Windows
    with pytest.raises(BadInput, match="programs run in limits that Windows does not have"):
        sandbox.contained([(("/bin/sh", "a.sh"), 1)], "a.sh", "true")

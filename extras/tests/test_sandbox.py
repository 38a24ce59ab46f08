"""extras/sandbox.py and its launcher: what contains a program, with namespaces and without."""
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from extras import languages, sandbox
from extras.languages import run_program
from extras.tests.test_languages import needs


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
}


def left_over(name):
    """Live processes with `name` on their command line, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if name in (folder / "cmdline").read_text() and int(folder.name) != os.getpid():
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

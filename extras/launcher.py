"""Contain and run one program: what extras/sandbox.py starts, in a fresh interpreter for each.

  python -I -S extras/launcher.py < SPEC.json

Reads a sandbox.Spec as JSON from standard input. Writes {"code": of sandbox.Ended} to standard
output, or {"error": why nothing could be run}. Imports the standard library alone.

With namespaces there are three processes: this one, which may do no more than wait; the first of
the new PID namespace, whose end takes all others with it; and, under limits, the program. Without,
this one is the subreaper that every orphan falls to, and it kills what the program leaves.
"""
import ctypes
import glob
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

# Linux's names and numbers
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

FOLDER_ENTRIES = 10000   # files and folders in the program's folder


def launch():
    try:
        spec = SimpleNamespace(**json.load(sys.stdin))
        answer = {"code": supervise(spec)}
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    os.write(1, json.dumps(answer).encode())
    os._exit(0)


def supervise(spec):
    """Contain, run, clean up -> the program's code."""
    if spec.user is not None:
        os.chown(spec.folder, spec.user, spec.user)
    if spec.namespaces:
        enter_namespaces(spec)
    elif sys.platform == "linux":
        call("prctl", PR_SET_CHILD_SUBREAPER, 1)
        if spec.user is None:   # the limit counts all threads of the user
            spec.processes += threads_of_user()
    with suppress(OSError):     # out of memory, the kernel ends this first
        write("/proc/self/oom_score_adj", "1000")
    program = start(spec)
    code = wait_for(program, spec)
    if not spec.namespaces:
        kill_leftovers(program)
    return code


def start(spec):
    """Write the program into its folder and start it there -> Popen."""
    os.chdir(spec.folder)
    write(spec.file_name, spec.text)
    os.chmod(spec.file_name, 0o644)
    as_user = dict(user=spec.user, group=spec.user, extra_groups=[]) if spec.user else {}
    return subprocess.Popen(
        spec.command, stdin=subprocess.DEVNULL, stdout=spec.stdout, stderr=spec.stderr,
        env=spec.env, start_new_session=True, preexec_fn=lambda: set_limits(spec), **as_user)


def set_limits(spec):
    """Called in the program's process, before the program."""
    limits = dict(DATA=spec.memory, FSIZE=spec.file, NPROC=spec.processes, CORE=0)
    if spec.address_space:
        limits["AS"] = spec.memory
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    seconds = int(spec.timeout)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 2))


def wait_for(program, spec):
    """Wait until the program ends or goes over a limit -> exit code, -signal, "timeout", "disk"."""
    pause, end = 0.001, time.monotonic() + spec.timeout
    while program.poll() is None:
        if time.monotonic() > end:
            return "timeout"
        if not spec.namespaces and disk_full(spec):   # with them, the folder's file system is small
            return "disk"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return program.returncode


# ---------------------------------------------------------------------------------- with namespaces


def enter_namespaces(spec):
    """Leave behind the network, all other processes, and writing anywhere but in the folder.

    Returns in the first process of the new PID namespace; the caller's waits for its end.
    """
    uid, gid = os.getuid(), os.getgid()
    new = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    call("unshare", new | CLONE_NEWUSER if uid else new)
    if uid:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{uid} {uid} 1")
        write("/proc/self/gid_map", f"{gid} {gid} 1")
    mount_folder(spec, spec.user or uid, spec.user or gid)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)


def mount_folder(spec, uid, gid):
    """Make every file system read-only, and the program's folder a small one of its own."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    mount_attr = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, mount_attr, 32)
    options = f"size={spec.disk},nr_inodes={FOLDER_ENTRIES},mode=700,uid={uid},gid={gid}"
    folder = os.fsencode(spec.folder)
    call("mount", b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())


# ------------------------------------------------------------------------------- without namespaces


def disk_full(spec):
    """Whether the program's folder holds more than it may."""
    used = entries = 0
    try:
        for where, folders, files in os.walk(spec.folder):
            entries += len(folders) + len(files)
            if entries > FOLDER_ENTRIES:
                return True
            for name in files:
                with suppress(OSError):
                    used += os.lstat(os.path.join(where, name)).st_blocks * 512
    except RecursionError:   # folders in folders
        return True
    return used > spec.disk


def kill_leftovers(program):
    """Kill the program's process group, and orphans as they fall to this process, for 5 seconds."""
    end = time.monotonic() + 5
    with suppress(ChildProcessError):   # none is left
        while time.monotonic() < end:
            with suppress(OSError):
                os.killpg(program.pid, signal.SIGKILL)
            for child in children():
                with suppress(OSError):
                    os.kill(child, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def children():
    """Ids of this process's children, adopted ones too."""
    for file in glob.glob("/proc/[0-9]*/stat"):
        with suppress(OSError), open(file, "rb") as f:
            state, parent, *_ = f.read().rpartition(b")")[2].split()
            if int(parent) == os.getpid():
                yield int(file.split("/")[2])


def threads_of_user():
    count = 0
    for task in glob.glob("/proc/[0-9]*/task/[0-9]*"):
        with suppress(OSError):
            count += os.stat(task).st_uid == os.getuid()
    return count


# --------------------------------------------------------------------------------------------- both


def call(name, *args):
    """Call a function of libc that returns 0; OSError where it does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def write(file, text):
    with open(file, "w") as f:
        f.write(text)


if __name__ == "__main__":
    launch()

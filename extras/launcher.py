"""Contain and run one program: what extras/sandbox.py starts, in a fresh interpreter for each.

  python -I -S extras/launcher.py < SPEC.json

Reads a sandbox.Spec as JSON from standard input. Writes {"code": of sandbox.Ended} to standard
output, or {"error": why nothing could be run}. Imports the standard library alone.

There are three processes: this one, the supervisor, which outlasts all others and cleans up; the
runner, its child; and, under limits, the program, the runner's child. With namespaces the runner
is the first process of a new PID namespace, whose end takes all others with it. Without, the
supervisor is the subreaper that every orphan falls to, and it kills what the program leaves. Each
of the three is killed when its parent dies.
"""
import ctypes
import glob
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

try:
    import resource
except ImportError:   # Windows, on which sandbox.py runs nothing
    resource = None

# Linux's names and numbers
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
CLONE_NEWANY = 0x7E020000   # every flag of clone that makes a namespace
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
EFAULT, ENOSYS = 14, 38

FOLDER_ENTRIES = 10000   # files and folders in the program's folder
LINUX = sys.platform == "linux"


def launch():
    try:
        spec = SimpleNamespace(**json.load(sys.stdin))
        answer = supervise(spec)
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    os.write(1, json.dumps(answer).encode())
    os._exit(0)


# --------------------------------------------------------------------------- supervisor and runner


def supervise(spec):
    """Contain, run, clean up -> {"code" or "error"}, and "program", its process id."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())   # and clean up on the way
    die_with_parent(signal.SIGTERM)
    if spec.user is not None:
        os.chown(spec.folder, spec.user, spec.user)
        os.fchown(spec.sign, spec.user, spec.user)
    group, program = memory_group(spec.memory), None
    try:
        if spec.namespaces:
            enter_namespaces(spec)
        elif LINUX:
            call("prctl", PR_SET_CHILD_SUBREAPER, 1)
            if spec.user is None:   # the limit counts all threads of the user
                spec.processes += threads_of_user()
        answer = in_child(lambda: run_steps(spec, group))
        program = answer.get("program")
    finally:
        if not spec.namespaces:   # with them, the runner's end was that of all, and ids are others
            kill_leftovers(program)
        remove_group(group)
    return answer


def in_child(act):
    """Call `act` in a forked child -> the dict that it returned; {"code": "killed"} if it died."""
    from_child, to_parent = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            answer = act()
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        os.write(to_parent, json.dumps(answer).encode())
        os._exit(0)
    os.close(to_parent)
    try:
        os.waitpid(child, 0)
    except SystemExit:   # SIGTERM
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    os.set_blocking(from_child, False)   # another process of this user may hold the other end
    answer = b""
    with suppress(BlockingIOError):
        answer = os.read(from_child, 4096)
    return json.loads(answer or b'{"code": "killed"}')


def run_steps(spec, group):
    """The runner: write the program's file, and run each step until one fails -> as `supervise`."""
    die_with_parent()
    if spec.namespaces:
        call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    if group:
        os.write(group.members, b"0")
    with suppress(OSError):     # out of memory, the kernel ends this first
        write("/proc/self/oom_score_adj", "1000")
    os.chdir(spec.folder)
    write(spec.file_name, spec.text)
    os.chmod(spec.file_name, 0o644)
    for command, seconds in spec.steps:
        program = start(spec, command, seconds)
        code = wait_for(program, seconds, spec)
        with suppress(OSError):
            os.killpg(program.pid, signal.SIGKILL)
        if code != 0:
            break
    if out_of_memory(group):
        code = "killed"
    return {"code": code, "program": program.pid}


def start(spec, command, seconds):
    """Start a command in the program's folder -> Popen."""
    os.dup2(spec.sign, spec.sign_number)
    as_user = dict(user=spec.user, group=spec.user, extra_groups=[]) if spec.user else {}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=spec.stdout, stderr=spec.stderr, env=spec.env,
        pass_fds=[spec.sign_number], start_new_session=True,
        preexec_fn=lambda: set_limits(spec, seconds), **as_user)


def set_limits(spec, seconds):
    """Called in the program's process, before the program."""
    limits = dict(DATA=spec.memory, FSIZE=spec.file, NPROC=spec.processes, NOFILE=spec.files,
                  CORE=0)
    if spec.address_space:
        limits["AS"] = spec.memory
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    die_with_parent()
    if LINUX:   # setuid programs gain nothing
        call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    if can_forbid():
        forbid_calls()


def wait_for(program, seconds, spec):
    """Wait until the program ends or goes over a limit -> exit code, -signal, "timeout", "disk"."""
    pause, end = 0.001, time.monotonic() + seconds
    while program.poll() is None:
        if time.monotonic() > end:
            return "timeout"
        if not spec.namespaces and disk_full(spec):   # with them, the folder's file system is small
            return "disk"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return program.returncode


# ----------------------------------------------------------------------------------- memory in all


def memory_group(most):
    """A new cgroup, of version 1 or 2, whose processes hold at most `most` bytes together, files
    without a name and socket buffers included -> a namespace, or None where none can be had."""
    for parent, file in group_parents():
        folder = f"{parent}/flora-{os.getpid()}"
        with suppress(OSError):
            os.mkdir(folder)
            try:
                write_existing(f"{folder}/{file}", most)
                for name, value in [("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", most)]:
                    with suppress(OSError):
                        write_existing(f"{folder}/{name}", value)
                return SimpleNamespace(   # open files, which stay writable when mounts do not
                    parent=os.open(parent, os.O_RDONLY), name=os.path.basename(folder),
                    members=os.open(f"{folder}/cgroup.procs", os.O_WRONLY),
                    events=os.open(f"{folder}/{EVENTS[file]}", os.O_RDONLY))
            except OSError:
                os.rmdir(folder)
    return None


EVENTS = {"memory.max": "memory.events", "memory.limit_in_bytes": "memory.oom_control"}


def group_parents():
    """Yield (folder, its file for the limit): this process's cgroups, from the inmost outwards."""
    with suppress(OSError), open("/proc/self/cgroup") as f:
        for line in f.read().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, file = "/sys/fs/cgroup", "memory.max"
            elif "memory" in controllers.split(","):
                root, file = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
            else:
                continue
            inner = path.strip("/").split("/")
            for depth in range(len(inner), -1, -1):
                yield "/".join([root, *filter(None, inner[:depth])]), file


def out_of_memory(group):
    """Whether the kernel has killed a process of the cgroup for its memory."""
    if not group:
        return False
    counts = dict(line.split() for line in os.pread(group.events, 4096, 0).decode().splitlines())
    return counts.get("oom_kill", "0") != "0"


def remove_group(group):
    """Remove a cgroup, all of whose processes have been killed."""
    end = time.monotonic() + 1
    while group and time.monotonic() < end:   # it is busy until its last process is gone
        with suppress(OSError):
            return os.rmdir(group.name, dir_fd=group.parent)
        time.sleep(0.01)


# ---------------------------------------------------------------------------------- forbidden calls

MACHINES = {   # {machine: (its number in a filter, {call: its number})}
    "x86_64": (0xC000003E, dict(
        clone=56, clone3=435, unshare=272, setns=308, memfd_create=319, memfd_secret=447,
        shmget=29, msgget=68, semget=64, mq_open=240, io_uring_setup=425, mount=165, fsopen=430,
        open_tree=428, add_key=248, keyctl=250, bpf=321, userfaultfd=323, perf_event_open=298)),
    "aarch64": (0xC00000B7, dict(
        clone=220, clone3=435, unshare=97, setns=268, memfd_create=279, memfd_secret=447,
        shmget=194, msgget=186, semget=190, mq_open=180, io_uring_setup=425, mount=40, fsopen=430,
        open_tree=428, add_key=217, keyctl=219, bpf=280, userfaultfd=282, perf_event_open=241)),
}


def can_forbid():
    """Whether the kernel takes filters, and this machine's numbers are known."""
    if not LINUX or platform.machine() not in MACHINES or struct.calcsize("P") != 8:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None)
    return ctypes.get_errno() == EFAULT   # that it takes filters, but not this one


def forbid_calls():
    """Answer system calls that make namespaces, or hold memory outside the limits, with ENOSYS, as
    an old kernel would (so that libraries fall back); kill a process that makes calls of another
    machine. A classic BPF program, each instruction (code, jump if true, jump if false, k)."""
    architecture, numbers = MACHINES[platform.machine()]
    numbers = dict(numbers)
    clone = numbers.pop("clone")
    load, equal, above, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | ENOSYS, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill),
               (load, 0, 0, 0), (above, 0, 1, 0x40000000), (answer, 0, 0, refuse)]   # x32
    for number in numbers.values():
        program += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 0, 1, CLONE_NEWANY),
                (answer, 0, 0, refuse), (answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)


# ---------------------------------------------------------------------------------- with namespaces


def enter_namespaces(spec):
    """Leave behind the network, all other processes, and writing anywhere but in the folder.

    The PID namespace begins with the next child.
    """
    uid, gid = os.getuid(), os.getgid()
    new = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    call("unshare", new | CLONE_NEWUSER if uid else new)
    if uid:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{uid} {uid} 1")
        write("/proc/self/gid_map", f"{gid} {gid} 1")
    mount_folder(spec, spec.user or uid, spec.user or gid)


def mount_folder(spec, uid, gid):
    """Make every file system read-only, and the program's folder a small one of its own."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    mount_attr = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
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


def threads_of_user():
    count = 0
    for task in glob.glob("/proc/[0-9]*/task/[0-9]*"):
        with suppress(OSError):
            count += os.stat(task).st_uid == os.getuid()
    return count


# --------------------------------------------------------------------------------------------- both


def kill_leftovers(program):
    """Kill this process's children, and orphans as they fall to it, for 5 seconds.

    program: the id of a process group to be killed too, or None.
    """
    end = time.monotonic() + 5
    with suppress(ChildProcessError):   # none is left
        while time.monotonic() < end:
            with suppress(OSError):
                if program:
                    os.killpg(program, signal.SIGKILL)
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


def die_with_parent(number=signal.SIGKILL):
    """Have the kernel send this process a signal when its parent dies."""
    if LINUX:
        call("prctl", PR_SET_PDEATHSIG, number)


def call(name, *args):
    """Call a function of libc that returns 0; OSError where it does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def write(file, text):
    with open(file, "w", encoding="utf-8", newline="") as f:
        f.write(text)


def write_existing(file, value):
    with open(file, "r+") as f:
        f.write(str(value))


if __name__ == "__main__":
    launch()

"""Accuracy: does FLoRA learn as well as LoRA? (§4.2, Table 1)

  python evaluate.py losses                               Table 1's form in held-out bits per byte, real languages
  python evaluate.py toys --i-trust-the-code              Table 1's form in pass@1, a family of toy problems
  python evaluate.py run humaneval-lua.jsonl --adapter FLORA_FILE --samples 100 --i-trust-the-code
  python evaluate.py run HumanEval.jsonl.gz --completions canonical --i-trust-the-code    a check: all must pass

losses and toys train every language x method x seed of --seeds, each method at its own best learning rate, chosen on the
first language with another seed, --seed. A training is a run of train.py in a folder of its own under --out, several at
once.

run samples programs, runs them against their tests and counts (pass@k). A problem file is JSONL, gzipped if it likes:
MultiPL-E's ("name", "language", "prompt", "tests", "stop_tokens") or HumanEval's ("task_id", "prompt", "test",
"entry_point", "canonical_solution").

What has finished is kept, trainings and programs alike: the same command, given again after an interruption or with more
languages, methods or seeds, does only what is missing.

Generated programs are untrusted. Each runs in a process group and an empty folder of its own, without
this process's environment and standard input, under limits (LIMITS) on time, on memory (per process),
on processes, on the size of a file and of its output; run by root, as a user that owns nothing. Where
Linux allows it (most containers do not), namespaces contain it further: it sees no network and no process
but its own, all of which end with it, and can write nowhere but in its folder, of LIMITS["disk"] bytes.
The first line on standard error says which holds. NOT contained: it can read what its user may read
(world-readable files; its own source, so that a program written to cheat can print what passing
prints), it can use the CPU until its time is up, and no sandbox of this size withstands an attack on the
kernel. Without namespaces it also reaches the network and whatever its user may write, and, unless you are
root, your own processes. For code of unknown intent use a machine or a container that holds nothing else.
"""
import argparse
import functools
import inspect
import itertools
import json
import math
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import flora
from flora import BadInput
from generate import Engine, cut_at_stop, load_adapters, load_model, new_text, read_jsonl, read_results, rewrite_results
from model import add_common_flags, read_json, run_main, save_figure, write_json
from train import LEARNING_RATE
from train import parse_args as train_args

LIMITS = dict(memory=1 << 30, processes=64, file=16 << 20, disk=64 << 20)   # bytes, but for processes
OUTCOMES = ("passed", "failed", "timeout", "limit", "refused")              # refused: the prompt does not fit
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]            # of the Codex paper


class Language(NamedTuple):
    command: tuple        # what runs the file
    file: str
    done: str             # the statement that ends the program: prints the token, once the tests have passed
    library: tuple = ()   # (how tests name what they need beside the interpreter, a statement that loads it)


LANGUAGES = {  # by MultiPL-E's names
    "py": Language(("python3",), "program.py", 'print("\\nTOKEN")'),
    "pl": Language(("perl",), "program.pl", 'print "\\nTOKEN\\n";', ("Test::Deep", "use Test::Deep;")),
    "lua": Language(("lua",), "program.lua", 'print("\\nTOKEN")', ("luaunit", 'require("luaunit")')),
    "rb": Language(("ruby",), "program.rb", """
if defined?(Test::Unit::AutoRunner)  # it would run its tests at exit, too late
  Test::Unit::AutoRunner.need_auto_run = false
  exit(1) unless Test::Unit::AutoRunner.run
end
puts "", "TOKEN\"""", ("test/unit", 'require "test/unit"')),
    "r": Language(("Rscript",), "program.R", 'cat("\\nTOKEN\\n")'),
    "js": Language(("node", "--max-old-space-size=512"), "program.js", 'console.log("\\nTOKEN")'),
    "sh": Language(("bash",), "program.sh", "echo; echo TOKEN"),
}
ALIASES = {"python": "py", "perl": "pl", "ruby": "rb", "R": "r", "javascript": "js", "bash": "sh"}


class Problem(NamedTuple):
    file: str                      # its base name: with `name` it tells problems apart
    name: str
    language: str                  # a key of LANGUAGES
    prompt: str
    tests: str                     # what follows the completion
    stops: list                    # texts that end a completion
    solution: str | None = None    # a completion that is known to pass


def read_problems(file):
    """Problems of a MultiPL-E or HumanEval file (.jsonl or .jsonl.gz) -> list of Problem, in its order.

    Raises BadInput for a file that cannot be read, a line without the keys of either, a language that
    LANGUAGES lacks, and a name that comes twice.
    """
    problems = {}
    try:
        for line, given in read_jsonl(file):
            where, human = f"{file} line {line}", isinstance(given, dict) and "task_id" in given
            keys = ("task_id", "prompt", "test", "entry_point") if human else ("name", "language", "prompt", "tests")
            if not isinstance(given, dict) or not all(isinstance(given.get(key), str) for key in keys):
                raise BadInput(f"{where}: is no problem; MultiPL-E's have the texts name, language, prompt and "
                               "tests, HumanEval's task_id, prompt, test and entry_point")
            stops = given.get("stop_tokens", HUMANEVAL_STOPS if human else [])
            if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
                raise BadInput(f"{where}: stop_tokens is {stops!r}, which is no list of texts")
            language = "py" if human else ALIASES.get(given["language"], given["language"])
            if language not in LANGUAGES:
                raise BadInput(f"{where}: language {language!r} cannot be run here; use one of "
                               f"{', '.join(LANGUAGES)}")
            name = given[keys[0]]
            if name in problems:
                raise BadInput(f"{where}: the name {name} comes twice; rename one")
            tests = f"{given['test']}\ncheck({given['entry_point']})" if human else given["tests"]
            problems[name] = Problem(os.path.basename(file), name, language, given["prompt"], tests, stops,
                                     given.get("canonical_solution"))
    except (OSError, EOFError, ValueError, zlib.error) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{file}: not readable as JSONL ({e})") from None
    if not problems:
        raise BadInput(f"{file}: holds no problem")
    return list(problems.values())


# ------------------------------------------------------------------------------ running one program


def launch():
    """Run one program contained. This function's source is all that an interpreter of its own runs:
    specification as JSON on standard input, {"code": exit code, "timeout" or "disk"} or {"error": why
    nothing could be run} on standard output.

    With namespaces there are three processes: this one, which may do no more than wait; the first
    of the new PID namespace, whose end takes all others with it; and, under limits, the program.
    Without, this one is the subreaper that every orphan falls to, and kills what the program leaves.
    """
    import ctypes, glob, json, os, resource, signal, subprocess, sys, time  # noqa: E401
    from contextlib import suppress
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *args):
        if getattr(libc, name)(*args) != 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def write(file, text):
        with open(file, "w") as f:
            f.write(text)

    def enter_namespaces():
        uid, gid = os.getuid(), os.getgid()
        # CLONE_NEWNS, NEWIPC, NEWPID, NEWNET, and NEWUSER where one is not root
        call("unshare", 0x20000 | 0x08000000 | 0x20000000 | 0x40000000 | (0x10000000 if uid else 0))
        if uid:
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"{uid} {uid} 1")
            write("/proc/self/gid_map", f"{gid} {gid} 1")
        call("mount", b"none", b"/", None, 0x44000, None)                     # MS_REC | MS_PRIVATE
        read_only = (ctypes.c_uint64 * 4)(1)                                  # mount_attr: MOUNT_ATTR_RDONLY
        call("syscall", 442, -100, b"/", 0x8000, read_only, 32)               # mount_setattr, AT_RECURSIVE
        options = f"size={spec['disk']},nr_inodes=10000,mode=700,uid={user or uid},gid={user or gid}"
        call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 6, options.encode())   # MS_NOSUID | MS_NODEV
        if child := os.fork():
            os.waitpid(child, 0)
            os._exit(0)
        call("prctl", 1, signal.SIGKILL)                                      # PR_SET_PDEATHSIG
        call("mount", b"proc", b"/proc", b"proc", 14, None)                   # and MS_NOEXEC

    def limit():
        for name in ("AS", "DATA") if spec["address_space"] else ("DATA",):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (spec["memory"],) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (spec["file"],) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(spec["timeout"]) + 1, int(spec["timeout"]) + 2))
        resource.setrlimit(resource.RLIMIT_NPROC, (processes,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def disk_full():
        used = entries = 0
        try:
            for where, folders, files in os.walk(folder):
                entries += len(folders) + len(files)
                if entries > 10000:
                    return True
                for name in files:
                    with suppress(OSError):
                        used += os.lstat(os.path.join(where, name)).st_blocks * 512
        except RecursionError:  # folders in folders
            return True
        return used > spec["disk"]

    def children():
        for file in glob.glob("/proc/[0-9]*/stat"):
            with suppress(OSError), open(file, "rb") as f:
                if int(f.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    yield int(file.split("/")[2])

    try:
        spec = json.load(sys.stdin)
        folder, user, processes = spec["folder"], None, spec["processes"]
        if os.getuid() == 0:
            user = spec["user"]
            os.chown(folder, user, user)
        if spec["namespaces"]:
            enter_namespaces()
        elif sys.platform == "linux":
            call("prctl", 36, 1)                                              # PR_SET_CHILD_SUBREAPER
            if user is None:  # the limit counts all threads of the user
                for task in glob.glob("/proc/[0-9]*/task/[0-9]*"):
                    with suppress(OSError):
                        processes += os.stat(task).st_uid == os.getuid()
        with suppress(OSError):
            write("/proc/self/oom_score_adj", "1000")  # out of memory, the kernel ends this first
        os.chdir(folder)
        write(spec["file_name"], spec["text"])
        os.chmod(spec["file_name"], 0o644)
        as_user = dict(user=user, group=user, extra_groups=[]) if user else {}
        program = subprocess.Popen(spec["command"], stdin=subprocess.DEVNULL, stdout=spec["stdout"], env=spec["env"],
                                   stderr=spec["stderr"], start_new_session=True, preexec_fn=limit, **as_user)
        code, pause, end = None, 0.001, time.monotonic() + spec["timeout"]
        while code is None and (code := program.poll()) is None:
            if time.monotonic() > end:
                code = "timeout"
            elif not spec["namespaces"] and disk_full():
                code = "disk"
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        if not spec["namespaces"]:
            end = time.monotonic() + 5
            with suppress(ChildProcessError):  # none is left
                while time.monotonic() < end:
                    with suppress(OSError):
                        os.killpg(program.pid, signal.SIGKILL)
                    for child in children():
                        with suppress(OSError):
                            os.kill(child, signal.SIGKILL)
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
        answer = {"code": code}
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    os.write(1, json.dumps(answer).encode())
    os._exit(0)


class Outcome(NamedTuple):
    outcome: str              # one of OUTCOMES
    code: int | str | None    # exit code, -signal, or which limit
    error: str                # the end of what it wrote to standard error


LAUNCHER = f"{inspect.getsource(launch)}\nlaunch()"
NEXT_USER = itertools.count(64 * os.getpid())  # as root: one that no program running now has


def contained(command, file_name, text, timeout, namespaces, address_space=True):
    """Run `command` on a file that holds `text`, by launch() -> (code, ends of stdout and of stderr, bytes of
    stdout). Raises OSError where it could not be started."""
    names = ("PATH", "PERL5LIB", "LUA_PATH", "LUA_CPATH", "GEM_PATH", "R_LIBS", "R_LIBS_USER", "NODE_PATH")
    folder = tempfile.mkdtemp(prefix="program-")
    env = {name: os.environ[name] for name in names if name in os.environ} | dict(
        HOME=folder, TMPDIR=folder, LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        spec = LIMITS | dict(
            command=[*command, file_name], file_name=file_name, text=text, timeout=timeout, folder=folder, env=env,
            namespaces=namespaces, address_space=address_space, user=61184 + next(NEXT_USER) % 4096,
            stdout=out.fileno(), stderr=err.fileno())
        try:
            answer = subprocess.run([sys.executable, "-I", "-S", "-c", LAUNCHER], input=json.dumps(spec).encode(),
                                    capture_output=True, pass_fds=(out.fileno(), err.fileno()), cwd="/",
                                    start_new_session=True, timeout=timeout + 15)
            answer = json.loads(answer.stdout or b'{"code": "killed"}')       # out of memory, say
        except subprocess.TimeoutExpired:
            answer = {"code": "timeout"}
        finally:
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)  # of any depth
        if "error" in answer:
            raise OSError(answer["error"])
        sizes = [os.fstat(f.fileno()).st_size for f in (out, err)]
        ends = [os.pread(f.fileno(), 4096, max(0, size - 4096)).decode(errors="replace")
                for f, size in zip((out, err), sizes)]
    return answer["code"], *ends, max(sizes)


@functools.cache
def no_namespaces():
    """Why programs cannot have namespaces of their own here; "" where they can."""
    try:
        contained(("/bin/sh",), "program.sh", "true", 10, namespaces=True)
        return ""
    except OSError as e:
        return str(e)


def attempt(language, interpreter, text, timeout):
    """Run a program with the interpreter at a path -> Outcome."""
    _, *flags = LANGUAGES[language].command
    token = secrets.token_hex(16)
    # how MultiPL-E's Lua tests end
    text = text.replace("os.exit(lu.LuaUnit.run())", "if lu.LuaUnit.run() ~= 0 then os.exit(1) end")
    text = f"{text}\n{LANGUAGES[language].done.replace('TOKEN', token)}\n"
    code, out, err, size = contained(
        (interpreter, *flags), LANGUAGES[language].file, text, timeout, namespaces=not no_namespaces(),
        address_space=language != "js")  # node reserves more than it uses
    if code == "timeout":
        outcome = "timeout"
    elif code in ("disk", "killed", -24, -25) or size >= LIMITS["file"]:      # SIGXCPU, SIGXFSZ
        outcome = "limit"
    else:
        outcome = "passed" if code == 0 and out.splitlines()[-1:] == [token] else "failed"
    return Outcome(outcome, code, err[-300:])


@functools.cache
def interpreter_of(language, library=False):
    """Path of the first interpreter on PATH that runs a program of `language` contained (and loads the library
    that its tests need). BadInput names what is missing."""
    name, where = LANGUAGES[language].command[0], os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = [path for path in (shutil.which(name, path=folder) for folder in where) if path]
    if language == "py":
        found.insert(0, sys.executable)
    if not found:
        raise BadInput(f"problems in {language} need the program {name}, which is not on PATH; install it")
    for path in dict.fromkeys(found):
        try:
            outcome = attempt(language, path, LANGUAGES[language].library[1] if library else "", 30)
            if outcome.outcome == "passed":
                return path
            why = (outcome.error.strip().splitlines() or [f"{outcome.outcome}, {outcome.code}"])[0]
        except OSError as e:
            why = str(e)
    what = f"{name}'s {LANGUAGES[language].library[0]}" if library else f"the program {name}"
    raise BadInput(f"problems in {language} need {what}, and {' and '.join(found)} cannot run it here ({why}); "
                   "install it")


def run_program(language, text, timeout=15.0):
    """Run a whole program, tests included, contained as the top of this file says -> Outcome.

    language: a key of LANGUAGES. timeout: seconds of wall time. It has passed if it reached its end, where a
    random token is printed, and then exited with 0. Raises BadInput for a missing interpreter.
    """
    return attempt(language, interpreter_of(language), text, timeout)


# -------------------------------------------------------------------------- sampling and scoring


def pass_at_k(n, c, k):
    """The unbiased estimate of pass@k from n samples of which c pass (Chen et al. 2021, Eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values):
    """Mean, and its standard error over problems (None of one problem)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def sample_completions(model, tokenizer, adapter_id, todo, max_new_tokens=512, temperature=0.1, top_p=0.95, seed=0,
                       slots=8):
    """Sample a completion for each (problem, sample number) of todo by continuous batching. Yields
    (problem, sample, text, number of tokens, error) as they end.

    A sample's randomness depends on seed, problem and number alone. The prompt is encoded without
    the white space at its end, which would split tokens as training text does not.
    """
    engine, todo, asked = Engine(model, min(slots, max(1, len(todo)))), iter(todo), {}
    while True:
        for problem, number in itertools.islice(todo, engine.slots - len(engine.waiting)):
            # a stop that is new ends in the tokens read last, and spans a token per byte at most
            tail = max((len(s.encode()) for s in problem.stops), default=0) + engine.sync_every
            stopped = problem.stops and (lambda ids, tail=tail, stops=problem.stops: any(
                s in tokenizer.decode(ids[-tail:], continues=True) for s in stops))
            request = engine.submit(
                tokenizer.encode(problem.prompt.rstrip(), bos=True), adapter_id=adapter_id, max_new_tokens=max_new_tokens,
                temperature=temperature, top_p=top_p, seed=zlib.crc32(f"{seed} {problem.name} {number}".encode()),
                eos_id=tokenizer.eos_id, stopped=stopped or None)
            asked[request] = problem, number
        if not engine.busy:
            return
        for request, _ in engine.step():
            if request.state in ("done", "failed"):
                problem, number = asked.pop(request)
                text = new_text(tokenizer, request.ids)
                yield problem, number, cut_at_stop(text, problem.stops), len(request.ids), request.error


def execute(completions, workers=None, timeout=15.0):
    """Run each of (problem, sample, text, tokens, error) in one of `workers` threads (default: one per core), while
    the iterator makes more. Yields results, dicts of "file", "name", "sample", "completion", "tokens", "outcome",
    "code" and "error", as they come."""
    def result(problem, number, text, tokens, error):
        outcome = Outcome("refused", None, error) if error else run_program(
            problem.language, f"{problem.prompt}{text}\n{problem.tests}", timeout)
        return dict(file=problem.file, name=problem.name, sample=number, completion=text, tokens=tokens,
                    **outcome._asdict())
    pool, running = ThreadPoolExecutor(workers or os.cpu_count()), set()
    try:
        for completion in completions:
            running.add(pool.submit(result, *completion))
            ended = {future for future in running if future.done()}
            running -= ended
            yield from (future.result() for future in ended)
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)
    finally:
        pool.shutdown(cancel_futures=True)


def count(problems, results):
    """Per-problem counts of results -> a Counter of outcomes for each of problems, in their order."""
    counts = {(p.file, p.name): Counter() for p in problems}
    for r in results:
        counts[r["file"], r["name"]][r["outcome"]] += 1
    return list(counts.values())


def evaluate_problems(model, tokenizer, adapter_id, problems, samples=100, workers=None, timeout=15.0, **settings):
    """Sample and run `samples` programs per problem -> a Counter of OUTCOMES for each. settings: of
    sample_completions."""
    check_languages(problems)
    todo = [(problem, number) for problem in problems for number in range(samples)]
    completions = sample_completions(model, tokenizer, adapter_id, todo, **settings)
    return count(problems, execute(completions, workers, timeout))


def summary(problems, counts, ks):
    """A row for each file: problems, samples, "pass@k" and its "±" for each k, and the outcomes."""
    rows = []
    for file in dict.fromkeys(p.file for p in problems):
        mine = [c for p, c in zip(problems, counts) if p.file == file]
        row = dict(file=file, problems=len(mine), samples=sum(map(Counter.total, mine)))
        for k in ks:
            row[f"pass@{k}"], row[f"±{k}"] = mean_and_error([pass_at_k(c.total(), c["passed"], k) for c in mine])
        rows.append(row | {outcome: sum(c[outcome] for c in mine) for outcome in OUTCOMES})
    return rows


def print_table(rows, ks):
    table = [["file", "problems", "samples", *(f"pass@{k}" for k in ks), *OUTCOMES]]
    for row in rows:
        scores = [f"{row[f'pass@{k}']:.4f}" + ("" if row[f"±{k}"] is None else f" ± {row[f'±{k}']:.4f}") for k in ks]
        table.append([str(row[key]) for key in table[0][:3]] + scores + [str(row[key]) for key in OUTCOMES])
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())


# ------------------------------------------------------------------------------------ the command


def check_languages(problems):
    """BadInput where an interpreter, or the library that tests need, is missing."""
    for language in dict.fromkeys(p.language for p in problems):
        interpreter_of(language)
        library = LANGUAGES[language].library
        if library and any(library[0] in p.prompt + p.tests for p in problems if p.language == language):
            interpreter_of(language, library=True)


def given_completions(source, problems):
    """{(problem, sample number): text} of --completions: canonical, empty, or a JSONL file of "task_id" or "name",
    "completion" and, where names repeat between problem files, "file"."""
    if source == "empty":
        return {(p, 0): "" for p in range(len(problems))}
    if source == "canonical":
        for p in problems:
            if p.solution is None:
                raise BadInput(f"--completions canonical: {p.name} of {p.file} has no canonical_solution")
        return {(i, 0): p.solution for i, p in enumerate(problems)}
    given, numbers = {}, Counter()
    try:
        for line, c in read_jsonl(source):
            name = c.get("task_id", c.get("name")) if isinstance(c, dict) else None
            if name is None or not isinstance(c.get("completion"), str):
                raise BadInput(f'--completions {source} line {line}: needs "task_id" or "name", and "completion"')
            found = [i for i, p in enumerate(problems) if p.name == name and c.get("file", p.file) == p.file]
            if len(found) != 1:
                raise BadInput(f"--completions {source} line {line}: {name} is the name of {len(found)} problems; "
                               'it must be of one (say which by "file")')
            given[found[0], numbers[found[0]]] = c["completion"]
            numbers[found[0]] += 1
    except (OSError, EOFError, ValueError, zlib.error) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"--completions {source}: not readable as JSONL ({e})") from None
    for i, p in enumerate(problems):
        if not numbers[i]:
            raise BadInput(f"--completions {source}: has none for {p.name} of {p.file}")
    return given


def resume(file, settings, problems):
    """Results of an earlier run -> {(file, name, sample): result}. BadInput where its settings or problems
    were others."""
    results = read_results(file, "file", "name", "sample")
    expected = {(p.file, p.name): settings | dict(crc=problem_crc(p)) for p in problems}
    for (*problem, _), r in results.items():
        for key, value in expected.get(tuple(problem), settings).items():
            if r.get(key) != value:
                what = (f"another form of the problem {r['name']} of {r['file']}" if key == "crc" else
                        f"{key} {r.get(key)}, not {value}")
                raise BadInput(f"--results {file}: was made with {what}; move the file away, or choose another "
                               "--results")
    rewrite_results(file, results)
    return results


def problem_crc(problem):
    return zlib.crc32(json.dumps(problem).encode())


def require_consent(args):
    """BadInput without --i-trust-the-code; with it, say how programs are contained here."""
    if not args.i_trust_the_code:
        raise BadInput("this runs programs that a model wrote on this machine, contained only as the top of "
                       "evaluate.py says; read that, and add --i-trust-the-code")
    print(f"sandbox: limits, but no namespaces ({no_namespaces()}): programs reach the network and whatever their "
          "user may write" if no_namespaces() else "sandbox: limits and namespaces: programs see no network and no "
          "other process, and write nowhere but in their folder; they read what their user may", file=sys.stderr)


def run(args):
    """The command `run`: pass@k of problem files."""
    require_consent(args)
    if len({os.path.basename(file) for file in args.files}) < len(args.files):
        raise BadInput("two problem files have the same name, by which results are told apart; rename one")
    problems = [p for file in args.files for p in read_problems(file)]
    given = given_completions(args.completions, problems) if args.completions else None
    todo = given or [(i, number) for i in range(len(problems)) for number in range(args.samples)]
    samples = min(Counter(i for i, _ in todo).values())
    ks = args.k or [k for k in (1, 10) if k <= samples]
    if max(ks) > samples:
        raise BadInput(f"--k {max(ks)}: needs as many samples of every problem, and there are {samples}")
    check_languages(problems)

    settings = dict(completions=args.completions, timeout=args.timeout)
    if not given:
        settings |= {key: getattr(args, key) for key in (
            "weights", "adapter", "dtype", "quantize", "max_new_tokens", "temperature", "top_p", "seed")}
    results = resume(args.results, settings, problems)
    keys = {(problems[i].file, problems[i].name, number): (i, number) for i, number in todo}
    results = {key: r for key, r in results.items() if key in keys}
    missing = [(problems[i], number) for key, (i, number) in keys.items() if key not in results]
    if given:
        completions = [(problems[i], number, given[i, number], 0, None) for key, (i, number) in keys.items()
                       if key not in results]
    elif missing:
        model, tokenizer = load_model(args)
        adapter_id = load_adapters(model, [args.adapter])[args.adapter]
        slots = args.slots or (8 if args.device == "cpu" else 64)
        completions = sample_completions(model, tokenizer, adapter_id, missing, args.max_new_tokens, args.temperature,
                                         args.top_p, args.seed, slots)
    else:
        completions = []
    crc = {(p.file, p.name): problem_crc(p) for p in problems}
    start, tokens, passed = time.time(), 0, sum(r["outcome"] == "passed" for r in results.values())
    with open(args.results, "a", encoding="utf-8") as f, \
            tqdm(total=len(keys), initial=len(results), unit="program") as bar:
        for r in execute(completions, args.workers, args.timeout):
            key = r["file"], r["name"]
            f.write(json.dumps(r | dict(crc=crc[key]) | settings) + "\n")
            f.flush()
            results[*key, r["sample"]] = r
            tokens, passed = tokens + r["tokens"], passed + (r["outcome"] == "passed")
            bar.set_postfix_str(f"{tokens / (time.time() - start):.0f} tokens/s, {passed} passed", refresh=False)
            bar.update()
    counts = count(problems, results.values())
    rows = summary(problems, counts, ks)
    print_table(rows, ks)
    print(f"{passed} of {len(results)} programs passed")
    if args.json:
        write_json(args.json, dict(settings=settings, rows=rows, problems=[
            dict(file=p.file, name=p.name, **c) for p, c in zip(problems, counts)]))


# ------------------------------------------------------------------------------------ Table 1

HERE = Path(__file__).resolve().parent
METHODS = {  # command: {name in its table, beginning with the adapter's kind: flags of train.py}
    "losses": {"flora-r1": "--adapter flora --rank 1", "flora-r4": "--adapter flora --rank 4",
               "lora-r1": "--adapter lora --rank 1", "lora-r4": "--adapter lora --rank 4",
               "ia3": "--adapter ia3", "ia3-c_attn": "--adapter ia3 --targets c_attn",
               "ffba-r2": "--adapter ffba --rank 2"},
    "toys": {"flora-r4": "--adapter flora --rank 4 --targets all", "lora-r4": "--adapter lora --rank 4 --targets all",
             "ia3": "--adapter ia3 --targets all"},
}
SITE = sysconfig.get_paths()["purelib"]
CORPORA = {  # real code that the requirements bring: (folder, extensions)
    "cpp": (os.path.join(os.path.dirname(torch.__file__), "include"), ".h .hpp"),
    "cuda": (os.path.join(os.path.dirname(torch.__file__), "include"), ".cuh .cu"),
    "cmake": (SITE, ".cmake"),
    "pyi": (SITE, ".pyi"),
}


def corpus(name):
    """"cpp", or "NAME=FOLDER:.EXT" for code of one's own -> (name, train.py's --data and --ext)."""
    if name in CORPORA:
        folder, extensions = CORPORA[name]
    else:
        name, _, place = name.partition("=")
        folder, _, extensions = place.rpartition(":")
        if not (folder and extensions):
            raise BadInput(f"--languages {name}: use one of {', '.join(CORPORA)}, or NAME=FOLDER:.EXT")
    return name, ["--data", folder, "--ext", *extensions.split()]


def train_all(runs, jobs):
    """Run train.py for every {folder: flags} that has no result yet, `jobs` at once with the cores shared out.

    -> {folder: its log.json}. A run that fails, or Ctrl-C, stops all; what has finished stays.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def run(folder):
        log = Path(folder, "log.json")
        if log.exists():
            done, asked = read_json(log), vars(train_args(runs[folder]))
            for key in ("adapter", "lr", "seed", "steps", "batch_size", "block_size", "dtype", "quantize"):
                if done.get(key) != asked[key]:
                    raise BadInput(f"{log} was made with --{key.replace('_', '-')} {done.get(key)}, not {asked[key]}; "
                                   "choose another --out, or delete it")
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with open(Path(folder, "train.txt"), "w") as text:
                code = subprocess.run([sys.executable, str(HERE / "train.py"), *runs[folder], "--out", folder,
                                       "--resume"], stdout=text, stderr=text, env=env).returncode
            if code:
                raise BadInput(f"a training failed, see {folder}/train.txt; its command: python train.py "
                               f"{shlex.join(runs[folder])} --out {folder}")
        return folder, read_json(log)

    logs = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit="run") as bar:
        futures = [pool.submit(run, folder) for folder in runs]
        try:
            for future in as_completed(futures):
                folder, logs[folder] = future.result()
                bar.set_postfix(run=os.path.relpath(folder), bits=f"{logs[folder]['heldout_bpb_after']:.3f}")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return logs


def tune(args, data):
    """Choose each method's learning rate by held-out loss on `data`: from train.py's default up by factors of two
    to 8, and on in either direction while the last one tried is the best. Prints the sweep.

    -> {method: {rate: held-out bits/byte}}
    """
    sweep = {method: {} for method in args.methods}
    default = {method: LEARNING_RATE[method.split("-")[0]] for method in args.methods}
    wanted = {method: [lr, 2 * lr, 4 * lr, 8 * lr] for method, lr in default.items()}
    while any(wanted.values()):
        runs = {f"{args.out}/tune/{method}/{lr:g}": train_flags(args, method, data, lr, args.seed)
                for method in wanted for lr in wanted[method]}
        logs = train_all(runs, args.jobs)
        for method, tried in sweep.items():
            tried |= {lr: logs[f"{args.out}/tune/{method}/{lr:g}"]["heldout_bpb_after"] for lr in wanted[method]}
            best = min(tried, key=tried.get)
            wanted[method] = [2 * best] if best == max(tried) else [best / 2] if best == min(tried) else []
    print(f"\nlearning rates, tried on {args.languages[0]} with seed {args.seed}: held-out bits/byte")
    for method, tried in sweep.items():
        print(f"{method:>12}  " + "  ".join(f"{lr:g}: {tried[lr]:.4f}" for lr in sorted(tried)))
    return sweep


def train_flags(args, method, data, lr, seed):
    """train.py's flags for one run."""
    return [*METHODS[args.command][method].split(), *data, "--lr", f"{lr:g}", "--seed", str(seed),
            "--weights", args.weights, "--dtype", args.dtype, "--device", args.device, "--steps", str(args.steps),
            "--batch-size", str(args.batch_size), "--block-size", str(args.block_size),
            "--eval-every", str(args.steps), "--eval-tokens", str(args.eval_tokens),
            *(["--quantize", args.quantize] if args.quantize else [])]


def train_table(args, languages):
    """Tune on the first of {language: train.py's --data flags}, then train all languages x methods x seeds.

    -> {language: {method: [log.json of each seed]}}, the sweep of `tune`
    """
    sweep = tune(args, next(iter(languages.values())))
    best = {method: min(tried, key=tried.get) for method, tried in sweep.items()}
    logs = train_all({f"{args.out}/{language}/{method}/{seed}": train_flags(args, method, data, best[method], seed)
                      for language, data in languages.items() for method in best for seed in args.seeds}, args.jobs)
    print(f"\n{len(logs)} trainings of {args.steps} steps of {args.batch_size} x {args.block_size} tokens, {args.dtype}, "
          f"{args.jobs} at once, {np.mean([log['seconds'] for log in logs.values()]):.0f} s each")
    return {language: {method: [logs[f"{args.out}/{language}/{method}/{seed}"] for seed in args.seeds]
                       for method in best} for language in languages}, sweep


def over_seeds(values, **more):
    """Mean and standard deviation, a cell of a table."""
    return dict(mean=float(np.mean(values)), spread=float(np.std(values, ddof=len(values) > 1)), seeds=values, **more)


def finish(args, table, sweep, **more):
    """Write a table and its sweep as JSON."""
    settings = {key: getattr(args, key) for key in ("seeds", "steps", "batch_size", "block_size", "dtype", "weights")}
    file = args.json or f"{args.out}/table.json"
    write_json(file, dict(table=table, sweep=sweep, torch=torch.__version__, **settings, **more))
    print(f"\nwrote {file} and {args.png}")


def losses(args):
    """The command `losses`: Table 1's form, in held-out bits per byte."""
    logs, sweep = train_table(args, dict(map(corpus, args.languages)))
    table = {}
    for language, methods in logs.items():
        table[language] = {"base": over_seeds([next(iter(methods.values()))[0]["heldout_bpb_before"]])}
        for method, seeds in methods.items():
            table[language][method] = over_seeds([log["heldout_bpb_after"] for log in seeds],
                                                 parameters=seeds[0]["trainable_parameters"])
    print_accuracy(table, "held-out bits per byte (relative improvement) ± standard deviation over seeds",
                   lambda base, x: f"{100 * (base - x) / base:+.1f} %")
    draw(args.png, table, "held-out bits per byte saved", lambda base, x: base - x)
    finish(args, table, sweep)


def toys(args):
    """The command `toys`: pass@1 on held-out problems of a family made for small models, by execution.

    A base model that has learnt the family in Python alone is adapted to each of the other languages.
    """
    require_consent(args)
    problems, base = f"{args.out}/problems", f"{args.out}/base"
    if not os.path.exists(problems):
        subprocess.run([sys.executable, HERE / "fixtures" / "make_problems.py", f"{problems}.tmp"], check=True)
        os.replace(f"{problems}.tmp", problems)
    held_out = {language: read_problems(f"{problems}/{language}.jsonl") for language in ("py", *args.languages)}
    data = {language: ["--data", f"{problems}/{language}", "--keep-duplicates"] for language in held_out}
    train_all({base: ["--adapter", "none", "--weights", args.weights, *data.pop("py"), "--lr", "1e-3", "--steps",
                      str(args.base_steps), "--batch-size", str(args.batch_size), "--block-size", str(args.block_size),
                      "--dtype", args.dtype, "--device", args.device, "--eval-every", str(args.base_steps)]}, 1)
    args.weights = base
    logs, sweep = train_table(args, data)

    model, tokenizer = load_model(args)

    def score(problems, adapter, file):
        if not os.path.exists(file):
            adapter_id = load_adapters(model, [adapter])[adapter]
            counts = evaluate_problems(model, tokenizer, adapter_id, problems, args.samples, max_new_tokens=96,
                                       temperature=0.1, slots=16)
            if adapter_id:
                flora.remove_adapter(model, adapter_id)
            write_json(file, dict(counts=counts))
        return summary(problems, list(map(Counter, read_json(file)["counts"])), [1])[0]["pass@1"]

    table, bar = {}, tqdm(total=len(data) * len(next(iter(logs.values()))) * len(args.seeds), unit="adapter")
    in_python = score(held_out["py"], "none", f"{base}/pass.json")
    for language, methods in logs.items():
        table[language] = {"base": over_seeds([score(held_out[language], "none", f"{args.out}/{language}/pass.json")])}
        for method, seeds in methods.items():
            passed = []
            for log in seeds:
                passed.append(score(held_out[language], log["adapter_file"], log["adapter_file"].replace(
                    "adapter.safetensors", "pass.json")))
                bar.update()
            table[language][method] = over_seeds(passed, parameters=seeds[0]["trainable_parameters"])
    bar.close()
    print(f"\nthe base model passes {in_python:.4f} of the held-out problems in Python, which it was trained on")
    print_accuracy(table, "pass@1 on held-out problems (change) ± standard deviation over seeds",
                   lambda base, x: f"{x - base:+.4f}")
    draw(args.png, table, "pass@1 on held-out problems", lambda base, x: x)
    finish(args, table, sweep, base_in_python=in_python)


def print_accuracy(table, title, change):
    """{row: {column: {mean, spread}}} as a Markdown table, each cell with its change from the base column."""
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for row, cells in table.items():
        base = cells["base"]["mean"]
        print(f"| {row} | {base:.4f} | " + " | ".join(
            f"{c['mean']:.4f} ({change(base, c['mean'])}) ± {c['spread']:.4f}"
            for name, c in cells.items() if name != "base") + " |")


def draw(file, table, title, height):
    """Bars of height(base, mean) for every row of `table` and method, with the spread over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    methods = [name for name in next(iter(table.values())) if name != "base"]
    figure, axis = plt.subplots(figsize=(1.5 + 1.6 * len(table), 3.6))
    for i, method in enumerate(methods):
        x = np.arange(len(table)) + (i - (len(methods) - 1) / 2) / (len(methods) + 1)
        axis.bar(x, [height(row["base"]["mean"], row[method]["mean"]) for row in table.values()], 0.9 / (len(methods) + 1),
                 yerr=[row[method]["spread"] for row in table.values()], label=method, capsize=2)
    axis.set_xticks(range(len(table)), list(table))
    axis.set(ylabel=title)
    axis.legend(fontsize=8)
    save_figure(figure, file)


# ------------------------------------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    consent = dict(action="store_true", help="consent to run what a model wrote; see the top")

    command = commands.add_parser("run", help="pass@k of problem files, by running generated programs")
    command.set_defaults(run=run, attention="flash")
    add = command.add_argument
    add("files", nargs="+", metavar="FILE", help="problems, .jsonl or .jsonl.gz")
    add("--adapter", default="none", metavar="FILE", help="none (the default) is the base model")
    add("--completions", metavar="canonical|empty|FILE", help="score these instead of sampling: the problems' own "
        "solutions, nothing, or a JSONL file")
    add("--samples", type=int, default=100, help="per problem (default: 100, the paper's)")
    add("--k", type=int, nargs="+", help="(default: 1 10)")
    add("--max-new-tokens", type=int, default=512)
    add("--temperature", type=float, default=0.1, help="(default: 0.1, the paper's)")
    add("--top-p", type=float, default=0.95)
    add("--slots", type=int, help="samples generated at once (default: 8 on a CPU, else 64)")
    add("--workers", type=int, help="programs run at once (default: one per core)")
    add("--timeout", type=float, default=15.0, help="seconds for a program (default: 15)")
    add("--results", default="out/evaluate.jsonl", metavar="FILE", help="JSONL to write, or to complete")
    add("--i-trust-the-code", **consent)
    add_common_flags(command, dtypes=["float32", "bfloat16", "float16"])

    for name, function, languages, steps in (("losses", losses, list(CORPORA), 150), ("toys", toys, ["pl", "js", "sh"], 300)):
        command = commands.add_parser(name, help=function.__doc__.split("\n")[0].partition(": ")[2])
        add = command.add_argument
        add("--languages", nargs="+", default=languages, metavar="LANGUAGE", help=f"default: {' '.join(languages)}; learning "
            "rates are chosen on the first" + ("; NAME=FOLDER:.EXT adds code of your own" if name == "losses" else ""))
        add("--methods", nargs="+", choices=list(METHODS[name]), default=list(METHODS[name]))
        add("--seeds", nargs="+", type=int, default=[0, 1, 2])
        add("--steps", type=int, default=steps)
        add("--batch-size", type=int, default=8)
        add("--block-size", type=int, default=128, help="tokens per sequence")
        add("--eval-tokens", type=int, default=16384, help="of held-out files, about")
        add("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once (default: one per core)")
        add("--out", default=f"out/{name}")
        add("--png", default=f"figures/table1_{name}.png")
        if name == "toys":
            add("--base-steps", type=int, default=700, help="steps in which the base model learns the family in Python")
            add("--samples", type=int, default=5, help="per problem, at temperature 0.1")
            add("--i-trust-the-code", **consent)
        add_common_flags(command, dtypes=["float32", "bfloat16"])
        command.set_defaults(run=function, attention="flash", seed=100)  # --seed: of the choice of rates alone
    args = parser.parse_args(argv)
    for flag in ("samples", "max_new_tokens", "slots", "workers", "steps", "base_steps", "batch_size", "block_size", "jobs"):
        if getattr(args, flag, None) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; use a whole number of at least 1")
    if args.command == "run" and (min(args.k or [1]) < 1 or not args.timeout > 0):
        parser.error("--k and --timeout must be above 0")
    if args.command == "run" and (args.temperature < 0 or not 0 < args.top_p <= 1):
        parser.error("--temperature must be at least 0, --top-p in (0, 1]")
    return args


def main():
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)

"""Run a program of one of twelve languages, with its tests, in extras/sandbox.py: run_program.

The nine of the paper's Tables 1 and 3 (D, Julia, Lua, Perl, R, Racket, Ruby, Rust, Swift), and
Bash, JavaScript and Python. A language is a row of LANGUAGES.

A program has passed if it reached its end, where a statement leaves a random token on a file
descriptor that is no other's (sandbox.SIGN), and if it then exited with 0. Whatever the program
prints, redirects or redefines does not matter; leaving early with exit(0) is not enough. Racket
exits with 0 though checks fail, so its statement asks rackunit how many did.

A program can still forge the sign if it sets out to: it can read the token in its own source, or
replace what the statement calls. The tests, too, run in the program's own process, so it can
replace the comparison that they call. A model that completes functions does not; one that is
rewarded for passing may learn to.
"""
import functools
import os
import re
import secrets
import shutil
import sys
from typing import NamedTuple

from extras.sandbox import SIGN, contained
from plumbing.files import BadInput


class Language(NamedTuple):
    command: tuple                   # what runs or compiles the file: a program on PATH, its flags
    file: str                        # the file's name
    sign: str                        # the statement at the end of the tests; leaves TOKEN on SIGN
    compiled: str | None = None      # what compiling makes, which is run then
    before: str | None = None        # a pattern, how tests end: the statement goes before that
    instead: tuple | None = None     # (a pattern, how tests may end; what replaces it)
    smallest: str = ""               # a program that passes
    library: tuple | None = None     # what tests may need: (its name, a statement that loads it)
    version: str = "--version"       # the flag that prints it
    address_space: bool = True       # False: the interpreter reserves more memory than it uses
    broken: tuple | None = None      # (a pattern of prompts that do not parse, why)


PERL_SIGN = "require POSIX; POSIX::write(SIGN, 'TOKEN', length('TOKEN'));"
LUA_SIGN = 'do local sign = io.open("/dev/fd/SIGN", "w"); sign:write("TOKEN"); sign:close() end'
RUBY_SIGN = """
if defined?(Test::Unit::AutoRunner)  # it would run its tests at exit, too late
  Test::Unit::AutoRunner.need_auto_run = false
  exit(1) unless Test::Unit::AutoRunner.run
end
IO.for_fd(SIGN, "w", autoclose: false).syswrite("TOKEN")"""
RACKET_SIGN = """
(require (prefix-in sign: racket/base) (prefix-in sign: (only-in rackunit/log test-log)))
(sign:let ([counts (sign:test-log)])   ; (failed . all)
  (sign:when (sign:and (sign:zero? (sign:car counts)) (sign:positive? (sign:cdr counts)))
    (sign:call-with-output-file "/dev/fd/SIGN" #:exists (sign:quote append)
      (sign:lambda (file) (sign:write-string "TOKEN" file)))))"""
D_SIGN = """
static import core.sys.posix.unistd;
core.sys.posix.unistd.write(SIGN, "TOKEN".ptr, "TOKEN".length);"""
SWIFT_SIGN = """
#if canImport(Glibc)
import Glibc
_ = Glibc.write(SIGN, "TOKEN", 32)
#else
import Darwin
_ = Darwin.write(SIGN, "TOKEN", 32)
#endif"""

LANGUAGES = {  # by MultiPL-E's names
    "py": Language(("python3",), "program.py", '__import__("posix").write(SIGN, b"TOKEN")'),
    "pl": Language(("perl",), "program.pl", PERL_SIGN,
                   library=("Test::Deep", "use Test::Deep;")),
    "lua": Language(("lua",), "program.lua", LUA_SIGN, version="-v",
                    library=("luaunit", 'require("luaunit")'),
                    instead=(r"os\.exit\(\s*lu\.LuaUnit\.run\(\)\s*\)",
                             "if lu.LuaUnit.run() ~= 0 then os.exit(1) end")),
    "rb": Language(("ruby",), "program.rb", RUBY_SIGN,
                   library=("test/unit", 'require "test/unit"')),
    "r": Language(("Rscript",), "program.R", 'base::cat("TOKEN", file = "/dev/fd/SIGN")'),
    "js": Language(("node", "--max-old-space-size=512"), "program.js",
                   ';require("fs").writeSync(SIGN, "TOKEN")', address_space=False),
    "sh": Language(("bash",), "program.sh", "builtin echo TOKEN >&SIGN"),
    "d": Language(("ldc2", "--unittest", "-of=program"), "program.d", D_SIGN, compiled="./program",
                  before=r"\}\s*void\s+main\(\)\s*\{\s*\}",
                  smallest="unittest {\n}\nvoid main(){}"),
    "rs": Language(("rustc", "-A", "warnings", "-C", "strip=symbols", "-o", "program"),
                   "program.rs", '::std::fs::write("/dev/fd/SIGN", "TOKEN").unwrap();',
                   compiled="./program", before=r"\}", smallest="fn main() {\n}"),
    "rkt": Language(("racket",), "program.rkt", RACKET_SIGN,
                    smallest="#lang racket\n(require rackunit)\n(check-equal? 1 1)"),
    "jl": Language(("julia", "--startup-file=no", "--history-file=no"), "program.jl",
                   'Base.write("/dev/fd/SIGN", "TOKEN")', address_space=False,
                   broken=(r'(?m)(?<![\\"])""""$', "a docstring that ends in four quotes")),
    "swift": Language(("swiftc", "-o", "program"), "program.swift", SWIFT_SIGN,
                      compiled="./program", address_space=False),
}
ALIASES = {"python": "py", "perl": "pl", "ruby": "rb", "R": "r", "javascript": "js", "bash": "sh",
           "rust": "rs", "racket": "rkt", "julia": "jl"}


class Outcome(NamedTuple):
    """What became of a program."""
    outcome: str              # "passed", "failed", "timeout", "limit"; "refused": it was not run
    code: int | str | None    # exit code, -signal, or which limit
    error: str                # the end of what it wrote to standard error


OUTCOMES = ("passed", "failed", "timeout", "limit", "refused")


class Tool(NamedTuple):
    """What runs a language's programs here."""
    path: str
    version: str       # the first line that it prints of itself
    passed_over: str   # programs before it on PATH that cannot run here, and why; or ""


# --------------------------------------------------------------------------------------- a program


def run_program(language, text, timeout=15.0, compile_timeout=60.0):
    """Run a program with its tests, contained as the top of extras/sandbox.py says -> Outcome.

    language: a key of LANGUAGES. timeout, compile_timeout: seconds of wall time. Raises BadInput
    for a missing interpreter, OSError where nothing can be started.
    """
    return attempt(language, interpreter_of(language).path, text, timeout, compile_timeout)


def attempt(language, path, text, timeout, compile_timeout):
    """Run a program by the interpreter or compiler at a path -> Outcome, or the same errors."""
    form, token = LANGUAGES[language], secrets.token_hex(16)
    run = [path, *form.command[1:], form.file]
    steps = [(run, timeout)]
    if form.compiled:
        steps = [(run, compile_timeout), ([form.compiled], timeout)]
    try:
        ended = contained(steps, form.file, with_sign(form, text, token), form.address_space)
    except UnicodeEncodeError as e:
        return Outcome("failed", None, "it cannot be written as UTF-8: it holds the lone surrogate "
                       f"U+{ord(e.object[e.start]):X}")
    reached_end = ended.code == 0 and token in ended.sign
    outcome = ended.over or ("passed" if reached_end else "failed")
    return Outcome(outcome, ended.code, ended.err[-300:])


def with_sign(form, text, token):
    """The program, with the statement that leaves the token once its tests have passed."""
    sign = form.sign.replace("TOKEN", token).replace("SIGN", str(SIGN))
    after = ""
    if form.before and (end := ending(form.before, text)):
        text, after = text[:end.start()], end[0]
    elif form.instead and (end := ending(form.instead[0], text)):
        text = text[:end.start()] + form.instead[1]
    return f"{text}\n{sign}\n{after}\n"


def ending(pattern, text):
    """The match of a pattern that reaches the text's end, white space aside, or None."""
    return re.search(rf"(?:{pattern})\s*\Z", text)


def check_tests(language, tests, where):
    """BadInput, beginning with `where`, for tests that have no place for the sign of success."""
    before = LANGUAGES[language].before
    if before and not ending(before, tests):
        raise BadInput(f"{where}: its tests do not end as MultiPL-E's of {language} do "
                       f"(the pattern {before})")


def why_broken(language, prompt):
    """Why a prompt cannot be part of any program that passes, or None."""
    pattern, why = LANGUAGES[language].broken or ("(?!)", None)
    return why if re.search(pattern, prompt) else None


# ---------------------------------------------------------------------------------- what runs it


@functools.cache
def interpreter_of(language, library=False):
    """The first program on PATH that can run programs of `language` contained -> Tool.

    library: and load the library that tests may need. BadInput names what is missing.
    """
    form, found = LANGUAGES[language], interpreters(language)
    name, refused = form.command[0], []
    if not found:
        raise BadInput(f"problems in {language} need the program {name}, which is not on PATH; "
                       "install it")
    for path in found:
        why = refusal(language, path, library)
        if not why:
            return Tool(path, version_of(language, path), " and ".join(refused))
        refused.append(f"{path} cannot run it here ({why})")
    what = f"{name}'s {form.library[0]}" if library else f"the program {name}"
    raise BadInput(f"problems in {language} need {what}, and {' and '.join(refused)}; install it")


def interpreters(language):
    """Paths of the programs on PATH that may run `language`; first, for Python, this process's."""
    name = LANGUAGES[language].command[0]
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = [shutil.which(name, path=folder) for folder in folders]
    if language == "py":
        found.insert(0, sys.executable)
    return list(dict.fromkeys(path for path in found if path))


def refusal(language, path, library):
    """Why an interpreter or compiler cannot run a program here, or None."""
    form = LANGUAGES[language]
    text = form.library[1] if library else form.smallest
    try:
        outcome = attempt(language, path, text, 60, 60)
    except OSError as e:
        if "PermissionError" in str(e):
            return "the user that programs run as may not read it"
        return str(e)
    if outcome.outcome == "passed":
        return None
    lines = outcome.error.strip().splitlines()
    return lines[0] if lines else f"{outcome.outcome}, {outcome.code}"


def version_of(language, path):
    """The first line in which an interpreter or compiler names its version."""
    form = LANGUAGES[language]
    ended = contained([([path, form.version], 60)], "empty", "", form.address_space)
    lines = [line.strip() for line in (ended.out + ended.err).splitlines() if line.strip()]
    return lines[0] if lines else "of unknown version"


@functools.cache
def announce(language):
    """Say on standard error, once, which program runs a language."""
    tool = interpreter_of(language)
    passed_over = f"; {tool.passed_over}" if tool.passed_over else ""
    print(f"{language}: {tool.path}, {tool.version}{passed_over}", file=sys.stderr)

"""Run a program of one of seven languages, with its tests, in extras/sandbox.py: run_program.

A program has passed if it reached its end, where a statement prints a random token as the last
line, and then exited with 0: leaving early with exit(0) is not enough. A language is a row of
LANGUAGES.
"""
import functools
import os
import secrets
import shutil
import sys
from typing import NamedTuple

from extras.sandbox import contained
from flora import BadInput


class Language(NamedTuple):
    command: tuple                   # what runs the file: a program on PATH, its flags
    file: str                        # the file's name
    done: str                        # the statement at its end; prints TOKEN
    library: tuple | None = None     # what tests may need: (its name, a statement that loads it)
    tests_exit: tuple | None = None  # how tests leave before `done`: (that, what replaces it)
    address_space: bool = True       # False: the interpreter reserves more memory than it uses


RUBY_DONE = """
if defined?(Test::Unit::AutoRunner)  # it would run its tests at exit, too late
  Test::Unit::AutoRunner.need_auto_run = false
  exit(1) unless Test::Unit::AutoRunner.run
end
puts "", "TOKEN\""""
LUA_EXIT = ("os.exit(lu.LuaUnit.run())", "if lu.LuaUnit.run() ~= 0 then os.exit(1) end")

LANGUAGES = {  # by MultiPL-E's names
    "py": Language(("python3",), "program.py", 'print("\\nTOKEN")'),
    "pl": Language(("perl",), "program.pl", 'print "\\nTOKEN\\n";',
                   library=("Test::Deep", "use Test::Deep;")),
    "lua": Language(("lua",), "program.lua", 'print("\\nTOKEN")',
                    library=("luaunit", 'require("luaunit")'), tests_exit=LUA_EXIT),
    "rb": Language(("ruby",), "program.rb", RUBY_DONE,
                   library=("test/unit", 'require "test/unit"')),
    "r": Language(("Rscript",), "program.R", 'cat("\\nTOKEN\\n")'),
    "js": Language(("node", "--max-old-space-size=512"), "program.js", 'console.log("\\nTOKEN")',
                   address_space=False),
    "sh": Language(("bash",), "program.sh", "echo; echo TOKEN"),
}
ALIASES = {"python": "py", "perl": "pl", "ruby": "rb", "R": "r", "javascript": "js", "bash": "sh"}


class Outcome(NamedTuple):
    """What became of a program."""
    outcome: str              # "passed", "failed", "timeout", "limit"; "refused": it was not run
    code: int | str | None    # exit code, -signal, or which limit
    error: str                # the end of what it wrote to standard error


OUTCOMES = ("passed", "failed", "timeout", "limit", "refused")


def run_program(language, text, timeout=15.0):
    """Run a program with its tests, contained as the top of extras/sandbox.py says -> Outcome.

    language: a key of LANGUAGES. timeout: seconds of wall time. Raises BadInput for a missing
    interpreter.
    """
    return attempt(language, interpreter_of(language), text, timeout)


def attempt(language, interpreter, text, timeout):
    """Run a program by the interpreter at a path -> Outcome. OSError where it cannot be started."""
    form, token = LANGUAGES[language], secrets.token_hex(16)
    ended = contained((interpreter, *form.command[1:]), form.file, with_token(form, text, token),
                      timeout, form.address_space)
    outcome = ended.over or ("passed" if reached_end(ended, token) else "failed")
    return Outcome(outcome, ended.code, ended.err[-300:])


def with_token(form, text, token):
    """The program, followed by the statement that prints the token once its tests have passed."""
    if form.tests_exit:
        text = text.replace(*form.tests_exit)
    return f"{text}\n{form.done.replace('TOKEN', token)}\n"


def reached_end(ended, token):
    return ended.code == 0 and ended.out.splitlines()[-1:] == [token]


@functools.cache
def interpreter_of(language, library=False):
    """Path of the first interpreter on PATH that can run a program of `language` contained.

    library: and load the library that its tests may need. BadInput names what is missing.
    """
    form, found = LANGUAGES[language], interpreters(language)
    name = form.command[0]
    if not found:
        raise BadInput(f"problems in {language} need the program {name}, which is not on PATH; "
                       "install it")
    for path in found:
        why = refusal(language, path, form.library[1] if library else "")
        if not why:
            return path
    what = f"{name}'s {form.library[0]}" if library else f"the program {name}"
    raise BadInput(f"problems in {language} need {what}, and {' and '.join(found)} cannot run it "
                   f"here ({why}); install it")


def interpreters(language):
    """Paths of the programs on PATH that may run `language`; first, for Python, this process's."""
    name = LANGUAGES[language].command[0]
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    found = [shutil.which(name, path=folder) for folder in folders]
    if language == "py":
        found.insert(0, sys.executable)
    return list(dict.fromkeys(path for path in found if path))


def refusal(language, interpreter, text):
    """Why an interpreter cannot run a program here, or None."""
    try:
        outcome = attempt(language, interpreter, text, 30)
    except OSError as e:
        return str(e)
    if outcome.outcome == "passed":
        return None
    lines = outcome.error.strip().splitlines()
    return lines[0] if lines else f"{outcome.outcome}, {outcome.code}"

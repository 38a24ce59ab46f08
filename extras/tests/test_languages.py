"""extras/languages.py: programs in twelve languages pass, fail, and leave before their tests.

A language that this machine lacks is skipped by name.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from extras import languages, sandbox
from extras.languages import LANGUAGES, Language, interpreter_of, run_program
from extras.passk import Problem, check_languages
from plumbing.files import BadInput


def needs(language):
    """Skip, saying what is missing, where a language cannot be run."""
    try:
        interpreter_of(language)
    except BadInput as e:
        pytest.skip(str(e))


# language: a prompt, completions: one that passes, one that fails, one that leaves, one that
# raises, one that loops, and tests as MultiPL-E writes them
MULTIPL_E = {
    "py": ("def add(a, b):", "\n    return a + b", "\n    return a", "\n    exit(0)",
           "\n    raise ValueError", "\n    while True: pass", """
def check(candidate):
    assert candidate(1, 2) == 3
def test_check():
    check(add)
test_check()"""),
    "sh": ("add() {", "\n    echo $(($1 + $2))\n}", "\n    echo $1\n}",
           "\n    echo 3\n}\nexit 0", "\n    return 1\n}", "\n    while true; do :; done\n}", """
candidate() {
    add "$@"
}
set -e
run_test() {
    [[ $(candidate "1" "2") = "3" ]]
}
run_test"""),
    "pl": ("sub add {", "\n    return $_[0] + $_[1];\n}", "\n    return 1;\n}",
           "\n    exit 0;\n}", "\n    die 'no';\n}", "\n    while (1) {}\n}", """
sub testhumaneval {
    my $candidate = \\&add;
    if ($candidate->(1, 2) == 3) { print "ok!" } else { print "not okay!"; exit 1; }
}
testhumaneval();"""),
    "js": ("function add(a, b){", "\n  return a + b\n}", "\n  return a\n}",
           "\n  process.exit(0)\n}", "\n  throw new Error('no')\n}", "\n  while (true) {}\n}", """
const assert = require('node:assert');
function test() {
  let candidate = add;
  assert.deepEqual(candidate(1, 2), 3);
}
test();"""),
    "lua": ("local function add(a, b)", "\n  return a + b\nend", "\n  return a\nend",
            "\n  os.exit(0)\nend", "\n  error('no')\nend", "\n  while true do end\nend", """
lu = require('luaunit')
function test_humaneval()
    local candidate = add
    lu.assertEquals(candidate(1, 2), 3)
end
os.exit(lu.LuaUnit.run())"""),
    "rb": ("def add(a, b)", "\n  a + b\nend", "\n  a\nend", "\n  exit(0)\nend",
           "\n  raise 'no'\nend", "\n  loop {}\nend", """
require 'test/unit'
class TestHumanEval < Test::Unit::TestCase
  def test_add
    candidate = method(:add)
    assert_equal(3, candidate.call(1, 2))
  end
end"""),
    "r": ("add <- function(a, b) {", "\n  a + b\n}", "\n  a\n}", "\n  quit('no', 0)\n}",
          "\n  stop('no')\n}", "\n  while (TRUE) {}\n}", """
test_humaneval <- function() {
    candidate <- add
    if(!identical(candidate(1, 2), 3)){quit('no', 1)}
}
test_humaneval()"""),
    "d": ("import std.math;\nlong add(long a, long b)", "\n{\n    return a + b;\n}",
          "\n{\n    return a;\n}",
          "\n{\n    import core.stdc.stdlib;\n    exit(0);\n    return 3;\n}",
          '\n{\n    throw new Exception("no");\n}', "\n{\n    while (true) {}\n}", """
unittest
{
    alias candidate = add;
    assert(candidate(1L, 2L) == 3L);
}
void main(){}"""),
    "rs": ("fn add(a: isize, b: isize) -> isize {", "\n    a + b", "\n    a",
           "\n    std::process::exit(0)", '\n    panic!("no")', "\n    loop {}", """
}
fn main() {
    let candidate = add;
    assert_eq!(candidate(1, 2), 3);
}
"""),
    "rkt": ("#lang racket\n(define (add a b)", "\n  (+ a b))", "\n  a)", "\n  (exit 0))",
            '\n  (error "no"))', "\n  (let loop () (loop)))", """
(require rackunit)
(define (test-humaneval)
  (let ((candidate add))
    (check-within (candidate 1 2) 3 0.001)))
(test-humaneval)"""),
    "jl": ("function add(a::Int64, b::Int64)::Int64 ", "\n    a + b\nend", "\n    a\nend",
           "\n    exit(0)\nend", '\n    error("no")\nend', "\n    while true end\nend", """
using Test
@testset begin
candidate = add;
    @test(candidate(1, 2) == 3)
end
"""),
    "swift": ("func add(a: Int, b: Int) -> Int {", "\n    return a + b\n}", "\n    return a\n}",
              "\n    exit(0)\n}", "\n    fatalError()\n}", "\n    while true {}\n}", """
assert(add(a: 1, b: 2) == 3)"""),
}


def completed(language, completion):
    prompt, *_, tests = MULTIPL_E[language]
    return f"{prompt}{completion}\n{tests}"


def outcomes_of(language, completions):
    """A list of (completion, its Outcome)."""
    def run(completion):
        return completion, run_program(language, completed(language, completion), 60)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, completions))


@pytest.mark.parametrize("language", MULTIPL_E)
def test_multipl_e_programs_pass_fail_and_leave_early_in_every_language(language):
    needs(language)
    prompt, right, wrong, leaving, raising, looping, tests = MULTIPL_E[language]
    try:
        check_languages([Problem("f", "n", language, prompt, tests, [])])
    except BadInput as e:
        pytest.skip(str(e))
    outcomes = outcomes_of(language, (right, wrong, leaving, raising, " (", right + "\n{[(\"'"))
    assert [o.outcome for _, o in outcomes] == ["passed"] + 5 * ["failed"], outcomes
    assert run_program(language, completed(language, looping), 2).outcome == "timeout"


# language: what follows a right completion and does not make it wrong, as it prints later,
# elsewhere, or nowhere
STILL_RIGHT = {
    "py": ["import atexit; atexit.register(print, 'bye')", "print = lambda *_: None",
           "import sys; sys.stdout = sys.stderr", "import os; os.dup2(2, 1)", "print('\\x0c\\0')",
           "import sys; sys.stdout.close()", "class Late:\n    def __del__(self): print('bye')\n"
           "late = Late()", "import os; os.chdir('/')", "print('debug ' * 200000)", "#\r\n\x0c",
           "# gr\u00f6\u00dfe \U0001f600"],
    "sh": ["exec 1>&2", "echo() { printf '%s\n' $*; }", "trap 'echo bye' EXIT",
           "exec >/dev/null", "cd /", "set -u"],
    "pl": ["END { print 'bye' }", "select(STDERR);", "$\\ = '!'; $, = '-';", "close(STDOUT);",
           "use strict; use warnings;", "package Other; package main;", "use utf8;",
           "use open ':std', ':encoding(UTF-16)';", "print '\0', 'x' x 1000000;"],
    "js": ["Promise.resolve(3).then(console.log)", "setTimeout(() => console.log('late'), 50)",
           "process.on('exit', () => console.log('bye'))", "console.log = () => {}",
           "const fs = require('fs')", "process.stdout.write = () => true", "module.exports = add",
           "new FinalizationRegistry(console.log)", "const x = 1"],
    "lua": ["function print() end", "io.output(io.stderr)", "io.write = nil", "local lu = 5",
            "setmetatable({}, {__gc = function() print('bye') end})", "local sign, assert = 1, 2",
            "print(('x'):rep(1000000))"],
    "rb": ["at_exit { puts 'bye' }", "$stdout = $stderr", "def puts(*) end", "def print(*) end",
           "ObjectSpace.define_finalizer('x'.dup, proc { puts 'bye' })", "$stdout.reopen($stderr)",
           "$, = nil; puts 'x' * 1000000"],
    "r": ["sink(stderr())", "cat <- function(...) NULL", "print <- cat", "options(warn = 2)",
          "reg.finalizer(environment(), function(e) print('bye'), onexit = TRUE)", "file <- 3",
          ".Last <- function() print('bye')"],
    "d": ["import std.stdio; static ~this() { writeln(\"bye\"); }", "void write(int a) {}",
          "long other(long x) { return x; }\n// done", "unittest { assert(add(1, 1) == 2); }"],
    "rs": ["}\nfn other() { println!(\"x\");", "}\n#[allow(unused)] fn write() {"],
    "rkt": ["(module+ main (displayln (add 1 1)))", "(eprintf \"hm\")", "(provide add)",
            "(current-output-port (open-output-nowhere))", "(define (write-string . x) 1)",
            "(define (test-log . x) 1)", "(module+ test (error \"not run\"))",
            "(plumber-add-flush! (current-plumber) (lambda (h) (displayln 1)))"],
    "jl": ["atexit(() -> println(1))", "redirect_stdout(stderr)", "println(x...) = nothing",
           "write(x) = 1"],
}

SLOW = ("d", "rkt", "jl")   # these are tried in one program


@pytest.mark.parametrize("language", STILL_RIGHT)
def test_what_a_program_prints_redirects_or_redefines_does_not_fail_it(language):
    needs(language)
    right, more = MULTIPL_E[language][1], STILL_RIGHT[language]
    if language in SLOW:
        more = ["\n".join(more)]
    completions = [f"{right}\n{each}" for each in more]
    for completion, outcome in outcomes_of(language, completions):
        assert outcome.outcome == "passed", (completion, outcome)


# language: a wrong completion, and what leaves with 0 or hides the tests
LEAVES = {
    "py": ["import os; os._exit(0)", "raise SystemExit", "import sys; sys.exit()"],
    "sh": ["exit", "exec true", "cat <<END", "kill $$"],
    "pl": ["exit(0);", "__END__", "=pod\n", "exec 'true';", "use POSIX; _exit(0);"],
    "js": ["process.exit()", "process.reallyExit(0)", "require('assert').deepEqual = 1",
           "export default add"],
    "lua": ["os.exit(0)", "lu = require('luaunit')\nos.exit(lu.LuaUnit.run())", "do return end"],
    "rb": ["exit(0)", "__END__", "exit!(true)", "=begin", "at_exit { exit!(0) }"],
    "r": ["quit('no')", "q(status = 0)"],
    "d": ["void main() {}", "unittest { import core.stdc.stdlib; exit(0); }", "__EOF__",
          "void main() {}\n__EOF__", "shared static this() { import core.stdc.stdlib; exit(0); }"],
    "rs": ["}\nfn main() {"],
    "rkt": ["(exit)", "(module+ main (exit 0))",
            "(error-escape-handler (lambda () (exit 0)))\n(car 1)"],
    "jl": ["exit()", "ccall(:_exit, Cvoid, (Cint,), 0)"],
}


@pytest.mark.parametrize("language", LEAVES)
def test_leaving_with_success_or_hiding_the_tests_is_failing(language):
    needs(language)
    wrong = MULTIPL_E[language][2]
    completions = [f"{wrong}\n{more}" for more in LEAVES[language]]
    for completion, outcome in outcomes_of(language, completions):
        assert outcome.outcome == "failed", (completion, outcome)


def test_rackets_checks_count_though_its_exit_code_does_not():
    needs("rkt")
    prompt, right, *_, tests = MULTIPL_E["rkt"]
    none = "(require rackunit)"
    outcomes = [run_program("rkt", f"{prompt}{right}\n{checks}", 60)
                for checks in (tests, tests + "\n(check-equal? 1 2)", none)]
    assert [o.outcome for o in outcomes] == ["passed", "failed", "failed"]
    assert [o.code for o in outcomes] == [0, 0, 0]


def test_compiling_has_a_time_limit_of_its_own(monkeypatch):
    """By a stand-in for a compiler, which writes a shell script."""
    needs("sh")
    form = LANGUAGES["swift"]._replace(sign="builtin echo TOKEN >&SIGN")
    monkeypatch.setitem(LANGUAGES, "swift", form)
    compiler = "cp program.swift program; chmod +x program"

    def outcome(text, compiler, *seconds):
        monkeypatch.setitem(LANGUAGES, "swift", form._replace(command=("bash", "-c", compiler)))
        return languages.attempt("swift", "/bin/bash", f"#!/bin/bash\n{text}", *seconds)

    assert outcome("", compiler, 60, 60).outcome == "passed"
    assert outcome("", f"sleep 1.5; {compiler}", 1, 60).outcome == "passed"
    assert outcome("", f"sleep 30; {compiler}", 60, 1).outcome == "timeout"
    assert outcome("sleep 30", compiler, 1, 60).outcome == "timeout"
    assert outcome("exit 3", compiler, 60, 60).code == 3
    assert outcome("", f"{compiler}; echo no >&2; exit 4", 60, 60) == ("failed", 4, "no\n")


def test_the_sign_goes_where_swift_and_julia_run_it():
    for language in ("swift", "jl"):
        text = languages.with_sign(LANGUAGES[language], completed(language, ""), "0" * 32)
        assert text.index(MULTIPL_E[language][-1]) < text.index("0" * 32)
    assert languages.why_broken("jl", '"""f("a")\n"b""""\nfunction f()')
    assert not languages.why_broken("jl", '"""f("a")\n"b\\""""\nfunction f()\n""""""')


def test_a_lone_surrogate_fails_its_program_alone():
    needs("sh")
    assert run_program("sh", "echo '\ud83d'") == (
        "failed", None, "it cannot be written as UTF-8: it holds the lone surrogate U+D83D")


def test_a_missing_interpreter_or_library_is_named(monkeypatch):
    needs("sh")
    monkeypatch.setitem(LANGUAGES, "r", Language(("no-such-Rscript",), "p", ""))
    monkeypatch.setitem(LANGUAGES, "sh", LANGUAGES["sh"]._replace(
        library=("shunit", "source /nowhere/shunit || exit 1")))
    interpreter_of.cache_clear()
    with pytest.raises(BadInput, match="problems in r need the program no-such-Rscript, which is "
                       "not on PATH; install it"):
        languages.run_program("r", "")
    plain_sh = Problem("f", "n", "sh", "", "true", [])
    check_languages([plain_sh])
    with pytest.raises(BadInput, match="problems in sh need bash's shunit, and .*bash cannot run "
                       "it here .*shunit: No such"):
        check_languages([plain_sh, plain_sh._replace(tests=". shunit")])
    interpreter_of.cache_clear()


def test_what_runs_a_language_is_said_once_and_what_cannot_be_read_is_passed_over(
        tmp_path, monkeypatch, capsys):
    needs("sh")
    if os.getuid():
        pytest.skip("only as root are programs run as another user")
    tmp_path.chmod(0o700)
    (tmp_path / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    interpreter_of.cache_clear()
    languages.announce.cache_clear()
    check_languages([Problem("f", "n", "sh", "", "true", [])] * 2)
    check_languages([Problem("f", "n", "sh", "", "true", [])])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("sh: /") and "GNU bash, version" in said[0]
    assert f"{tmp_path}/bash cannot run it here (the user that programs run as may not" in said[0]
    interpreter_of.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match=f"the program bash, and {tmp_path}/bash cannot run it here "
                       ".the user that programs run as may not read it.; install it"):
        interpreter_of("sh")
    interpreter_of.cache_clear()
    assert sandbox.SIGN < sandbox.LIMITS["files"]

"""extras/languages.py: programs in seven languages pass, fail, and leave before their tests."""
import pytest

from extras import languages
from extras.languages import LANGUAGES, Language, interpreter_of, run_program
from extras.passk import Problem, check_languages
from flora import BadInput


def needs(language):
    """Skip, saying what is missing, where a language cannot be run."""
    try:
        interpreter_of(language)
    except BadInput as e:
        pytest.skip(str(e))


# language: a prompt, a completion that passes, one that fails, one that leaves, and tests as
# MultiPL-E writes them
MULTIPL_E = {
    "py": ("def add(a, b):", "\n    return a + b", "\n    return a", "\n    exit(0)", """
def check(candidate):
    assert candidate(1, 2) == 3
def test_check():
    check(add)
test_check()"""),
    "sh": ("add() {", "\n    echo $(($1 + $2))\n}", "\n    echo $1\n}",
           "\n    echo 3\n}\nexit 0", """
candidate() {
    add "$@"
}
set -e
run_test() {
    [[ $(candidate "1" "2") = "3" ]]
}
run_test"""),
    "pl": ("sub add {", "\n    return $_[0] + $_[1];\n}", "\n    return 1;\n}",
           "\n    exit 0;\n}", """
sub testhumaneval {
    my $candidate = \\&add;
    if ($candidate->(1, 2) == 3) { print "ok!" } else { print "not okay!"; exit 1; }
}
testhumaneval();"""),
    "js": ("function add(a, b){", "\n  return a + b\n}", "\n  return a\n}",
           "\n  process.exit(0)\n}", """
const assert = require('node:assert');
function test() {
  let candidate = add;
  assert.deepEqual(candidate(1, 2), 3);
}
test();"""),
    "lua": ("local function add(a, b)", "\n  return a + b\nend", "\n  return a\nend",
            "\n  os.exit(0)\nend", """
lu = require('luaunit')
function test_humaneval()
    local candidate = add
    lu.assertEquals(candidate(1, 2), 3)
end
os.exit(lu.LuaUnit.run())"""),
    "rb": ("def add(a, b)", "\n  a + b\nend", "\n  a\nend", "\n  exit(0)\nend", """
require 'test/unit'
class TestHumanEval < Test::Unit::TestCase
  def test_add
    candidate = method(:add)
    assert_equal(3, candidate.call(1, 2))
  end
end"""),
    "r": ("add <- function(a, b) {", "\n  a + b\n}", "\n  a\n}", "\n  quit('no', 0)\n}", """
test_humaneval <- function() {
    candidate <- add
    if(!identical(candidate(1, 2), 3)){quit('no', 1)}
}
test_humaneval()"""),
}


@pytest.mark.parametrize("language", MULTIPL_E)
def test_multipl_e_programs_pass_fail_and_leave_early_in_every_language(language):
    needs(language)
    prompt, right, wrong, leaving, tests = MULTIPL_E[language]
    try:
        check_languages([Problem("f", "n", language, prompt, tests, [])])
    except BadInput as e:
        pytest.skip(str(e))
    outcomes = [run_program(language, f"{prompt}{completion}\n{tests}", 60)
                for completion in (right, wrong, leaving, " (")]
    assert [o.outcome for o in outcomes] == ["passed", "failed", "failed", "failed"], outcomes


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

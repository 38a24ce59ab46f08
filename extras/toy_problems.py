"""Make small programming problems in MultiPL-E's format, easy enough for the embedded model.

  python -m extras.toy_problems FOLDER
  python -m extras.toy_problems FOLDER --more 60000     as many solved problems more, of each language

A problem is a chain of two or three steps on a number, a string or a list ("Add 3, then square."),
the function's body one line a step. Every language gets the same tasks. Split by task: the kinds of
steps of a held-out problem, in their order, occur in no training problem; each step alone, in
every wording, does.

Writes FOLDER/LANGUAGE.jsonl, the held-out problems (name, language, prompt, tests, stop_tokens, and
canonical_solution), and FOLDER/LANGUAGE/NAME.txt, the solved problems to train on. --more writes
FOLDER/more/LANGUAGE/NUMBER.txt instead, of PER_FILE problems each.
"""
import argparse
import json
import os
import random

from plumbing.files import BadInput
from plumbing.flags import Help, check_numbers, run_main

TRAIN, TEST = 1500, 48   # tasks, a third of each type
PER_FILE = 20            # solved problems of --more

# type: {step: (wordings, what it does in Python)}; {c} is a number from 2 to 9, {t} a letter
STEPS = {
    "number": {
        "add": (["add {c}", "increase by {c}"], lambda x, c, t: x + c),
        "sub": (["subtract {c}", "decrease by {c}"], lambda x, c, t: x - c),
        "mul": (["multiply by {c}", "scale by {c}"], lambda x, c, t: x * c),
        "neg": (["negate", "flip the sign"], lambda x, c, t: -x),
        "square": (["square", "multiply by itself"], lambda x, c, t: x * x),
        "mod": (["take the remainder by {c}", "reduce modulo {c}"], lambda x, c, t: x % c),
    },
    "string": {
        "upper": (["convert to upper case", "capitalize all letters"], lambda x, c, t: x.upper()),
        "lower": (["convert to lower case", "make all letters small"], lambda x, c, t: x.lower()),
        "append": (["append {t}", "add {t} at the end"], lambda x, c, t: x + t),
        "prepend": (["prepend {t}", "add {t} at the start"], lambda x, c, t: t + x),
        "double": (["repeat twice", "write two times"], lambda x, c, t: x + x),
        "reverse": (["reverse", "turn around"], lambda x, c, t: x[::-1]),
        "tail": (["drop the first character", "remove the first letter"], lambda x, c, t: x[1:]),
    },
    "list": {
        "sort": (["sort", "put in order"], lambda x, c, t: sorted(x)),
        "reverse": (["reverse", "turn around"], lambda x, c, t: x[::-1]),
        "append": (["append {c}", "add {c} at the end"], lambda x, c, t: x + [c]),
        "prepend": (["prepend {c}", "add {c} at the start"], lambda x, c, t: [c] + x),
        "tail": (["drop the first element", "remove the first item"], lambda x, c, t: x[1:]),
        "double": (["repeat twice", "write two times"], lambda x, c, t: x + x),
    },
}
INPUTS = {
    "number": [3, -7, 12],
    "string": ["Hello", "aBc", "Data Set"],
    "list": [[3, 1, 2], [5], [4, 9, 4, 0]],
}


def shell_value(value):
    """A list is a text of numbers in the shell."""
    return "'" + (" ".join(map(str, value)) if isinstance(value, list) else str(value)) + "'"


# How a language writes a problem: str.format templates for the head, a line for each step of each
# type (x is the argument), the end, what closes a solved problem, and the tests.
LANGUAGES = {
    "py": dict(
        head='def f(x):\n    """{text}"""\n', end="    return x", close="\n",
        stop=["\n\n", "\ndef", "\nclass", "\n#"],
        number=dict(add="x = x + {c}", sub="x = x - {c}", mul="x = x * {c}", neg="x = -x",
                    square="x = x * x", mod="x = x % {c}"),
        string=dict(upper="x = x.upper()", lower="x = x.lower()", append="x = x + '{t}'",
                    prepend="x = '{t}' + x", double="x = x + x", reverse="x = x[::-1]",
                    tail="x = x[1:]"),
        list=dict(sort="x = sorted(x)", reverse="x = x[::-1]", append="x = x + [{c}]",
                  prepend="x = [{c}] + x", tail="x = x[1:]", double="x = x + x"),
        value=repr, test="assert f({x}) == {y}\n", tests="{cases}"),
    "pl": dict(
        head="# {text}\nsub f {{\n    my ($x) = @_;\n", end="    return $x;", close="\n}\n",
        stop=["\n}"],
        number=dict(add="$x = $x + {c};", sub="$x = $x - {c};", mul="$x = $x * {c};",
                    neg="$x = -$x;", square="$x = $x * $x;", mod="$x = $x % {c};"),
        string=dict(upper="$x = uc($x);", lower="$x = lc($x);", append="$x = $x . '{t}';",
                    prepend="$x = '{t}' . $x;", double="$x = $x . $x;",
                    reverse="$x = reverse($x);", tail="$x = substr($x, 1);"),
        list=dict(sort="$x = [sort @$x];", reverse="$x = [reverse @$x];",
                  append="$x = [@$x, {c}];", prepend="$x = [{c}, @$x];", tail="shift @$x;",
                  double="$x = [@$x, @$x];"),
        value=json.dumps, test="check({x}, {y});\n",
        tests="}}\n"
              "sub show {{ ref $_[0] ? join(',', @{{$_[0]}}) : $_[0] }}\n"
              "sub check {{ my ($x, $y) = @_; die unless show(f($x)) eq show($y) }}\n"
              "{cases}"),
    "js": dict(
        head="// {text}\nfunction f(x) {{\n", end="    return x;", close="\n}\n", stop=["\n}"],
        number=dict(add="x = x + {c};", sub="x = x - {c};", mul="x = x * {c};", neg="x = -x;",
                    square="x = x * x;", mod="x = ((x % {c}) + {c}) % {c};"),
        string=dict(upper="x = x.toUpperCase();", lower="x = x.toLowerCase();",
                    append="x = x + '{t}';", prepend="x = '{t}' + x;", double="x = x + x;",
                    reverse="x = [...x].reverse().join('');", tail="x = x.slice(1);"),
        list=dict(sort="x = x.sort();", reverse="x = x.reverse();", append="x = x.concat([{c}]);",
                  prepend="x = [{c}].concat(x);", tail="x = x.slice(1);",
                  double="x = x.concat(x);"),
        value=json.dumps, test="check({x}, {y});\n",
        tests="}}\n"
              "function check(x, y) {{ require('assert').deepEqual(f(x), y); }}\n"
              "{cases}"),
    "sh": dict(
        head='# {text}\nf() {{\n    local x="$1"\n', end='    echo "$x"', close="\n}\n",
        stop=["\n}"],
        number=dict(add="x=$((x + {c}))", sub="x=$((x - {c}))", mul="x=$((x * {c}))",
                    neg="x=$((-x))", square="x=$((x * x))", mod="x=$(((x % {c} + {c}) % {c}))"),
        string=dict(upper="x=${{x^^}}", lower="x=${{x,,}}", append='x="${{x}}{t}"',
                    prepend='x="{t}${{x}}"', double='x="${{x}}${{x}}"',
                    reverse='x=$(echo "$x" | rev)', tail='x="${{x:1}}"'),
        list=dict(sort='x=$(echo $(printf "%s\\n" $x | sort))',
                  reverse='x=$(echo $(printf "%s\\n" $x | tac))', append='x="$x {c}"',
                  prepend='x="{c} $x"', tail="x=$(echo $x | cut -s -d' ' -f2-)",
                  double='x="$x $x"'),
        value=shell_value, test="check {x} {y}\n",
        tests="}}\n"
              'check() {{ [ "$(echo $(f "$1"))" = "$(echo $2)" ] || exit 1; }}\n'
              "{cases}"),
}


def make_task(rng, kind, chain):
    """[(step, c, t, wording)] for a chain of step names."""
    return [(step, rng.randint(2, 9), rng.choice("abcdxyz"), rng.choice(STEPS[kind][step][0]))
            for step in chain]


def make_tasks():
    """(held-out tasks, tasks to train on), lists of (type, task)."""
    rng, held_out, train = random.Random(0), [], []
    for kind, steps in STEPS.items():
        pairs = [(a, b) for a in steps for b in steps if a != b]
        chains = pairs + [(*pair, step) for pair in pairs for step in steps if step != pair[1]]
        rng.shuffle(chains)
        others = chains[TEST // 3:]
        drawn = [rng.choice(others) for _ in range(TRAIN // 3)]
        held_out += [(kind, make_task(rng, kind, chain)) for chain in chains[:TEST // 3]]
        train += [(kind, make_task(rng, kind, chain)) for chain in drawn]
    return held_out, train


def more_tasks(n, seed=1):
    """n further tasks to train on, as (type, task); none has the steps of a held-out one."""
    held_out = {(kind, steps_of(task)) for kind, task in make_tasks()[0]}
    rng, tasks = random.Random(seed), []
    while len(tasks) < n:
        kind, chain = rng.choice(list(STEPS)), []
        for _ in range(rng.choice([2, 3, 3])):
            chain.append(rng.choice([step for step in STEPS[kind] if step not in chain[-1:]]))
        if (kind, tuple(chain)) not in held_out:
            tasks.append((kind, make_task(rng, kind, chain)))
    return tasks


def steps_of(task):
    return tuple(step for step, *_ in task)


def apply(kind, task, x):
    """What the task makes of x."""
    for step, c, t, _ in task:
        x = STEPS[kind][step][1](x, c, t)
    return x


def render(language, kind, task, name):
    """One task as a problem of one language."""
    form = LANGUAGES[language]
    text = ", then ".join(wording.format(c=c, t=t) for _, c, t, wording in task)
    text = f"{text[0].upper()}{text[1:]}."
    lines = ["    " + form[kind][step].format(c=c, t=t) for step, c, t, _ in task]
    cases = [form["test"].format(x=form["value"](x), y=form["value"](apply(kind, task, x)))
             for x in INPUTS[kind]]
    return dict(
        name=name, language=language, prompt=form["head"].format(text=text),
        canonical_solution="\n".join([*lines, form["end"]]),
        tests=form["tests"].format(cases="".join(cases)), stop_tokens=form["stop"])


def solved(language, kind, task, name=""):
    """A task and its solution, as a text to train on."""
    problem = render(language, kind, task, name)
    return problem["prompt"] + problem["canonical_solution"] + LANGUAGES[language]["close"]


def write(folder):
    """The held-out problems, and those to train on."""
    held_out, train = make_tasks()
    for language in LANGUAGES:
        write_texts(f"{folder}/{language}", [solved(language, *task) for task in train])
        with open(os.path.join(folder, f"{language}.jsonl"), "w") as f:
            for i, (kind, task) in enumerate(held_out):
                name = f"{i:02}_{kind}_{'_'.join(steps_of(task))}"
                f.write(json.dumps(render(language, kind, task, name)) + "\n")


def write_more(folder, n):
    """n more solved problems of each language."""
    tasks = more_tasks(n)
    for language in LANGUAGES:
        texts = [solved(language, *task) for task in tasks]
        write_texts(f"{folder}/more/{language}", ["\n".join(texts[i:i + PER_FILE])
                                                 for i in range(0, n, PER_FILE)])


def write_texts(folder, texts):
    os.makedirs(folder, exist_ok=True)
    for i, text in enumerate(texts):
        with open(os.path.join(folder, f"{i:04}.txt"), "w") as f:
            f.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    parser.add_argument("folder", metavar="FOLDER", help="where the problems and programs are written")
    parser.add_argument("--more", type=int, metavar="N", help="write N more to train on")
    args = parser.parse_args()
    check_numbers(args, at_least_1=["more"])
    try:
        if args.more:
            write_more(args.folder, args.more)
        else:
            write(args.folder)
    except OSError as e:
        raise BadInput(f"{args.folder}: cannot be written ({e.strerror})") from None


if __name__ == "__main__":
    run_main(main)

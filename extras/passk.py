"""Sample programs, run them against their tests, and count: pass@k (§4.2, Table 1).

  python -m extras.passk humaneval-lua.jsonl --adapter FLORA_FILE --samples 100 --i-trust-the-code
  python -m extras.passk HumanEval.jsonl.gz --completions canonical --i-trust-the-code
                                                                        a check: all must pass

A problem file is JSONL, or an array in a .json file, gzipped or not: MultiPL-E's ("name",
"language", "prompt", "tests", "stop_tokens") or HumanEval's ("task_id", "prompt", "test",
"entry_point", "canonical_solution"), in the languages of extras/languages.py. Programs that have
run are kept in --results: the same command, given again after an interruption or with more
samples, does only what is missing. Another base model, adapter or problem is noticed by its
content, whatever its name. Problems whose prompts no program can complete (Julia's with a
docstring that does not end) are counted apart.

Generated programs are untrusted. Each runs in the sandbox of extras/sandbox.py, whose top says
what is contained and what is not. The first line on standard error says which holds here, the
next ones which interpreters and compilers run the programs.
"""
import argparse
import gzip
import json
import math
import os
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from extras import sandbox
from extras.languages import (ALIASES, LANGUAGES, OUTCOMES, Outcome, announce, check_tests, interpreter_of, run_program,
                              why_broken)
from extras.requests import OTHER_FILE, appending, read_jsonl, read_results, regular, resumable, rewrite_results
from generate import load_adapters, load_model, new_engine
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED, Help, add_common_flags, get_device, run_main
from plumbing.outputs import JSON, check_writable, write_json
from plumbing.prompts import cut_at_stop, new_text
from plumbing.provenance import adapter_digest, base_digest, difference, digest, provenance

HUMANEVAL_KEYS = ("task_id", "prompt", "test", "entry_point")
HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]   # of the Codex paper
MULTIPL_E_KEYS = ("name", "language", "prompt", "tests")
MOST_SECONDS = 10 ** 6   # for a program


# ---------------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    file: str                      # its base name: with `name` it tells problems apart
    name: str
    language: str                  # a key of LANGUAGES
    prompt: str
    tests: str                     # what follows the completion
    stops: list                    # texts that end a completion
    solution: str | None = None    # a completion that is known to pass


def read_problems(file):
    """Problems of a MultiPL-E or HumanEval file (.jsonl or .json, or that .gz) -> list of Problem.

    Raises BadInput for a file that cannot be read, a line without the keys of either format, a
    language that LANGUAGES lacks, and a name that comes twice.
    """
    problems = {}
    for where, given in read_lines(file, str(file)):
        problem = to_problem(given, os.path.basename(file), where)
        if problem.name in problems:
            raise BadInput(f"{where}: the name {problem.name} comes twice; rename one")
        problems[problem.name] = problem
    if not problems:
        raise BadInput(f"{file}: holds no problem")
    return list(problems.values())


def read_lines(file, what):
    """Yield (where, value) of each line of a JSONL file, or each element of a .json file's array;
    BadInput and `where` call the file `what`."""
    try:
        array = read_array(file)
        values = read_jsonl(file) if array is None else enumerate(array, 1)
        for number, value in values:
            yield f"{what} {'line' if array is None else 'element'} {number}", value
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:
        raise BadInput(f"{what}: not readable as JSONL ({e})") from None


def read_array(file):
    """The list in a .json file, or None where it holds something else."""
    if not str(file).removesuffix(".gz").endswith(".json"):
        return None
    opened = gzip.open if str(file).endswith(".gz") else open
    with opened(regular(file), "rt", encoding="utf-8-sig") as f:
        text = f.read()
    return json.loads(text) if text.lstrip().startswith("[") else None


def to_problem(given, file, where):
    """A line of a problem file -> Problem. BadInput, which says where, if it is not one."""
    given = given if isinstance(given, dict) else {}
    human = "task_id" in given
    keys = HUMANEVAL_KEYS if human else MULTIPL_E_KEYS
    if not all(isinstance(given.get(key), str) for key in keys):
        raise BadInput(f"{where}: is no problem; MultiPL-E's have the texts name, language, prompt "
                       "and tests, HumanEval's task_id, prompt, test and entry_point")
    if human:
        name, language = given["task_id"], "py"
        tests = f"{given['test']}\ncheck({given['entry_point']})"
    else:
        name, language = given["name"], ALIASES.get(given["language"], given["language"])
        tests = given["tests"]
    if language not in LANGUAGES:
        raise BadInput(f"{where}: language {language!r} cannot be run here; use one of "
                       f"{', '.join(LANGUAGES)}")
    check_tests(language, tests, where)
    stops = given.get("stop_tokens", HUMANEVAL_STOPS if human else [])
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise BadInput(f"{where}: stop_tokens is {stops!r}, which is no list of texts")
    solution = given.get("canonical_solution")
    return Problem(file, name, language, given["prompt"], tests, stops, solution)


def check_languages(problems):
    """BadInput where an interpreter, or the library that tests need, is missing."""
    for language in dict.fromkeys(p.language for p in problems):
        announce(language)
        library = LANGUAGES[language].library
        texts = [p.prompt + p.tests for p in problems if p.language == language]
        if library and any(library[0] in text for text in texts):
            interpreter_of(language, library=True)


def without_broken(problems):
    """The problems whose prompts some program can complete."""
    return [p for p in problems if not why_broken(p.language, p.prompt)]


def problem_digest(problem):
    return digest(json.dumps(problem))


# ------------------------------------------------------------------------------------ completions


class Completion(NamedTuple):
    problem: Problem
    sample: int                # its number, from 0
    text: str
    tokens: int = 0            # how many were sampled
    error: str | None = None   # why it could not be sampled


def sample_completions(model, tokenizer, adapter_id, todo, max_new_tokens=512, temperature=0.1,
                       top_p=0.95, seed=0, slots=8):
    """Sample a completion for each (problem, sample number) of the list todo, batched continuously.

    Yields Completions as they end. The randomness of each depends on seed, problem and number only.
    """
    engine = new_engine(model, min(slots, max(1, len(todo))))
    todo, asked = iter(todo), {}
    settings = dict(adapter_id=adapter_id, max_new_tokens=max_new_tokens, temperature=temperature,
                    top_p=top_p)
    while True:
        for problem, number in islice(todo, engine.slots - len(engine.waiting)):
            text = f"{seed} {problem.name} {number}".encode("utf-8", "surrogatepass")
            own_seed = zlib.crc32(text)
            try:
                request = submit(engine, tokenizer, problem, seed=own_seed, **settings)
            except (BadInput, ValueError) as e:   # a prompt that cannot be encoded
                yield Completion(problem, number, "", error=str(e))
            else:
                asked[request] = problem, number
        if not engine.busy:
            return
        for request, _ in engine.step():
            if request.state in ("done", "failed"):
                problem, number = asked.pop(request)
                text = cut_at_stop(new_text(tokenizer, request.ids), problem.stops)
                yield Completion(problem, number, text, len(request.ids), request.error)


def submit(engine, tokenizer, problem, **settings):
    """Ask an engine for a completion -> its request.

    The prompt is encoded without the white space at its end, which would split tokens as training
    text does not.
    """
    ids = tokenizer.encode(problem.prompt.rstrip(), bos=True)
    # a stop that is new ends in the tokens read last, and spans a token per byte at most
    longest = max((len(stop.encode("utf-8", "surrogatepass")) for stop in problem.stops), default=0)
    tail = longest + engine.sync_every

    def stopped(ids):
        text = tokenizer.decode(ids[-tail:], continues=True)
        return any(stop in text for stop in problem.stops)

    return engine.submit(ids, eos_id=tokenizer.eos_ids, stopped=stopped if problem.stops else None,
                         **settings)


def given_completions(source, problems):
    """The list of Completions that --completions asks for: canonical, empty, or a file."""
    if source == "empty":
        return [Completion(p, 0, "") for p in problems]
    if source == "canonical":
        for p in problems:
            if p.solution is None:
                raise BadInput(f"--completions canonical: {p.name} of {p.file} has no "
                               "canonical_solution")
        return [Completion(p, 0, p.solution) for p in problems]
    return read_completions(source, problems)


def read_completions(file, problems):
    """Completions of a JSONL file with "task_id" or "name", "completion" and, where a name repeats
    between problem files, "file". A problem's samples are numbered in the file's order. A
    completion that is not a text is one that could not be sampled."""
    completions, numbers = [], Counter()
    for where, line in read_lines(file, f"--completions {file}"):
        problem = problem_of(line, problems, where)
        number = numbers[problem.file, problem.name]
        numbers[problem.file, problem.name] += 1
        text = line["completion"]
        if isinstance(text, str):
            completions.append(Completion(problem, number, text))
        else:
            error = f"{where}: completion is {json.dumps(text)[:100]}, not a text"
            completions.append(Completion(problem, number, "", error=error))
    for p in problems:
        if not numbers[p.file, p.name]:
            raise BadInput(f"--completions {file}: has none for {p.name} of {p.file}")
    return completions


def problem_of(line, problems, where):
    """The problem that a line of a file of completions means."""
    line = line if isinstance(line, dict) else {}
    name = line.get("task_id", line.get("name"))
    if name is None or "completion" not in line:
        raise BadInput(f'{where}: needs "task_id" or "name", and "completion"')
    found = [p for p in problems if p.name == name and line.get("file", p.file) == p.file]
    if len(found) != 1:
        raise BadInput(f"{where}: {name} is the name of {len(found)} problems; "
                       'it must be of one (say which by "file")')
    return found[0]


def execute(completions, workers=None, timeout=15.0, compile_timeout=60.0):
    """Run each Completion of an iterable in one of `workers` threads (default: one per core), while
    the iterable makes more. Yields results, as of `score`, as they come."""
    pool, running = ThreadPoolExecutor(workers or os.cpu_count()), set()
    try:
        for completion in completions:
            running.add(pool.submit(score, completion, timeout, compile_timeout))
            ended = {future for future in running if future.done()}
            running -= ended
            yield from (future.result() for future in ended)
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)
    finally:
        pool.shutdown(cancel_futures=True)


def score(completion, timeout, compile_timeout):
    """Run one program -> a dict of file, name, sample, completion, tokens, outcome, code, error.

    BadInput where this machine, not the program, is why it could not be run.
    """
    problem, sample, text, tokens, error = completion
    if error:
        outcome = Outcome("refused", None, error)
    else:
        program = f"{problem.prompt}{text}\n{problem.tests}"
        try:
            outcome = run_program(problem.language, program, timeout, compile_timeout)
        except OSError as e:
            raise BadInput(f"a program could not be started ({e}); results so far are kept") from e
    return dict(file=problem.file, name=problem.name, sample=sample, completion=text, tokens=tokens,
                **outcome._asdict())


# ----------------------------------------------------------------------------------------- scoring


def pass_at_k(n, c, k):
    """The unbiased estimate of pass@k from n samples of which c pass (Chen et al. 2021, Eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values):
    """Mean, and its standard error over problems (None of one problem)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def count(problems, results):
    """Count the outcomes of each problem's results -> a list of Counters, as the problems are."""
    counts = {(p.file, p.name): Counter() for p in problems}
    for r in results:
        counts[r["file"], r["name"]][r["outcome"]] += 1
    return list(counts.values())


def evaluate_problems(model, tokenizer, adapter_id, problems, samples=100, workers=None,
                      timeout=15.0, **settings):
    """Sample and run `samples` programs per problem -> a Counter of OUTCOMES for each.

    settings: of sample_completions.
    """
    check_languages(problems)
    todo = [(problem, number) for problem in problems for number in range(samples)]
    completions = sample_completions(model, tokenizer, adapter_id, todo, **settings)
    return count(problems, execute(completions, workers, timeout))


def summary(problems, counts, ks):
    """A row for each file: problems, samples, "pass@k" and its "±" for each k, and the outcomes."""
    rows = []
    for file in dict.fromkeys(p.file for p in problems):
        mine = [c for p, c in zip(problems, counts) if p.file == file]
        row = dict(file=file, problems=len(mine), samples=sum(c.total() for c in mine))
        for k in ks:
            scores = [pass_at_k(c.total(), c["passed"], k) for c in mine]
            row[f"pass@{k}"], row[f"±{k}"] = mean_and_error(scores)
        rows.append(row | {outcome: sum(c[outcome] for c in mine) for outcome in OUTCOMES})
    return rows


def print_table(rows, ks):
    table = [["file", "problems", "samples", *(f"pass@{k}" for k in ks), *OUTCOMES]]
    for row in rows:
        scores = []
        for k in ks:
            error = row[f"±{k}"]
            scores.append(f"{row[f'pass@{k}']:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        sizes = [str(row[key]) for key in ("file", "problems", "samples")]
        table.append([*sizes, *scores, *(str(row[outcome]) for outcome in OUTCOMES)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())


# ------------------------------------------------------------------------------------- the command


def run(args):
    """pass@k of problem files."""
    require_consent(args)
    everything = read_files(args.files)
    problems = without_broken(everything)
    if not problems:
        raise BadInput("all problems are broken: "
                       f"{why_broken(everything[0].language, everything[0].prompt)}")
    given = given_completions(args.completions, everything) if args.completions else []
    given = [c for c in given if not why_broken(c.problem.language, c.problem.prompt)]
    todo = [(c.problem, c.sample) for c in given]
    if not args.completions:
        todo = [(problem, number) for problem in problems for number in range(args.samples)]
    ks = choose_ks(args.k, todo)
    check_languages(problems)
    check_writable(args.json, "--json", JSON, make_folder=True)
    check_writable(args.results, "--results", make_folder=True)
    identity = identity_of(args)
    with resumable(args.results):
        results = evaluate(args, identity, problems, given, todo)
    report(args, identity, everything, results, ks)


def evaluate(args, identity, problems, given, todo):
    """Do what --results lacks -> {key: result} of all of `todo`."""
    results = resume(args.results, identity, problems, given, todo)
    missing = [(problem, number) for problem, number in todo if key(problem, number) not in results]
    completions = [c for c in given if key(c.problem, c.sample) not in results]
    if missing and not args.completions:
        completions = sample_missing(args, missing)
    complete(args, completions, problems, identity, results, len(todo))
    return results


def require_consent(args):
    """BadInput without --i-trust-the-code; with it, say how programs are contained here."""
    if not args.i_trust_the_code:
        raise BadInput("this runs programs that a model wrote on this machine, contained only as "
                       "the top of extras/sandbox.py says; read that, and add --i-trust-the-code")
    print(sandbox.describe(), file=sys.stderr)


def read_files(files):
    """The problems of all files. BadInput where two have the same base name."""
    if len({os.path.basename(file) for file in files}) < len(files):
        raise BadInput("two problem files have the same name, by which results are told apart; "
                       "rename one")
    return [problem for file in files for problem in read_problems(file)]


def choose_ks(ks, todo):
    """--k, or those of 1 and 10 for which every problem has enough samples."""
    samples = min(Counter((problem.file, problem.name) for problem, _ in todo).values())
    ks = ks or [k for k in (1, 10) if k <= samples]
    if max(ks) > samples:
        raise BadInput(f"--k {max(ks)}: needs as many samples of every problem, and there are "
                       f"{samples}")
    return ks


def identity_of(args):
    """What results depend on, beside the problem and what runs it: contents, not names."""
    source = args.completions
    identity = dict(completions="given" if source not in (None, "canonical", "empty") else source,
                    timeout=args.timeout, compile_timeout=args.compile_timeout)
    if not args.completions:
        identity |= dict(base=base_digest(args.weights),
                         adapter_file=adapter_digest(args.adapter))
        for name in ("dtype", "quantize", "max_new_tokens", "temperature", "top_p", "seed"):
            identity[name] = getattr(args, name)
    return identity


def identity_of_problem(problem):
    """What a problem's results depend on."""
    return dict(problem=problem_digest(problem), ran_by=interpreter_of(problem.language).version)


def key(problem, number):
    """What tells a program's results apart."""
    return problem.file, problem.name, number


def resume(file, identity, problems, given, todo):
    """Results of an earlier run that todo asks for -> {key: result}; the file keeps all of them.

    BadInput where its settings, its form of a problem, or a given completion were others.
    """
    results = read_results(file, "file", "name", "sample")
    own = {(p.file, p.name): identity_of_problem(p) for p in problems}
    texts = {key(c.problem, c.sample): c.text for c in given}
    for k, r in results.items():
        what = changed(r, identity, own.get(k[:2], {}), texts.get(k))
        if what:
            raise BadInput(f"--results {file}: was made {what}; {OTHER_FILE}")
    rewrite_results(file, results)
    asked = {key(problem, number) for problem, number in todo}
    return {k: result for k, result in results.items() if k in asked}


def changed(result, identity, own, text):
    """How an earlier result was made, if otherwise than it would be now, or None.

    own: identity_of_problem, text: the completion, where they are asked for now.
    """
    of = f"{result['name']} of {result['file']}"
    for name in (*identity, *own, "completion", "outcome"):
        if name not in result:
            return f"without a note of its {name}"
    if result["problem"] != own.get("problem", result["problem"]):
        return f"with another form of the problem {of}"
    if result["ran_by"] != own.get("ran_by", result["ran_by"]):
        return f"with {result['ran_by']}, not {own['ran_by']}"
    if text not in (None, result["completion"]):
        return f"with another completion {result['sample']} of {of}"
    what = difference(result, identity)
    return what and f"with {what}"


def sample_missing(args, missing):
    """Load the model and the adapter -> an iterator of Completions."""
    model, tokenizer = load_model(args)
    adapter_id = load_adapters(model, [args.adapter])[args.adapter]
    slots = args.slots or (8 if args.device == "cpu" else 64)
    return sample_completions(model, tokenizer, adapter_id, missing, args.max_new_tokens,
                              args.temperature, args.top_p, args.seed, slots)


def complete(args, completions, problems, identity, results, total):
    """Run completions; append each result to --results as it comes, and add it to `results`."""
    own = {(p.file, p.name): identity_of_problem(p) for p in problems}
    start, tokens = time.time(), 0
    passed = count_passed(results)
    bar = tqdm(total=total, initial=len(results), unit="program")
    with appending(args.results) as add, bar:
        for r in execute(completions, args.workers, args.timeout, args.compile_timeout):
            add(r | own[r["file"], r["name"]] | identity)
            results[r["file"], r["name"], r["sample"]] = r
            tokens += r["tokens"]
            passed += r["outcome"] == "passed"
            speed = tokens / (time.time() - start)
            bar.set_postfix_str(f"{speed:.0f} tokens/s, {passed} passed", refresh=False)
            bar.update()


def count_passed(results):
    return sum(r["outcome"] == "passed" for r in results.values())


def report(args, identity, everything, results, ks):
    """Print the table, and write --json."""
    problems = without_broken(everything)
    counts = count(problems, results.values())
    rows = summary(problems, counts, ks)
    print_table(rows, ks)
    print(f"{count_passed(results)} of {len(results)} programs passed")
    broken = tell_broken(everything)
    if args.json:
        names = dict(completions=args.completions)
        if not args.completions:
            names |= dict(weights=args.weights, adapter=args.adapter)
        tools = {p.language: interpreter_of(p.language)._asdict() for p in problems}
        each = [dict(file=p.file, name=p.name, **c) for p, c in zip(problems, counts)]
        write_json(args.json, provenance(get_device(args.device)) | dict(
            settings=identity | names, languages=tools, broken=broken, rows=rows, problems=each))


def tell_broken(problems):
    """Print, for each file that has some, how many problems are broken -> {file: their number}."""
    broken, sizes = Counter(), Counter(p.file for p in problems)
    for p in problems:
        why = why_broken(p.language, p.prompt)
        if why:
            broken[p.file] += 1
            reason = why
    for file in broken:
        print(f"{file}: {broken[file]} of {sizes[file]} problems are broken, and not counted: "
              f"{reason}")
    return broken


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="problems, .jsonl or .json, with .gz or not")
    add("--adapter", default="none", metavar="FILE", help="none (the default) is the base model")
    add("--completions", metavar="canonical|empty|FILE", help="score these instead of sampling: "
        "the problems' own solutions, nothing, or a JSONL file")
    add("--samples", type=int, default=100, help="per problem (default: 100, the paper's)")
    add("--k", type=int, nargs="+", help="(default: 1 10)")
    add("--max-new-tokens", type=int, default=512, help="of each sample")
    add("--temperature", type=float, default=0.1, help="(default: 0.1, the paper's)")
    add("--top-p", type=float, default=0.95, help="draw from the likeliest tokens that make up this share")
    add("--slots", type=int, help="samples generated at once (default: 8 on a CPU, otherwise 64)")
    add("--workers", type=int, help="programs run at once (default: one per core)")
    add("--timeout", type=float, default=15.0, help="seconds for a program (default: 15)")
    add("--compile-timeout", type=float, default=60.0,
        help="seconds for compiling it before (default: 60)")
    add("--results", metavar="FILE", help="JSONL to write, or to complete (default: out/passk/, "
        "named by the problems and by what completes them)")
    add_consent_flag(parser)
    add_common_flags(parser, dtypes=["float32", "bfloat16", "float16"])
    parser.set_defaults(attention="flash")
    args = parser.parse_args(argv)
    args.results = args.results or default_results(args)
    for flag in ("samples", "max_new_tokens", "slots", "workers"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; use a whole number "
                         "of at least 1")
    if min(args.k or [1]) < 1:
        parser.error("--k must be above 0")
    for flag in ("timeout", "compile_timeout"):
        if not 0 < getattr(args, flag) <= MOST_SECONDS:
            parser.error(f"--{flag.replace('_', '-')} must be above 0, and {MOST_SECONDS} at most")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--temperature must be at least 0 and finite, --top-p in (0, 1]")
    return args


def default_results(args):
    """A name of its own for each set of problems and each adapter or file of completions."""
    source = args.completions or args.adapter
    known = {"none": "base", "canonical": "canonical", "empty": "empty"}
    source = known.get(source) or "-".join(Path(source).absolute().with_suffix("").parts[-2:])
    if args.weights != EMBEDDED and not args.completions:
        source = f"{Path(args.weights).absolute().name}-{source}"
    problems = "+".join(Path(file.removesuffix(".gz")).stem for file in args.files)
    return f"out/passk/{problems[:100]}-{source[-100:]}.jsonl"


def add_consent_flag(parser):
    parser.add_argument("--i-trust-the-code", action="store_true", help="consent to run what a "
                        "model wrote; see the top of extras/sandbox.py")


def main():
    run(parse_args())


if __name__ == "__main__":
    run_main(main)

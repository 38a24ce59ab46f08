"""extras/passk.py: sampled or given programs are run, counted, kept, and refused in a sentence."""
import gzip
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch

import flora
from extras import languages, passk
from extras.passk import Problem, read_problems, sample_completions
from extras.tests.test_languages import MULTIPL_E, needs
from flora import BASE
from model import GPT
from plumbing.adapter_files import load_tensors
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED
from plumbing.outputs import locked, save_tensors
from plumbing.tokenizer import Tokenizer
from plumbing.tests.conftest import write_jsonl
from test_flora import FIXTURES


def add_problems(file, language, names=("a", "b")):
    """A MultiPL-E file whose problems are all `add`."""
    prompt, *_, tests = MULTIPL_E[language]
    return write_jsonl(file, [dict(
        name=name, language=language, prompt=prompt, tests=tests, stop_tokens=["\n\n"])
        for name in names])


def run_passk(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["passk.py", *map(str, flags)])
    passk.main()


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 1, 7), (4, 3, 2)]:
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(map(any, subsets)) / len(subsets)
        assert abs(passk.pass_at_k(n, c, k) - share) < 1e-12
    assert passk.mean_and_error([0.5]) == (0.5, None)
    mean, error = passk.mean_and_error([0.0, 1.0, 1.0, 0.5])
    assert mean == 0.625 and abs(error - np.std([0, 1, 1, 0.5], ddof=1) / 2) < 1e-12


def test_known_completions_in_three_languages_get_their_pass_at_k(tmp_path, monkeypatch, capsys):
    """And a run that was cut off does only what is missing, and refuses other settings."""
    languages = ["py", "sh", "pl"]
    for language in languages:
        needs(language)
    files = [add_problems(tmp_path / f"{language}.jsonl", language) for language in languages]
    given = []
    for language in languages:
        for name, pattern in [("a", [1, 2, 1]), ("b", [2, 3, 2])]:   # 1 passes, 2 and 3 do not
            given += [dict(name=name, file=f"{language}.jsonl",
                           completion=MULTIPL_E[language][which]) for which in pattern]
    completions = write_jsonl(tmp_path / "given.jsonl", given)
    results = tmp_path / "out" / "results.jsonl"

    def main(*flags):
        run_passk(monkeypatch, *flags, "--results", results, "--i-trust-the-code")
        return capsys.readouterr().out

    flags = [*files, "--completions", completions, "--k", 1, 2, "--json", tmp_path / "out.json",
             "--timeout", 60]
    table = main(*flags)
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        counts = row["problems"], row["samples"], row["passed"], row["failed"]
        assert counts == (2, 6, 2, 4)
        assert abs(row["pass@1"] - 1 / 3) < 1e-9 and row["pass@2"] == 0.5   # of a 2/3 and 1, of b 0
        assert abs(row["±1"] - 1 / 3) < 1e-9 and abs(row["±2"] - 0.5) < 1e-9
    assert table.count("0.3333 ± 0.3333") == table.count("0.5000 ± 0.5000") == 3
    assert "6 of 18 programs passed" in table

    complete = results.read_text().splitlines(keepends=True)
    results.write_text("".join(complete[:16]) + complete[16][:30])
    calls, execute = [], passk.execute

    def watched(completions, *args):
        calls.extend(completions)
        return execute(calls, *args)

    monkeypatch.setattr(passk, "execute", watched)
    assert main(*flags) == table and len(calls) == 2
    again = results.read_text().splitlines(keepends=True)
    assert again[:16] == complete[:16] and len(again) == 18
    with pytest.raises(BadInput, match="results.jsonl: was made with --timeout 60.0, not 61.0; "
                       "move the file away"):
        main(*flags, "--timeout", 61)
    files[0].write_text(files[0].read_text().replace("candidate(1, 2)", "candidate(2, 1)"))
    with pytest.raises(BadInput, match="another form of the problem a of py.jsonl"):
        main(*flags)
    with pytest.raises(BadInput, match="--k 4: needs as many samples of every problem, and there "
                       "are 3"):
        main(*flags, "--k", 4)


def test_sampled_programs_are_what_the_model_says_alone_cut_at_stops():
    """The embedded model, each sample by a random number of its own, and counted as executed."""
    needs("py")
    model, tokenizer = GPT.from_pretrained(EMBEDDED), Tokenizer(EMBEDDED)
    problems = [Problem("f", str(i), "py", f"def f{i}(x):\n", "", ["\n\n", " ="]) for i in range(2)]
    problems.append(problems[0]._replace(name="long", prompt="x " * 600))
    todo = [(p, n) for p in problems for n in range(2)]

    def sampled(todo, slots):
        """{(problem's name, sample): (text, tokens, error)}"""
        completions = sample_completions(model, tokenizer, BASE, todo, slots=slots,
                                         max_new_tokens=24, temperature=0.8, seed=3)
        return {(p.name, n): rest for p, n, *rest in completions}

    got = sampled(todo, slots=3)
    assert len(got) == 6 and "shorten it" in got["long", 0][2]
    for p, n in todo[:4]:
        text, tokens, error = got[p.name, n]
        assert text == sampled([(p, n)], slots=1)[p.name, n][0]
        assert not any(s in text for s in p.stops) and error is None and tokens <= 24
    assert len({text for text, *_ in got.values()}) > 3
    counts = passk.evaluate_problems(model, tokenizer, BASE, problems, 2, timeout=60,
                                     max_new_tokens=2)
    assert [c.total() for c in counts] == [2, 2, 2] and counts[2] == {"refused": 2}


def test_humaneval_problems_are_scored_by_their_own_solutions(tmp_path, monkeypatch, capsys):
    needs("py")
    problem = dict(
        task_id="HumanEval/0", prompt="def one():\n", entry_point="one",
        canonical_solution="    return 1\n",
        test="def check(candidate):\n    assert candidate() == 1\n")
    file = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(file, "wt") as f:
        f.write(json.dumps(problem) + "\n")
    for completions, passed in [("canonical", 1), ("empty", 0)]:
        run_passk(monkeypatch, file, "--completions", completions,
                  "--results", tmp_path / completions, "--i-trust-the-code")
        assert f"{passed} of 1 programs passed" in capsys.readouterr().out


def test_a_refused_completion_fails_alone(tmp_path, monkeypatch, capsys):
    """A lone surrogate, or a completion that is not a text; what ran is kept and not run again."""
    needs("py")
    file = add_problems(tmp_path / "py.jsonl", "py")
    right = MULTIPL_E["py"][1]
    texts = [right, "\ud83d", right + "\n#\x0c \u2028", None]
    given = write_jsonl(tmp_path / "given.jsonl", [
        dict(name=name, completion=text) for text in texts for name in "ab"])
    flags = [file, "--completions", given, "--results", tmp_path / "r", "--i-trust-the-code",
             "--timeout", 60]
    run_passk(monkeypatch, *flags)
    assert "4 of 8 programs passed" in capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    found = {(r["name"], r["sample"]): (r["outcome"], r["error"]) for r in results}
    assert found["a", 0][0] == found["b", 2][0] == "passed"
    assert found["a", 1] == (
        "failed", "it cannot be written as UTF-8: it holds the lone surrogate U+D83D")
    assert found["b", 3][0] == "refused"
    assert "line 8: completion is null, not a text" in found["b", 3][1]
    monkeypatch.setattr(passk, "run_program", None)   # nothing is left to run
    run_passk(monkeypatch, *flags)
    given.write_text(given.read_text().replace("a + b\"", "b + a\""))
    with pytest.raises(BadInput, match="was made with another completion 0 of [ab] of py.jsonl"):
        run_passk(monkeypatch, *flags)


def test_results_are_named_by_the_problems_and_what_completes_them(tmp_path, monkeypatch):
    """So that one run after another, of other problems or another adapter, is not refused."""
    def name(*flags):
        return passk.parse_args([*flags, "--i-trust-the-code"]).results

    names = [name("data/lua.jsonl.gz"), name("data/lua.jsonl", "data/sh.json"), name("sh.json"),
             name("sh.json", "--adapter", "out/flora-r1/adapter.safetensors"),
             name("sh.json", "--adapter", "out/lora-r1/adapter.safetensors"),
             name("sh.json", "--weights", "out/smollm2"),
             name("sh.json", "--completions", "canonical"),
             name("sh.json", "--completions", "a/given.jsonl"),
             name(*(f"{i}.jsonl" for i in range(200)))]
    assert names[0] == "out/passk/lua-base.jsonl" and names[1] == "out/passk/lua+sh-base.jsonl"
    assert names[3] == "out/passk/sh-flora-r1-adapter.jsonl"
    assert len(set(names)) == len(names) and all(len(name) < 250 for name in names)
    assert name("sh.json", "--results", "mine") == "mine"
    needs("sh")
    file = add_problems(tmp_path / "sh.jsonl", "sh")
    given = write_jsonl(tmp_path / "given.jsonl", [
        dict(name=name, completion=MULTIPL_E["sh"][1]) for name in "ab"])
    monkeypatch.chdir(tmp_path)
    for completions in (given, "empty", given):
        run_passk(monkeypatch, file, "--completions", completions, "--i-trust-the-code")
    assert len(list((tmp_path / "out" / "passk").iterdir())) == 2


def test_broken_problems_are_counted_apart(tmp_path, monkeypatch, capsys):
    needs("sh")
    monkeypatch.setitem(languages.LANGUAGES, "sh", languages.LANGUAGES["sh"]._replace(
        broken=("never", "a prompt that never ends")))
    file = add_problems(tmp_path / "sh.jsonl", "sh", names="abc")
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | dict(prompt="# never\n"))
    file.write_text("\n".join(lines))
    given = write_jsonl(tmp_path / "given.jsonl", [
        dict(name=name, completion=MULTIPL_E["sh"][1]) for name in "abc"])
    run_passk(monkeypatch, file, "--completions", given, "--json", tmp_path / "json", "--results",
              tmp_path / "r", "--i-trust-the-code", "--timeout", 60)
    out = capsys.readouterr().out
    assert "2 of 2 programs passed" in out
    assert ("sh.jsonl: 1 of 3 problems are broken, and not counted: a prompt that never ends"
            in out)
    report = json.loads((tmp_path / "json").read_text())
    assert report["broken"] == {"sh.jsonl": 1} and report["rows"][0]["pass@1"] == 1
    assert "GNU bash, version" in report["languages"]["sh"]["version"]


@pytest.mark.parametrize("name", ["p.json", "p.json.gz", "p.jsonl"])
def test_arrays_and_a_byte_order_mark_are_read(name, tmp_path):
    lines = add_problems(tmp_path / "lines.jsonl", "py").read_text()
    text = lines
    if "jsonl" not in name:
        text = f"[{','.join(lines.splitlines())}]"
    data = ("\ufeff" + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = [p._replace(file="") for p in read_problems(str(tmp_path / name))]
    assert found == [p._replace(file="") for p in read_problems(str(tmp_path / "lines.jsonl"))]


def test_results_of_another_base_adapter_or_interpreter_are_not_taken(
        tmp_path, monkeypatch, capsys):
    needs("py")
    file, adapter = add_problems(tmp_path / "py.jsonl", "py"), tmp_path / "adapter.safetensors"
    results, base = tmp_path / "r", FIXTURES / "tiny"

    def train(seed):
        model = GPT.from_pretrained(base)
        torch.manual_seed(seed)
        adapter_id = flora.add_adapter(model, "lora", 2)
        for p in flora.adapter_parameters(model, adapter_id).values():
            p.data.normal_()
        flora.save_adapter(model, adapter_id, adapter)

    def main(*more, adapter=adapter):
        run_passk(monkeypatch, file, "--weights", base, "--adapter", adapter, "--samples", 1,
                  "--max-new-tokens", 2, "--results", results, "--timeout", 60,
                  "--i-trust-the-code", *more)
        return capsys.readouterr().out

    train(1)
    table, made = main(), results.read_text()
    train(1)
    renamed = adapter.rename(tmp_path / "renamed.safetensors")
    monkeypatch.setattr(passk, "sample_missing", None)   # nothing is to be sampled
    assert main(adapter=renamed) == table and results.read_text() == made
    train(2)
    other = tmp_path / "base"
    shutil.copytree(base, other)
    GPT.from_pretrained(EMBEDDED).save_pretrained(other)
    refused = [((), adapter, r"another adapter \(fingerprint \w+, not \w+\)"),
               (("--weights", other), renamed, r"another base model \(fingerprint \w+, not \w+\)"),
               (("--dtype", "bfloat16"), renamed, "--dtype float32, not bfloat16"),
               (("--quantize", "int8"), renamed, "--quantize None, not int8")]
    for more, file_of_adapter, sentence in refused:
        with pytest.raises(BadInput, match=f"r: was made with {sentence}; move the file away"):
            main(*more, adapter=file_of_adapter)
    results.write_text(made.replace('"ran_by": "Python', '"ran_by": "Old Python'))
    with pytest.raises(BadInput, match="was made with Old Python .*, not Python"):
        main(adapter=renamed)
    results.write_text(made.replace('"base": ', '"bass": '))
    with pytest.raises(BadInput, match="was made without a note of its base; move"):
        main(adapter=renamed)
    results.write_text(made)
    with locked(str(results), "--results"):
        with pytest.raises(BadInput, match="another process is writing there"):
            main(adapter=renamed)
    assert results.read_text() == made


@pytest.mark.parametrize("end", [1, 2])
def test_a_sample_ends_at_any_of_the_end_tokens(end, tmp_path, monkeypatch, capsys):
    """A model that says one of config.json's two end tokens at once."""
    needs("py")
    prompt = "def f():\n    return 1\n"
    source, folder = FIXTURES / "tiny_llama3", tmp_path / "model"
    shutil.copytree(source, folder)
    model, tokenizer = GPT.from_pretrained(source), Tokenizer(source)
    ids = torch.tensor([tokenizer.encode(prompt.rstrip(), bos=True)])
    tensors, metadata = load_tensors(folder / "model.safetensors")
    head = torch.zeros_like(tensors["model.embed_tokens.weight"])
    head[end] = model.hidden(ids)[0, -1].detach()
    save_tensors(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata)
    config = json.loads((folder / "config.json").read_text())
    assert set(config["eos_token_id"]) == {1, 2}
    (folder / "config.json").write_text(json.dumps(
        config | dict(tie_word_embeddings=False, max_position_embeddings=128)))
    problem = dict(task_id="T/0", prompt=prompt, entry_point="f",
                   test="def check(f):\n    assert f() == 1\n")
    file = write_jsonl(tmp_path / "p.jsonl", [problem])
    run_passk(monkeypatch, file, "--weights", folder, "--samples", 1, "--temperature", 0,
              "--max-new-tokens", 8, "--results", tmp_path / "r", "--timeout", 60,
              "--i-trust-the-code")
    assert "1 of 1 programs passed" in capsys.readouterr().out
    result = json.loads((tmp_path / "r").read_text())
    assert result["completion"] == "" and result["tokens"] == 1


@pytest.mark.parametrize("text,sentence", [
    ("{", "not readable as JSONL .line 1: "),
    ("", "holds no problem"),
    ("[1]", "line 1: is no problem; MultiPL-E"),
    ([dict(language="cobol")], "language 'cobol' cannot be run here; use one of py, pl"),
    ([dict(stop_tokens="x")], "stop_tokens is 'x', which is no list of texts"),
    ([{}, {}], "line 2: the name a comes twice"),
    ([dict(language="rs", tests="fn f();")], "tests do not end as MultiPL-E's of rs do"),
    ("[" * 100000, "not readable as JSONL"),
])
def test_a_bad_problem_file_is_refused_in_a_sentence(text, sentence, tmp_path):
    good = json.loads(add_problems(tmp_path / "good.jsonl", "py").read_text().splitlines()[0])
    if isinstance(text, list):
        text = "\n".join(json.dumps(good | changes) for changes in text)
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(BadInput, match=sentence):
        read_problems(str(tmp_path / "bad.jsonl"))


def test_a_cut_gzip_file_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(BadInput, match="bad.jsonl.gz: not readable"):
        read_problems(str(tmp_path / "bad.jsonl.gz"))


@pytest.mark.parametrize("completions,sentence", [
    ("canonical", "a of good.jsonl has no canonical_solution"),
    ("no", "--completions .*no: not readable"),
    ([{}], 'needs "task_id" or "name"'),
    ([dict(name="a")], 'needs "task_id" or "name", and "completion"'),
    ([dict(name="z", completion="")], "z is the name of 0 problems"),
    ([dict(name="a", completion="")], "has none for b of good.jsonl"),
])
def test_bad_completions_are_refused_in_a_sentence(completions, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(completions, list):
        completions = write_jsonl(tmp_path / "given.jsonl", completions)
    good = add_problems(tmp_path / "good.jsonl", "py")
    with pytest.raises(BadInput, match=sentence):
        run_passk(monkeypatch, good, "--i-trust-the-code", "--completions", completions)


def test_without_consent_or_with_two_files_of_one_name_nothing_runs(tmp_path, monkeypatch):
    good, twice = add_problems(tmp_path / "good.jsonl", "py"), tmp_path / "other" / "good.jsonl"
    twice.parent.mkdir()
    shutil.copy(good, twice)
    with pytest.raises(BadInput, match="this runs programs that a model wrote .* add "
                       "--i-trust-the-code"):
        run_passk(monkeypatch, good)
    with pytest.raises(BadInput, match="two problem files have the same name"):
        run_passk(monkeypatch, good, twice, "--i-trust-the-code")


@pytest.mark.parametrize("flag", [
    "--samples", "--k", "--timeout", "--compile-timeout", "--top-p", "--workers"])
def test_a_flag_of_zero_is_refused(flag):
    with pytest.raises(SystemExit) as exit:
        passk.parse_args(["f", flag, "0"])
    assert exit.value.code == 2


@pytest.mark.parametrize("flag", ["--timeout", "--compile-timeout", "--temperature", "--top-p"])
@pytest.mark.parametrize("value", ["nan", "inf", "1" * 400])
def test_a_flag_that_is_not_finite_is_refused(flag, value):
    with pytest.raises(SystemExit) as exit:
        passk.parse_args(["f", flag, value])
    assert exit.value.code == 2

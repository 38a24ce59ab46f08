"""extras/toys.py and toy_problems.py: problems split by task, adapters scored by execution."""
import json

import pytest

from extras import passk, table1, teach, toy_problems, toys
from extras.languages import run_program
from extras.tests.test_languages import needs
from extras.tests.test_table1 import small_table, train_here
from flora import BASE
from plumbing.adapter_files import load_tensors
from plumbing.files import BadInput
from plumbing.outputs import save_tensors
from test_flora import run_script


def test_toys_scores_adapters_by_execution_and_their_own_solutions_pass(
        tiny_folder, tmp_path, monkeypatch):
    needs("sh")
    train_all, make_problems = table1.train_all, toys.make_problems
    monkeypatch.setattr(table1, "train_all", train_here)
    monkeypatch.setattr(toys, "make_problems", lambda *args: {   # 12 of 48, for speed
        language: problems[:12] for language, problems in make_problems(*args).items()})
    flags = ("--languages", "sh", "--methods", "lora-r4", "--samples", "1", "--tune-seeds", "7",
             "--i-trust-the-code")
    seed = 0

    def solutions(model, tokenizer, adapter_id, todo, **settings):
        """The adapter of seed 1 knows the first 3 of 12 by heart."""
        nonlocal seed
        for i, (problem, number) in enumerate(todo):
            knows = adapter_id != BASE and seed == 1 and i < 3
            yield problem, number, problem.solution if knows else "", 1, None
        seed += adapter_id != BASE

    monkeypatch.setattr(passk, "sample_completions", solutions)
    result = small_table(toys.toys, toys.parse_args, tiny_folder, tmp_path, *flags)
    assert result["table"]["sh"]["base"]["mean"] == 0 and result["base_in_python"] == 0
    assert result["table"]["sh"]["lora-r4"]["seeds"] == [0, 0.25]
    monkeypatch.setattr(passk, "sample_completions",
                        lambda *args, **settings: pytest.fail("scores are kept"))
    again = small_table(toys.toys, toys.parse_args, tiny_folder, tmp_path, *flags)
    assert again["table"] == result["table"]
    score = next((tmp_path / "sh" / "lora-r4").rglob("pass.json"))
    adapter = score.with_name("adapter.safetensors")
    with pytest.raises(BadInput, match="pass.json was made with --samples 1, not 2; choose"):
        small_table(toys.toys, toys.parse_args, tiny_folder, tmp_path, *flags, "--samples", "2")
    monkeypatch.setattr(table1, "train_all", train_all)   # which finds all trainings done
    small_table(toys.toys, toys.parse_args, tiny_folder, tmp_path, *flags)
    save_tensors(*change(adapter))
    with pytest.raises(BadInput, match="pass.json was made with another adapter"):
        small_table(toys.toys, toys.parse_args, tiny_folder, tmp_path, *flags)


def change(file):
    """What save_tensors is told to write an adapter file with other values."""
    tensors, metadata = load_tensors(file)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    return changed, file, {"flora_adapter": json.dumps(metadata)}


def test_toy_problems_are_split_by_task_and_solved_by_their_solutions_in_every_language(
        tmp_path, monkeypatch):
    run_script(toy_problems.main, ["toy_problems", str(tmp_path)], monkeypatch)
    names = None
    for file in sorted(tmp_path.glob("*.jsonl")):
        problems = passk.read_problems(file)
        assert names in (None, [p.name for p in problems]) and len(problems) == 48
        names = [p.name for p in problems]
        task = 1 if file.stem == "py" else 0   # the line that says it
        trained_on = {text.read_text().split("\n")[task]
                      for text in (tmp_path / file.stem).iterdir()}
        assert not trained_on & {p.prompt.split("\n")[task] for p in problems}
        needs(file.stem)
        for problem in problems[::6]:
            program = f"{problem.prompt}{problem.solution}\n{problem.tests}"
            assert run_program(file.stem, program).outcome == "passed"


def test_more_problems_to_train_on_have_the_steps_of_no_held_out_one(tmp_path):
    held_out = {(kind, toy_problems.steps_of(task)) for kind, task in toy_problems.make_tasks()[0]}
    tasks = toy_problems.more_tasks(500)
    assert not held_out & {(kind, toy_problems.steps_of(task)) for kind, task in tasks}
    toy_problems.write_more(tmp_path, 50)
    files = sorted((tmp_path / "more" / "py").iterdir())
    assert len(files) == 3   # of 20, 20 and 10 problems
    assert files[0].read_text().count("def f(x):") == 20
    assert files[0].read_text().startswith(toy_problems.solved("py", *tasks[0]))


def test_teach_tells_pass_at_1_of_the_base_and_of_the_adapter_that_it_trained(
        tmp_path, monkeypatch, capsys):
    needs("pl")
    make_tasks = toy_problems.make_tasks
    monkeypatch.setattr(teach, "TEXTS", 40)
    monkeypatch.setattr(teach, "FLAGS", "--steps 1 --block-size 32 --eval-tokens 200 "
                                        "--keep-duplicates --eval-every 1")
    monkeypatch.setattr(teach.toy_problems, "make_tasks", lambda: (make_tasks()[0][:4], []))

    def solutions(model, tokenizer, adapter_id, todo, **settings):
        """The base knows none by heart, the adapter three of four."""
        for i, (problem, number) in enumerate(todo):
            task = make_tasks()[0][i]
            solution = toy_problems.render("pl", *task, "")["canonical_solution"]
            yield problem, number, solution if adapter_id != BASE and i < 3 else "", 1, None

    monkeypatch.setattr(passk, "sample_completions", solutions)
    run_script(teach.main, ["teach", "--i-trust-the-code", "--out", str(tmp_path / "out")], monkeypatch)
    assert "pass@1 0.000 by the base model, 0.750 with the adapter" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter.safetensors").exists()

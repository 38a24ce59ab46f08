"""python -m extras.demo: its programs are those of its adapters, and its verdicts those of their tests."""
import shutil

import pytest

import flora
from extras import demo, toy_problems
from extras.tests.test_languages import needs
from flora import BASE
from generate import generate
from model import GPT
from plumbing.files import BadInput
from plumbing.outputs import PNG
from plumbing.tokenizer import Tokenizer
from test_flora import random_adapter, run_script


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch):
    """A random base with random adapters, in the place of the embedded one."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    model = GPT.from_pretrained(tiny_folder)
    (tmp_path / "base" / "adapters").mkdir()
    for name in ("perl", "javascript", "bash"):
        file = tmp_path / "base" / "adapters" / f"{name}.safetensors"
        flora.save_adapter(model, random_adapter(model, "flora"), str(file))
    monkeypatch.setattr(demo, "EMBEDDED", str(tmp_path / "base"))
    return tmp_path / "base"


def test_the_programs_of_one_batch_are_those_of_each_request_alone(folder, monkeypatch, capsys):
    for language in demo.ROWS:
        needs(language)
    run_script(demo.main, ["demo", "--task", "3", "--png", folder / "figure.png"], monkeypatch)
    printed = capsys.readouterr().out
    model, tokenizer = GPT.from_pretrained(folder), Tokenizer(folder)
    tasks = toy_problems.make_tasks()[0]
    for language, (_, adapter) in demo.ROWS.items():
        i = flora.load_adapter(model, demo.find(language, adapter)) if adapter else BASE
        prompt = demo.problem_of(language, *tasks[3]).prompt.rstrip()
        [ids] = generate(model, [tokenizer.encode(prompt)], [i], max_new_tokens=demo.NEW)
        text = prompt.split("\n")[-1 if adapter else 0] + tokenizer.decode(ids, continues=True)
        assert text.split("\n")[0].rstrip() in printed   # the task's line stands above all
    assert printed.count("does not pass its tests") == 4 and "tokens/s as one batch" in printed
    assert (folder / "figure.png").read_bytes().startswith(PNG)


def test_verdicts_are_those_of_the_tests(monkeypatch):
    needs("sh")
    task = toy_problems.make_tasks()[0][0]
    problem, solved = demo.problem_of("sh", *task), toy_problems.render("sh", *task, "")
    text = "\n" + solved["canonical_solution"] + "\n}\n\n# Add"
    assert demo.verdict(problem, text) == "passes its tests"
    told = problem.prompt.split("\n")[0].strip("# ")
    assert demo.shown(told, problem, text) == (
        'f() {\n    local x="$1"\n' + solved["canonical_solution"] + "\n}")
    assert demo.verdict(problem, "") == "does not pass its tests (failed)"

    def missing(language):
        raise BadInput("no bash")

    monkeypatch.setattr(demo, "interpreter_of", missing)
    assert demo.verdict(problem, "") == "not run: no bash here"


def test_programs_with_dollars_are_drawn_as_they_are(tmp_path):
    texts = dict.fromkeys(demo.ROWS, 'x=$(echo "$x" | rev)\n$x')
    demo.draw(str(tmp_path / "figure.png"), "Reverse.", texts, dict.fromkeys(demo.ROWS, "passes"))
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_arrows_start_and_end_at_the_boxes_and_do_not_meet(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(demo, "save_figure", lambda figure, file: figures.append(figure))
    demo.draw(str(tmp_path / "f.png"), "Reverse.", dict.fromkeys(demo.ROWS, "x"), dict.fromkeys(demo.ROWS, demo.PASSES))
    axis, = figures[0].axes
    boxed = [text for text in axis.texts if text.get_bbox_patch()]
    boxes = [text.get_bbox_patch().get_window_extent().transformed(axis.transData.inverted()) for text in boxed]
    arrows = [text for text in axis.texts if not text.get_text()]
    ends = [point for arrow in arrows for point in (arrow.xy, arrow.xyann)]
    assert len(arrows) == 8 and len(set(ends)) == 16
    for x, y in ends:
        assert any(min(abs(x - box.x0), abs(x - box.x1)) < 0.02 and box.y0 < y < box.y1 for box in boxes)
    assert any("4 requests, 3 adapters, one batch: 4 of 4 programs" in text.get_text() for text in axis.texts)


@pytest.mark.parametrize("flags, sentence", [
    (["--task", "48"], "--task 48: there are tasks 0 to 47"),
    ([], "javascript.safetensors: no such adapter; copy out/javascript/adapter.safetensors there "
         "after: python -m extras.toy_problems out/problems --more ")])
def test_what_cannot_be_shown_is_refused_in_a_sentence(flags, sentence, folder, monkeypatch, capsys):
    (folder / "adapters" / "javascript.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        run_script(demo.main, ["demo", *flags], monkeypatch)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err

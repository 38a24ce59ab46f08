"""The figures of the texts: redrawn from data, each with a finding, and nothing in it that only the code knows."""
import re

import pytest
from matplotlib.figure import Figure

from extras import figures, results, table1
from plumbing.figures import draw, tell_bars
from plumbing.names import full_name, model_name
from test_flora import run_script

CODE = re.compile(r"\b(flora|lora|ia3|hira|ffba|base|starcoder|starcoderbase|llama|cpp|cuda|cmake|pyi|pl|js|sh)\b(?! model)")
DRAWN_ELSEWHERE = {"figure1.png", "serve.png"}   # what a model writes, and a picture of a page


@pytest.fixture
def drawn(monkeypatch):
    """A list of the figures that are saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, f, **_: saved.append(figure) or f.write(b"x"))
    return saved


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_tells_its_finding_in_words_that_a_reader_knows(name, drawn, tmp_path):
    figures.redraw(name, tmp_path)
    figure, = drawn
    titles = [axis.get_title() for axis in figure.axes] + [figure.get_suptitle()]
    assert re.search(r"\d", " ".join(titles))
    for axis in figure.axes:
        assert re.search("(higher|lower) is better", axis.get_ylabel())
        assert axis.dataLim.height > 0.5 * axis.viewLim.height   # the axis is of what can be seen
    legends = [artist for axis in figure.axes for artist in [axis.get_legend()] if artist] + figure.legends
    entries = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    assert entries and all(0 < len(texts) <= 6 for texts in entries)
    ticks = [label.get_text() for axis in figure.axes for label in axis.get_xticklabels()]
    for text in [*titles, *sum(entries, []), *ticks]:
        assert not CODE.search(text), text


def test_every_figure_of_the_texts_is_one_that_can_be_drawn_anew(drawn, monkeypatch, capsys, tmp_path):
    kept = {file.name for file in (results.ROOT / "figures").glob("*.png")}
    assert kept == set(figures.FIGURES) | DRAWN_ELSEWHERE
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "figures").mkdir()
    run_script(figures.main, ["figures", "blend.png"], monkeypatch)
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["blend.png"]
    with pytest.raises(SystemExit):
        run_script(figures.main, ["figures", "serve.png"], monkeypatch)
    assert "serve.png: no figure that is drawn from data; use some of fig2_cpu.png," in capsys.readouterr().err


def test_the_finding_of_a_table_counts_who_is_ahead_and_by_more_than_the_spread(drawn, tmp_path):
    cells = {"flora-r1": [2.0, 2.0, 2.0], "lora-r1": [1.9, 1.99, 2.3], "ia3": [2.5, 1.5, 1.5]}
    table = {language: {"base": dict(mean=3.0)} | {
        method: dict(mean=means[i], spread=0.05) for method, means in cells.items()}
        for i, language in enumerate(["cpp", "pl", "xyz"])}
    table1.draw(str(tmp_path / "t.png"), table, *table1.SAVED)
    axis, = drawn[0].axes
    assert axis.get_title().startswith(
        "IA3 is the best of these in 2 of 3\nLoRA r1 is ahead of FLoRA r1 in 2 of 3 (beyond the spread in 1), "
        "behind it in 1 of 3 (beyond the spread in 1)\n")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["C++ headers", "Perl", "xyz"]
    many = {f"hira-r{i}": dict(mean=2.0, spread=0.1) for i in range(8)}
    table1.draw(str(tmp_path / "t.png"), {"cpp": {"base": dict(mean=3.0)} | many}, *table1.SAVED)
    assert len(drawn[1].axes[0].get_legend().get_texts()) == table1.MOST == 6
    assert drawn[1].axes[0].get_title().endswith("not shown: HiRA r6, HiRA r7")


def bench_rows(**more):
    return [dict(baseline=name, method=name.split("-")[0], rank=rank, mode="throughput", request_rate=None,
                 ratio_to_base=ratio, **{key: ratio + by for key, by in more.items()})
            for name, rank, ratio in [("base", None, 1.0), ("flora", 1, 0.9), ("flora", 8, 0.5),
                                      ("lora-token", 1, 0.8), ("lora-token", 8, 0.7)]]


def test_the_finding_of_bench_is_of_both_ends_and_its_bars_are_what_was_kept(drawn, tmp_path):
    result = dict(machine=dict(gpu=None, threads=2), model=dict(name="starcoder-cpu, random weights"), dtype="float32",
                  workload=dict(slots=8, ranks=[1, 8]), rows=bench_rows(),
                  eq7=dict(predicted=dict(inflection_rank=None), measured={"lora-token": 2.5}))
    draw(result, str(tmp_path / "b.png"))
    title = drawn[0].get_suptitle()
    assert title == (
        "FLoRA keeps 0.90 of the base model's speed at rank 1 and 0.50 at rank 8; LoRA, bmm per token, 0.80 and 0.70\n"
        "inflection rank by Eq. 7 none up to rank 8, measured 2.5\n"
        "a small StarCoder, random weights, float32, 2 threads of a CPU, 8 requests at once")
    assert not drawn[0].axes[0].collections   # no bars
    bars = bench_rows(ratio_to_base_low=-0.1, ratio_to_base_high=0.1)
    told = dict(result["eq7"], told_apart={"lora-token": [1, None]})
    draw(result | dict(rows=bars, eq7=told), str(tmp_path / "b.png"))
    assert drawn[1].axes[0].collections
    assert "(FLoRA is ahead up to rank 1)" in drawn[1].get_suptitle()
    assert tell_bars(bars) == "; bars: lowest and highest of the rounds"
    assert tell_bars([row | dict(decoding_step_seconds=0.1) for row in bars]) == "; bars: 95 % intervals"


@pytest.mark.parametrize("name, told", {
    "lora-token": "LoRA, bmm per token (the paper's)", "flora-r4": "FLoRA r4", "flora8:bfloat16": "FLoRA r8, bfloat16",
    "base:float32:compile": "base model, float32, compile", "pl": "Perl", "humaneval-rkt.jsonl": "Racket",
    "HumanEval.jsonl.gz": "HumanEval.jsonl.gz", "cs": "Czech", "somebody's": "somebody's"}.items())
def test_names_are_those_that_a_reader_knows(name, told):
    assert full_name(name) == told


def test_models_have_names_of_their_own():
    assert model_name("base") == "the embedded model" and model_name("mine") == "mine"
    assert model_name("starcoderbase-1b, random weights") == "StarCoderBase 1B's shape, random weights"

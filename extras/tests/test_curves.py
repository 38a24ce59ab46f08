"""The figure of train.py --plot."""
import json

import pytest

import train
from test_flora import run_script
from plumbing.tests.test_flags import (
    test_bad_input_is_one_sentence_and_exit_status_2 as check_bad_input)


def test_plot_draws_runs_as_png(tmp_path, monkeypatch):
    for name, adapter in (("a", "flora"), ("b", "ia3")):
        log = [dict(step=0, heldout_loss=5.0), dict(step=9, heldout_loss=4.0)]
        report = dict(adapter=adapter, rank=1, trainable_parameters=1234, log=log)
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    run_script(train.main, ["train.py", "--plot", tmp_path / "a.json", tmp_path / "b.json",
                            "--out", tmp_path / "runs.png"], monkeypatch)
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):   # not into a folder's name
        train.parse_args(["--plot", str(tmp_path / "a.json")])


@pytest.mark.parametrize("flags,sentence", [
    ("--plot {short}/a.h --out {empty}/a.png", "a.h: not readable as JSON"),
    ("--plot {short}/a.h --out {empty}", "--out"),
    ("--plot {short}/log.json --out {empty}/x.json", "x.json: this writes a PNG; choose a name that"),
    ("--plot {short}/log.json --out {short}/a.h", "a.h: holds something else than this writes")])
def test_bad_input_is_one_sentence_and_exit_status_2(
        flags, sentence, tiny_folder, embedded_adapters, tmp_path, monkeypatch, capsys):
    check_bad_input("train", flags, sentence, tiny_folder, embedded_adapters, tmp_path, monkeypatch,
                    capsys)

"""extras/table1.py: rates are tuned, trainings run once, the table tells mean and spread."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

import train
from extras import table1
from flora import BadInput
from test_flora import HEADERS, tiny_flags


def train_here(runs, jobs):
    """table1.train_all in this process, for speed."""
    return {folder: train.train(train.parse_args([*flags, "--out", folder]))
            for folder, flags in runs.items()}


def small_table(command, parse_args, tiny_folder, out, *flags):
    """Run table1.losses or toys.toys with little to do -> what it wrote."""
    command(parse_args([str(flag) for flag in (
        "--weights", tiny_folder, "--seeds", "0", "1", "--steps", "4", "--block-size", "32",
        "--eval-tokens", "500", "--out", out, "--png", out / "table.png", *flags)]))
    return json.loads((out / "table.json").read_text())


def test_losses_tunes_each_method_and_tells_mean_and_spread_of_real_runs(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table1, "train_all", train_here)
    result = small_table(
        table1.losses, table1.parse_args, tiny_folder, tmp_path,
        "--languages", f"util={Path(HEADERS).parent}:.h",
        f"core={Path(HEADERS).parents[1] / 'core'}:.h", "--methods", "flora-r1", "ia3-c_attn")
    for language in ("util", "core"):
        for method in ("flora-r1", "ia3-c_attn"):
            cell = result["table"][language][method]
            tried = {float(lr): bits for lr, bits in result["sweep"][method].items()}
            best = min(tried, key=tried.get)
            assert best not in (min(tried), max(tried))   # it has worse rates on both sides
            logs = [json.loads((tmp_path / language / method / seed / "log.json").read_text())
                    for seed in "01"]
            assert cell["seeds"] == [log["heldout_bpb_after"] for log in logs]
            assert {log["lr"] for log in logs} == {best}
            assert cell["mean"] == pytest.approx(np.mean(cell["seeds"]))
            one, two = cell["seeds"]
            assert cell["spread"] == pytest.approx(abs(one - two) / 2**0.5)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "| util | " in capsys.readouterr().out


def test_trainings_run_apart_keep_what_is_done_and_tell_which_one_failed(tiny_folder, tmp_path):
    flags = tiny_flags(tiny_folder, "")
    flags = [*flags[:flags.index("--out")], "--adapter", "lora"]
    folder, log = str(tmp_path / "run"), tmp_path / "run" / "log.json"
    first = table1.train_all({folder: flags}, 1)[folder]
    stamp = os.stat(log).st_mtime_ns
    assert table1.train_all({folder: flags}, 1)[folder] == first
    assert os.stat(log).st_mtime_ns == stamp
    with pytest.raises(BadInput, match="log.json was made with --lr 0.001, not 0.5; choose "
                       "another --out"):
        table1.train_all({folder: [*flags, "--lr", "0.5"]}, 1)
    with pytest.raises(BadInput, match="a training failed, see .*train.txt; its command: python "
                       "train.py"):
        table1.train_all({str(tmp_path / "bad"): [*flags, "--ext", ".nothing"]}, 1)
    assert "at least 2 are needed" in (tmp_path / "bad" / "train.txt").read_text()

"""extras/table1.py: rates are tuned, trainings run once, the table tells mean and spread."""
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import train
from extras import table1
from plumbing.files import BadInput
from plumbing.outputs import write_json
from plumbing.tests.started import Started
from test_flora import HEADERS, tiny_flags


def train_here(runs, jobs):
    """table1.train_all in this process and without samples, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_samples", lambda *args: None)
        return {folder: train.train(train.parse_args([*flags, "--out", folder]))
                for folder, flags in runs.items()}


def small_table(command, parse_args, tiny_folder, out, *flags):
    """Run table1.losses or toys.toys with little to do -> what it wrote."""
    command(parse_args([str(flag) for flag in (
        "--weights", tiny_folder, "--seeds", "0", "1", "--tune-seeds", "7", "8",
        "--steps", "4", "--block-size", "32",
        "--eval-tokens", "500", "--out", out, "--png", out / "table.png", *flags)]))
    return json.loads((out / "table.json").read_text())


def test_losses_tunes_each_method_and_tells_mean_and_spread_of_real_runs(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table1, "train_all", train_here)
    result = small_table(
        table1.losses, table1.parse_args, tiny_folder, tmp_path,
        "--languages", f"util={Path(HEADERS).parent}:.h",
        f"core={Path(HEADERS).parents[1] / 'core'}:.h", "--methods", "flora-r1", "ia3-c_attn")
    for method, tried in result["sweep"].items():   # a mean over both of --tune-seeds
        for rate, bits in tried.items():
            logs = [json.loads((tmp_path / "tune" / method / rate / seed / "log.json").read_text())
                    for seed in "78"]
            assert bits == pytest.approx(np.mean([log["heldout_bpb_after"] for log in logs]))
            assert [log["seed"] for log in logs] == [7, 8]
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
    assert "at least 1 is needed" in (tmp_path / "bad" / "train.txt").read_text()


def test_a_finished_cell_counts_by_the_contents_of_its_base_and_data(tiny_folder, tmp_path, capsys):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    for i, file in enumerate(sorted(Path(HEADERS).parent.glob("*.h"))[:12]):
        shutil.copy(file, data / f"{i}.h")
    shutil.copytree(tiny_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | dict(layer_norm_epsilon=0.01)))
    flags = ["--weights", str(tiny_folder), "--data", str(data), "--steps", "2",
             "--block-size", "16", "--eval-tokens", "300", "--lr", "0.001", "--adapter", "lora", "--rank", "2"]
    folder = str(tmp_path / "out" / "run")
    first = train_here({folder: flags}, 1)[folder]
    again = table1.train_all({folder: flags}, 1)[folder]
    assert again["log"] == first["log"] and again["adapter_file"] == first["adapter_file"]
    for more, sentence in [
            (["--weights", str(other)], "another base model"),
            (["--eval-tokens", "400"], "--eval-tokens 300, not 400"),
            (["--rank", "3"], "--rank 2, not 3"), (["--ext", ".hpp", ".cuh", ".h"], None)]:
        if sentence is None:   # other flags, but the same contents
            assert table1.train_all({folder: [*flags, *more]}, 1)[folder] == again
            continue
        told = f"log.json was made with {sentence}.*; choose another --out, or delete it"
        with pytest.raises(BadInput, match=told):
            table1.train_all({folder: [*flags, *more]}, 1)
    (data / "0.h").write_text("int changed;\n" * 50)
    with pytest.raises(BadInput, match="log.json was made with other data"):
        table1.train_all({folder: flags}, 1)
    log = json.loads(Path(folder, "log.json").read_text())
    del log["made_with"]   # as it was written before
    Path(folder, "log.json").write_text(json.dumps(log))
    assert table1.train_all({folder: flags}, 1)[folder]["log"] == first["log"]
    assert "1 trainings were written before there were fingerprints" in capsys.readouterr().err


def test_a_second_table_is_refused_and_trainings_end_with_their_parent(
        tiny_folder, tmp_path, run_here):
    command = ["extras.table1", "--weights", tiny_folder, "--languages",
               f"h={Path(HEADERS).parent}:.h", "--methods", "flora-r1", "--steps", "100000",
               "--out", tmp_path / "out", "--png", tmp_path / "t.png", "--block-size", "32", "--jobs", "2"]
    process = Started(*command)
    while not trainings_of(tmp_path) and process.poll() is None:
        time.sleep(0.05)
    second = run_here(*command)
    assert second.returncode == 2 and "another process is writing there" in second.stderr
    assert trainings_of(tmp_path)
    process.kill()
    process.communicate()
    deadline = time.time() + 60
    while trainings_of(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    assert not trainings_of(tmp_path)


def trainings_of(folder):
    """The process ids of train.py's runs under a folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", pid, "cmdline").read_text().split("\0")
        except OSError:
            continue
        is_training = any(word.endswith("train.py") for word in words)
        if is_training and any(str(folder) in word for word in words):
            found.append(pid)
    return found


def test_a_table_that_cannot_be_written_at_the_end_is_printed_and_the_other_file_written(
        run_here, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(table1, "draw", lambda *args: write_json("/dev/full", {}))
    args = table1.parse_args(["--out", str(tmp_path / "out"), "--png", str(tmp_path / "t.png")])
    table = {"cpp": {"base": table1.over_seeds([1.0]), "flora-r1": table1.over_seeds([0.5, 0.25])}}
    with pytest.raises(BadInput, match="/dev/full: cannot be written"), table1.outputs(args):
        table1.finish(args, table, {}, "title", None)
    assert json.loads((tmp_path / "out" / "table.json").read_text())["table"] == table
    for flag in ("--png", "--json"):
        run = run_here("extras.table1", "--out", tmp_path / "out", flag, tmp_path)
        assert run.returncode == 2 and f"{flag} {tmp_path}: is a folder" in run.stderr

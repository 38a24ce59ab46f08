"""Training beside PEFT: what can be tested without PEFT."""
import json
from types import SimpleNamespace

import pytest

from extras import peers_training
from extras.tests.conftest import PACKED
from plumbing.files import BadInput
from test_flora import TINY, run_script


@pytest.mark.parametrize("dtype", PACKED)
def test_all_rows_of_this_project_start_at_the_same_loss(dtype, monkeypatch, capsys):
    found = {}
    for row in peers_training.ROWS[1:]:
        monkeypatch.setattr("extras.fast.keep_memory", lambda: None)   # it holds for the process
        argv = ["peers_training", "--row", row, "--weights", TINY, "--dtype", dtype, "--steps", "1",
                "--batch-size", "2", "--block-size", "16", "--vocab", "300"]
        run_script(peers_training.main, argv, monkeypatch)
        found[row] = json.loads(capsys.readouterr().out)
    rows = [dict(name=row, dtype=dtype, **figures) for row, figures in found.items()]
    peers_training.check_losses(rows)
    with pytest.raises(BadInput, match="FLoRA, .*: its first loss is 9.9, .*do not train the same"):
        peers_training.check_losses([*rows, rows[1] | dict(name="FLoRA", first_loss=9.9)])


def test_the_table_compares_with_peft_in_the_same_round(tmp_path, monkeypatch, capsys):
    rates = iter(range(100, 10_000, 100))
    monkeypatch.setattr(peers_training, "measure", lambda *case: dict(
        tokens_per_second=next(rates), first_loss=8.0, peak_memory_bytes=2**30))
    file = tmp_path / "out.json"
    run_script(peers_training.main, ["peers_training", "--dtypes", "float32", "--repeats", "3",
                                     "--json", file], monkeypatch)
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == peers_training.ROWS
    assert rows[0]["tokens_per_second"] == 800 and rows[0]["ratio"] == 1
    assert rows[1]["tokens_per_second_max"] == 1600
    assert rows[1]["ratio"] == 900 / 800                 # of 2, 9 / 8 and 16 / 15 the median
    assert "| LoRA, float32 | 900 [200–1600] | 1.12 | 1024 MiB |" in capsys.readouterr().out


def test_without_peft_a_sentence_says_where_it_is_told_how_to_have_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(BadInput, match="peft is not installed; the top of extras/peers_training.py"):
        peers_training.peft_step(SimpleNamespace(weights="base"))


def test_tokens_that_the_model_does_not_have_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(peers_training.main, ["peers_training", "--weights", TINY], monkeypatch)
    assert "--vocab 4096: the model of" in capsys.readouterr().err

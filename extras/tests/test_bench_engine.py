"""extras/bench_engine.py: what it prints and writes, and which rows it refuses."""
import json

import pytest

from extras import bench_engine, results
from plumbing.files import BadInput
from test_flora import run_script


def test_every_row_is_run_and_its_parts_are_of_one_step(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_engine, "TOKENS", 24)
    rows = ["base:float32", "flora1:float32", "flora2:bfloat16", "lora1:int8", "base:int8-dynamic"]
    file = tmp_path / "engine.json"
    run_script(bench_engine.main, ["bench_engine", "--weights", str(tiny_folder), "--slots", "2", "--repeats", "2",
                                   "--rows", *rows, "--json", str(file)], monkeypatch)
    data = json.loads(file.read_text())
    assert [row["name"] for row in data["rows"]] == rows and data["rows"][0]["ratio"] == 1
    for row in data["rows"]:
        assert sum(row["parts"].values()) == pytest.approx(1) and row["parts"]["matmul"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["tokens_per_second_min"] <= row["tokens_per_second"] <= row["tokens_per_second_max"]
    assert results.engine(data) in capsys.readouterr().out


@pytest.mark.parametrize("text", ["base", "base1:float32", "flora:float32", "flora1:int4", "flora1:float32:fast"])
def test_a_row_that_is_none_is_refused(text):
    with pytest.raises(BadInput, match=f"--rows {text}: write base:FORM"):
        bench_engine.parse_row(text)

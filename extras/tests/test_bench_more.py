"""The modes and rows of bench.py that stand in extras/bench_more.py."""
import json
import sys

import pytest
import torch

import bench
import flora
from extras import bench_more
from extras.bench_rounds import in_turns
from model import GPT
from plumbing.files import BadInput
from plumbing.tests.conftest import served_folder  # noqa: F401
from plumbing.tests.test_figures import ROW_KEYS, check_bench_result
from plumbing.tests.test_flags import test_bench_refuses_what_it_cannot_run_in_a_sentence  # noqa: F401
from test_flora import (  # noqa: F401
    assert_lora_equals_its_definition, served_model,
    test_bench_does_not_time_variants_that_disagree)


@pytest.fixture(scope="module", params=["gpt_bigcode", "llama"])
def family(request):
    return request.param


@pytest.mark.parametrize("T", [1, 7])
def test_masked_lora_equals_the_dense_definition(T):
    """y_i = x_i (W0 + (alpha / r) B_i A_i), mixed ranks, the base among them, with and without gather."""
    torch.manual_seed(0)
    layer = flora.AdapterLinear(16, 24)
    layer.num_adapters, layer.add_lora = 3, bench_more.lora_masked
    for i, rank in [(1, 1), (3, 4)]:
        layer.adapters[str(i)] = flora.LoRA(rank, "c_fc", 16, 24)
        torch.nn.init.normal_(layer.adapters[str(i)].A)
    assert_lora_equals_its_definition(layer, T)


def test_bench_writes_table_json_and_figure_with_masked_lora_and_one_layer(served_folder, tmp_path, capsys, run_here):
    rows = ["ia3", "flora", "lora-token", "lora-example", "lora-masked"]
    run = run_here("bench.py", "--weights", served_folder, "--ranks", 1, 2, "--num-requests", 5, "--scale", 0.02,
                 "--mode", "throughput", "latency", "layer", "--layer-tokens", 1, 3, "--repeats", 1, "--slots", 2,
                 "--num-adapters", 3, "--request-rate", 500, "--rows", *rows, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "bench_cpu.json").read_text())
    methods = 2 + 2 * 4  # base and ia3; flora and three LoRAs at two ranks
    served = [row for row in result["rows"] if row["mode"] != "layer"]
    assert len(served) == 2 * methods and len(result["rows"]) == 4 * methods
    assert {row["baseline"] for row in served} == {"base", *rows}
    check_bench_result(result, run.stdout, tmp_path)
    for row in result["rows"]:
        assert f"{row['tokens_per_second']:.1f}" in run.stdout
    assert f"making W0 ∘ ΔW costs {result['materialise_cost']:.0f} rows" in run.stdout
    bench_more.draw_together(2 * [str(tmp_path / "out" / "bench_cpu.json")], str(tmp_path / "both.png"))
    printed = capsys.readouterr().out
    assert printed.count(served_folder.name) == 2 and "inflection rank, predicted" in printed
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.json").write_text('{"rows": []}')
    with pytest.raises(BadInput, match="--plot .*empty.json: holds no throughput of flora and lora-token"):
        bench_more.draw_together([str(tmp_path / "empty.json")], str(tmp_path / "both.png"))


def test_bench_of_one_layer_alone_draws_its_own_figure(served_folder, tmp_path, run_here):
    run = run_here("bench.py", "--weights", served_folder, "--ranks", 2, "--num-requests", 2, "--scale", 0.02,
                 "--mode", "layer", "--layer-tokens", 1, "--repeats", 1, "--slots", 2, "--num-adapters", 2,
                 "--rows", "ffba", "ffba-unfused", "flora-eq6", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "out" / "bench_cpu.json").read_text())["rows"]
    assert [row["baseline"] for row in rows] == ["base", "ffba", "ffba-unfused", "flora-eq6"]
    assert (tmp_path / "out" / "fig2_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_bench_compares_methods_at_equal_parameters_token_by_token(served_folder, tmp_path, run_here):
    run = run_here("bench.py", "--weights", served_folder, "--ranks", 4, "--mode", "token", "--token-length", 5,
                 "--num-requests", 2, "--scale", 0.02, "--repeats", 1, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = {row["baseline"]: row for row in json.loads((tmp_path / "out" / "bench_cpu.json").read_text())["rows"]}
    assert list(rows) == list(bench_more.TOKEN_ROWS)
    assert {row["mode"] for row in rows.values()} == {"token"} and all(row.keys() >= ROW_KEYS for row in rows.values())
    for name, row in rows.items():
        kind, targets, _, _ = bench_more.TOKEN_ROWS[name]
        if kind:
            unit = bench_more.parameters_of(GPT.from_pretrained(served_folder), kind, 1, targets)
            assert row["parameters"] == row["rank"] * unit
            assert abs(row["parameters"] - rows["lora"]["parameters"]) <= unit / 2
        assert f"{row['seconds_per_output_token_mean']:.6f}" in run.stdout


def test_rounds_compare_tokens_a_second_or_where_requests_arrive_their_seconds_a_token():
    found = {"base": dict(tokens_per_second=10.0, seconds_per_output_token_mean=0.1),
             "flora": dict(tokens_per_second=10.0, seconds_per_output_token_mean=0.2)}
    for rate, ratio in [(None, 1.0), (4.0, 0.5)]:
        variants = [("base", None), ("flora", 1)]
        rows = in_turns(bench.ROWS, variants, "latency", rate, 2, lambda variant: dict(found[variant[0]]),
                        dict.fromkeys(variants, 0.0))
        assert [row["ratio_to_base"] for row in rows] == [1.0, ratio]
        assert rows[1]["ratio_to_base_low"] == rows[1]["ratio_to_base_high"] == ratio


def test_datasets_that_cannot_be_used_are_refused_in_a_sentence(tmp_path):
    bad, few = tmp_path / "bad.json", tmp_path / "few.json"
    bad.write_text('[{"text": 1}]')
    few.write_text(json.dumps([{"conversations": [{"value": "word " * 50}, {"value": "answer " * 50}]}]))
    with pytest.raises(BadInput, match="no.json: cannot be read"):
        bench_more.dataset_prompts(tmp_path / "no.json", 1, 0, None)
    with pytest.raises(BadInput, match="bad.json: is not in ShareGPT's JSON format .*has no conversations"):
        bench_more.dataset_prompts(bad, 1, 0, None)
    with pytest.raises(BadInput, match="holds 1 conversations of 50 to 2,000 tokens, but --num-requests is 2"):
        bench_more.dataset_prompts(few, 2, 0, None)
    assert bench_more.dataset_prompts(few, 1, 0, None) == [(62, 87)]


def test_rows_that_neither_bench_nor_its_extra_has_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rows", "flora", "lora-maskt"])
    with pytest.raises(BadInput, match="--rows lora-maskt: unknown row; use some of base, .*, ffba-unfused"):
        bench.main()


def test_bench_does_not_time_rows_of_the_extra_that_disagree(family):
    fresh = served_model([], family)
    sets = bench.make_adapter_sets(fresh, [("lora", 2), ("flora", 2), ("ia3", 0.5), ("ffba", 2)], 2)
    rows = bench.ROWS | bench_more.ROWS
    bench.check_agreement(fresh, sets, torch.float32, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_more, "lora_masked", lambda y, x, layer_rows: y)
        with pytest.raises(RuntimeError, match="lora rank 2: masked differs from example"):
            bench.check_agreement(fresh, sets, torch.float32, rows)

"""What bench.py prints and writes."""
import json

import pytest

import bench
from generate import Engine
from model import GPT
from plumbing.workload import make_workload

ROW_KEYS = {"method", "baseline", "rank", "mode", "request_rate", "tokens_per_second",
            "ratio_to_base", "ratio_to_base_low", "ratio_to_base_high",
            "seconds_per_output_token_mean", "seconds_per_output_token_p50",
            "seconds_per_output_token_p99", "time_to_first_token_mean", "time_to_first_token_p99"}


def test_bench_writes_table_json_and_figure(served_folder, tmp_path, run_here):
    flags = ["--weights", served_folder, "--ranks", 1, 2, "--num-requests", 5, "--scale", 0.02,
             "--repeats", 1, "--slots", 2, "--num-adapters", 3, "--request-rate", 500]
    run = run_here("bench.py", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "bench_cpu.json").read_text())
    # two modes; base and ia3; FLoRA and two LoRAs at two ranks
    assert len(result["rows"]) == 2 * (2 + 2 * 3)
    assert {row["baseline"] for row in result["rows"]} == {
        "base", "ia3", "flora", "lora-example", "lora-token"}
    check_bench_result(result, run.stdout, tmp_path)
    steps = steps_of_an_engine(bench.parse_args(list(map(str, flags))))   # without the warm-up's
    assert all(row["steps"] == steps for row in result["rows"] if row["mode"] == "throughput")


def steps_of_an_engine(args):
    """How many steps an Engine takes to serve bench.py's workload."""
    model, steps = GPT.from_pretrained(args.weights), 0
    engine = Engine(model, slots=args.slots)
    for prompt, output in make_workload(args, model.config):
        engine.submit(prompt, max_new_tokens=output)
    while engine.busy:
        engine.step()
        steps += 1
    return steps


def check_bench_result(result, printed, folder):
    """What holds for every run of modes throughput and latency with a request rate of 500."""
    assert result.keys() >= {"machine", "model", "dtype", "workload", "limits", "rows", "eq7",
                             "free_rank"}
    served = [row for row in result["rows"] if row["mode"] != "layer"]
    assert all(row.keys() >= ROW_KEYS for row in served)
    assert {row["request_rate"] for row in served if row["mode"] == "latency"} == {500}
    assert all(row["ratio_to_base"] == 1 for row in served if row["method"] == "base")
    assert result["eq7"]["predicted"]["c1"] > 0 and "predicted inflection rank" in printed
    assert (folder / "out" / "fig2_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp"))
    for row in served:
        assert f"{row['tokens_per_second']:.1f}" in printed
    free, limits = result["free_rank"], result["limits"]
    balance = limits["matmul_gflop_s"] / limits["bandwidth_gb_s"] * 4 / 2   # float32
    assert free["balance"] == pytest.approx(balance)
    assert free["predicted"] == pytest.approx(balance / free["requests"])
    throughput = [row for row in served if row["mode"] == "throughput"]
    assert free["measured"]["flora"] == [
        row["rank"] for row in throughput
        if row["baseline"] == "flora" and row["ratio_to_base"] >= 0.97]
    assert f"free rank: {balance:.1f} rows" in printed


def test_bench_prints_and_draws_what_it_measured_when_the_results_cannot_be_written(
        served_folder, tmp_path, run_here):
    figure = tmp_path / "new" / "b.png"
    common = ["--weights", served_folder, "--ranks", 1, "--num-requests", 2, "--scale", 0.02,
              "--repeats", 1, "--slots", 2, "--num-adapters", 1, "--mode", "throughput",
              "--rows", "flora"]
    run = run_here("bench.py", *common, "--json", "/dev/full", "--png", figure)
    assert run.returncode == 2 and "/dev/full: cannot be written (No space left" in run.stderr
    assert "tokens/s" in run.stdout and figure.read_bytes().startswith(b"\x89PNG")
    for flag in ("--json", "--png"):
        run = run_here("bench.py", *common, flag, tmp_path, cwd=tmp_path)
        assert run.returncode == 2 and not run.stdout
        assert f"{flag} {tmp_path}: is a folder" in run.stderr

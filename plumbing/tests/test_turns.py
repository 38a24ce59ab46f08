"""bench.py measures in turns: with steps of stated times all is as computed by hand."""
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import flora
from generate import Engine
from plumbing import timing
from test_flora import served_model


def stated_run(arrivals, decoding, prompts=3.0, num_adapters=0):
    """A Lane after one run of three requests over two slots, whose steps take stated seconds."""
    engine = Engine(served_model([("flora", 1, None)] * 2), slots=2)
    lane = bench.Lane(engine, num_adapters)

    def timed(engine):
        waiting = len(engine.waiting)
        events = engine.step()
        return events, prompts if len(engine.waiting) < waiting else decoding

    bench.run_in_turns([lane], [([1], 2), ([1, 2], 3), ([3], 1)], arrivals, timed)
    return lane


def test_throughput_of_stated_steps_is_as_computed_by_hand():
    """Prompts of the first two, a step that ends the first, the prompt of the third with the ends
    of both others: 3 + 1 + 3 seconds, 6 new tokens."""
    lane = stated_run([0, 0, 0], decoding=1.0)
    assert lane.steps == [(3.0, True), (1.0, False), (3.0, True)] and lane.clock == 7
    found = lane.runs[0]
    assert found["tokens_per_second"] == pytest.approx(6 / 7)
    assert found["seconds_per_output_token_mean"] == pytest.approx((4 / 2 + 7 / 3 + 7) / 3)
    assert found["seconds_per_output_token_p50"] == pytest.approx(7 / 3)
    assert found["seconds_per_output_token_p99"] == pytest.approx(7 / 3 + 0.98 * (7 - 7 / 3))
    assert found["time_to_first_token_mean"] == pytest.approx((3 + 3 + 7) / 3)
    slower = stated_run([0, 0, 0], decoding=2.0)
    of_base = bench.ratio(lane.steps, slower.steps)
    assert of_base == pytest.approx((7 / 8, 0.5, 1))   # three steps: all decode, or none


def test_latency_of_stated_steps_runs_on_the_lanes_own_clock():
    """The first ends at 4; waiting for the second costs no time and counts for nothing; the third
    arrives within a step, and waits for its end."""
    lane = stated_run([0, 10, 10.5], decoding=1.0, num_adapters=2)
    assert lane.clock == 17 and [prompts for _, prompts in lane.steps] == [1, 0, 1, 1, 0]
    assert list(lane.times.values()) == [[0, 3, 4], [10, 13, 17], [10.5, 16, 16]]
    assert bench.seconds_per_token(lane) == pytest.approx([2, 7 / 3, 5.5])
    assert lane.runs[0]["tokens_per_second"] == pytest.approx(6 / 17)
    assert [request.adapter_id for request in lane.times] == [1, 2, 1]


def test_rows_take_turns_and_the_one_that_is_behind_goes_next():
    order, workload = [], [([1], 4), ([2], 4)]
    random.seed(0)
    lanes = [bench.Lane(Engine(served_model([]), slots=1)) for _ in range(2)]
    seconds = {lanes[0].engine: 1.0, lanes[1].engine: 2.5}

    def timed(engine):
        order.append(seconds[engine])
        return engine.step(), seconds[engine]

    bench.run_in_turns(lanes, workload, [0, 0], timed)
    turns = [order[i:i + 2] for i in range(0, 16, 2)]   # all at once: a step each, in any order
    assert all(sorted(turn) == [1.0, 2.5] for turn in turns)
    assert len(order) == 16 and [1.0, 2.5] in turns and [2.5, 1.0] in turns
    order.clear()
    bench.run_in_turns(lanes, workload, [0, 1], timed)
    assert order[:7] == [1.0, 2.5, 1.0, 1.0, 2.5, 1.0, 1.0]   # by the clocks: 1, 2.5, 2, 3, 5, ...


def test_a_row_is_paired_with_the_bases_own_steps_without_those_of_the_warm_up(monkeypatch):
    """Steps get longer; the row's take 1.25 times as long as the base's, but in the warm-up. Before
    that the base serves the workload alone, so that it is not the one to meet each shape first."""
    lanes = {variant: bench.Lane(Engine(served_model([("flora", 1, None)]), slots=2))
             for variant in [("base", None), ("flora", 1)]}
    slowness = dict(zip([lane.engine for lane in lanes.values()], [1.0, 1.25]))
    lane_of, taken = {lane.engine: lane for lane in lanes.values()}, dict.fromkeys(slowness, 0)
    for lane in lanes.values():
        lane.steps, lane.runs = [(100.0, True), (100.0, False)], [dict(tokens_per_second=9.0)]

    def timed(engine):
        longer = 1 + len(lane_of[engine].steps)
        taken[engine] += 1
        return engine.step(), longer * slowness[engine]

    args = SimpleNamespace(mode=["throughput"], repeats=2, max_batched_tokens=None)
    workload = [([1], 9), ([1, 2], 5), ([3], 7), ([4], 4)]
    monkeypatch.setattr(bench, "make_lanes", lambda _: (lanes, dict.fromkeys(lanes, 0.0)))
    monkeypatch.setattr(bench, "run_in_turns", partial(bench.run_in_turns, timed=timed))
    base, row = bench.bench_serving(SimpleNamespace(
        args=args, workload=workload, variants=[*lanes], rows=bench.ROWS, result={}))
    for key in ("ratio_to_base", "ratio_to_base_low", "ratio_to_base_high"):
        assert base[key] == pytest.approx(1) and row[key] == pytest.approx(0.8)
    assert base["steps"] == row["steps"] == taken[lanes["flora", 1].engine]
    assert taken[lanes["base", None].engine] == 1.5 * base["steps"]
    assert row["rounds"] == 2 and row["tokens_per_second"] < 9


def test_a_ratio_pairs_the_same_steps_and_single_slow_steps_count_for_little():
    base = [(1 + i % 7, i % 10 == 0) for i in range(200)]
    row = [(1.25 * seconds, prompts) for seconds, prompts in base]
    assert bench.ratio(base, row) == pytest.approx((0.8,) * 3)
    row[33] = (500, False)
    assert bench.ratio(base, row) == pytest.approx((0.8,) * 3)
    rng = np.random.default_rng(0)
    noisy = [(1.25 * s * rng.lognormal(0, 0.1), p) for s, p in base]
    found, low, high = bench.ratio(base, noisy)
    assert low < 0.8 < high and low < found < high and 0.01 < high - low < 0.06
    found, low, high = bench.ratio(base[:16], noisy[:16])   # few steps tell little, not all
    assert high - low > 0.03
    assert bench.ratio(base[1:], row[:-1])[2] > 0.9     # another step's base is seen


def test_a_ratio_that_changes_in_the_course_of_a_workload_is_no_uncertainty():
    """Half of the base's time at 0.9 of its speed, half at 0.7: 1 / (0.5 / 0.9 + 0.5 / 0.7)."""
    base = [(1.0, False)] * 1600
    row = [(1 / 0.9, False)] * 800 + [(1 / 0.7, False)] * 800
    found, low, high = bench.ratio(base, row)
    assert found == pytest.approx(0.7875)
    assert low < found < high < low + 0.02


def test_c1_and_c2_are_seconds_per_multiply_add(monkeypatch):
    """d = 32, k = 48: the two bmm of 5 x 2 tokens take 800 of them at rank 1, the matmul 15,360."""
    times = iter([3.0, 2.0])
    monkeypatch.setattr(bench, "seconds", lambda f, device: next(times))
    found = bench.predict_inflection(flora.AdapterLinear(32, 48), 5, 2, torch.device("cpu"),
                                     torch.float32)
    assert (found["c1"], found["c2"]) == pytest.approx((3 / 800, 2 / 15360))


def test_ranks_are_told_apart_by_the_intervals():
    ratios = [dict(against="lora-token", rank=rank, low=low, high=high)
              for rank, low, high in [(1, 1.01, 1.03), (2, 0.99, 1.02), (4, 0.9, 0.95)]]
    assert bench.told_apart(ratios, "lora-token") == (1, 4)
    assert bench.told_apart(ratios, "lora-example") == (0, float("inf"))


def test_a_step_that_one_thread_takes_faster_than_all_is_told_of(capsys):
    threads = torch.get_num_threads()
    assert timing.seconds_on_one_thread(torch.get_num_threads, torch.device("cuda")) is None
    torch.set_num_threads(2)
    try:
        used = []
        timing.seconds_on_one_thread(lambda: used.append(torch.get_num_threads()),
                                     torch.device("cpu"))
        assert set(used) == {1} and torch.get_num_threads() == 2
        timing.tell_of_threads(0.0100, 0.0021)
        assert "takes 10.0 ms on 2 threads and 2.1 on one" in capsys.readouterr().out
        timing.tell_of_threads(0.0017, 0.0021)
        timing.tell_of_threads(0.0017, None)
        assert capsys.readouterr().out == ""
    finally:
        torch.set_num_threads(threads)

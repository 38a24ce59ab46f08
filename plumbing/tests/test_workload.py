"""The requests that bench.py serves."""
from plumbing.workload import synthetic_lengths


def test_bench_lengths_follow_the_paper_and_the_seed():
    lengths = synthetic_lengths(4000, 0)
    assert all(50 <= p + n <= 2000 for p, n in lengths)
    assert abs(sum(p for p, _ in lengths) / 4000 - 161) < 10
    assert abs(sum(n for _, n in lengths) / 4000 - 338) < 15
    assert lengths[:100] == synthetic_lengths(100, 0) != synthetic_lengths(100, 1)

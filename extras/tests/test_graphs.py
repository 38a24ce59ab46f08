"""extras/graphs.py: a decoding step of all slots, as CUDA graphs and compiled code need it."""
import pytest
import torch

from extras.graphs import GraphEngine
from generate import Engine, new_engine
from test_flora import SERVED, check_served


@pytest.fixture(scope="module", params=["gpt_bigcode", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def served(family):
    return [*SERVED[family], ("ffba", 2, None)]


@pytest.mark.parametrize("engine", [Engine, GraphEngine])
@pytest.mark.parametrize("setting", [dict(slots=5), dict(slots=5, sync_every=4)], ids=str)
def test_each_request_returns_what_it_returns_alone(engine, model, expected, setting):
    """With FFBA beside the other kinds."""
    check_served(engine(model, **setting), expected)


def test_compile_asks_for_this_engine(model):
    assert type(new_engine(model, 3, compile=True, length=20)) is GraphEngine
    if model.wte.weight.device.type == "cpu":
        assert type(new_engine(model, 3, length=20)) is Engine


def test_the_step_may_be_compiled_for_every_cache_length(model, monkeypatch):
    """torch compiles a function for 8 shapes, and from then on none, without a word."""
    monkeypatch.setattr("extras.graphs.BLOCK", 4)
    with torch._dynamo.config.patch(recompile_limit=8):
        GraphEngine(model, 3, length=42, compile=True)
        assert torch._dynamo.config.recompile_limit == 8 + 11

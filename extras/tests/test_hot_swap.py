"""extras/hot_swap.py: adapters loaded and evicted between the steps of an engine."""
import pytest

import flora
from extras import hot_swap
from extras.graphs import GraphEngine
from generate import Engine
from plumbing.files import BadInput
from test_flora import plain, served_model, trained


@pytest.fixture(scope="module", params=["gpt_bigcode", "llama"])
def family(request):
    return request.param


@pytest.mark.parametrize("engine_class", [Engine, GraphEngine])
def test_adapters_come_and_go_between_steps(engine_class, family, tmp_path):
    """Loaded and evicted while others run, in place where they fit, and ids are used again."""
    model, donor = served_model(family=family), served_model(family=family)
    files = {}
    for kind, rank, targets in [("flora", 2, None), ("lora", 1, ["all"]), ("flora", 9, None)]:
        i = trained(donor, flora.add_adapter(donor, kind, rank, targets), seed=5)
        files[kind, rank] = str(tmp_path / f"{kind}{rank}.safetensors")
        flora.save_adapter(donor, i, files[kind, rank])
    engine = engine_class(model, slots=4)
    long = engine.submit([1, 2, 3], adapter_id=2, max_new_tokens=30)
    alone = plain(model, [1, 2, 3], 2, 30)
    engine.step()
    with pytest.raises(BadInput, match="adapter 2 is in use by a request"):
        hot_swap.remove_adapter(engine, 2)
    layer = next(layer for name, layer in flora.adapter_layers(model)   # that every kind adapts
                 if name.endswith(("c_attn", "v_proj")))
    for evicted, file, in_place in [
            (3, ("flora", 2), True), (1, ("lora", 1), True), (4, ("flora", 9), False)]:
        hot_swap.remove_adapter(engine, evicted)
        before = layer.frozen_bank.scale_A.data_ptr()
        assert engine.submit([5], adapter_id=evicted).error
        adapter_id = hot_swap.load_adapter(engine, files[file])
        assert adapter_id == evicted
        assert (layer.frozen_bank.scale_A.data_ptr() == before) == in_place
        request = engine.submit([7, 8], adapter_id=adapter_id, max_new_tokens=4)
        while request.state != "done":
            engine.step()
        reference = served_model([], family)
        flora.load_adapter(reference, files[file])
        assert request.ids == plain(reference, [7, 8], 1, 4)
    engine.run()
    assert long.ids == alone


def test_graphs_over_a_bank_are_dropped_when_it_is_replaced_and_kept_when_it_is_written(tmp_path):
    """What would be read by a CUDA graph, on any device: the bank's identity decides."""
    model = served_model([("flora", 2, None), ("flora", 1, None)])
    for rank in (2, 3):
        donor = served_model([("flora", rank, None)])
        flora.save_adapter(donor, 1, tmp_path / f"{rank}.safetensors")
    flora.freeze_bank(model)
    engine = GraphEngine(model, slots=2)
    engine.submit([1], adapter_id=1, max_new_tokens=9)
    engine.step()
    for rank, kept in [(2, True), (3, False)]:
        engine.graphs["a length"] = "a graph"
        hot_swap.remove_adapter(engine, 2)
        hot_swap.load_adapter(engine, tmp_path / f"{rank}.safetensors")
        assert ("a length" in engine.graphs) == kept

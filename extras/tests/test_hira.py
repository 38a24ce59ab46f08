"""HiRA, the proof of the seam: one file in extras/ and nothing else."""
import pytest
import torch

import flora
from extras.hira import flora_in_hira, flora_of_hira, hira_of_flora
from extras.tests.conftest import EXTRA_KINDS
from plumbing.tests.test_adapter_files import test_saved_adapters_load_equal_and_carry_their_metadata  # noqa: F401
from test_flora import (  # noqa: F401, run again here with the fixtures below
    engine_class, layer_with, random_adapter,
    test_a_request_that_is_not_finite_fails_alone_and_leaves_nothing_behind,
    test_every_kind_and_rank_starts_as_the_base_model_bit_for_bit,
    test_merging_gives_the_adapted_model, tiny_model)


@pytest.fixture
def kind():
    return "hira"


@pytest.fixture(params=EXTRA_KINDS["gpt_bigcode"][2:])
def adapter(request):
    return request.param


@pytest.mark.parametrize("path", ["expand", "materialise"])
@pytest.mark.parametrize("rank", [1, 4])
def test_hira_equals_dense_W0_times_1_plus_BA_forward_and_backward(rank, path):
    layer, adapter = layer_with("hira", rank)
    x = torch.randn(3, 7, 24, requires_grad=True)
    leaves = [x, adapter.A, adapter.B]
    dense = x @ (layer.weight.T * (1 + adapter.B @ adapter.A)) + layer.bias
    layer.path = path
    y = layer(x, flora.gather(layer, torch.ones(3, dtype=torch.int64)))
    assert (y - dense).abs().max() < 1e-5
    for got, want in zip(torch.autograd.grad(y.sin().sum(), leaves),
                         torch.autograd.grad(dense.sin().sum(), leaves)):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


def test_a_hira_is_a_flora_of_one_rank_more_and_the_other_way_round():
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
    for convert, (kind, other_kind) in [(flora_of_hira, ("hira", "flora")), (hira_of_flora, ("flora", "hira"))]:
        first, other = random_adapter(model, kind, 2), flora.add_adapter(model, other_kind, 3)
        ours = flora.adapters_of(model, other)
        for name, adapter in flora.adapters_of(model, first).items():
            A, Bt = convert(adapter.A.data, adapter.B.data)
            ours[name].A.data, ours[name].B.data = A, Bt.T
            if kind == "flora":
                back = flora_in_hira(A, Bt.T)
                assert torch.equal(back[0], adapter.A) and torch.equal(back[1].T, adapter.B)
            else:
                assert flora_in_hira(adapter.A, adapter.B) is None
        both = model(ids, torch.tensor([first, first])), model(ids, torch.tensor([other, other]))
        torch.testing.assert_close(*both, atol=1e-5, rtol=0)
        assert (both[0] - model(ids)).abs().max() > 0.1

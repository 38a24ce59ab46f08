"""HiRA, the proof of the seam: one file in extras/ and nothing else."""
import pytest
import torch

import flora
from extras.hira import HiRA
from extras.tests.conftest import EXTRA_KINDS
from test_flora import (  # noqa: F401, run again here with the fixtures below
    layer_with, random_adapter, test_every_kind_and_rank_starts_as_the_base_model_bit_for_bit,
    test_merging_gives_the_adapted_model, test_saved_adapters_load_equal_and_carry_their_metadata, tiny_model)


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
    y = layer(x, torch.ones(3, dtype=torch.int64), path=path)
    assert (y - dense).abs().max() < 1e-5
    for got, want in zip(torch.autograd.grad(y.sin().sum(), leaves),
                         torch.autograd.grad(dense.sin().sum(), leaves)):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


def test_a_hira_is_a_flora_of_one_rank_more_and_the_other_way_round():
    """1 + B A = [B, 1] [A; 1]: FLoRA's factors carry a 1/r."""
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
    hira, flora_id = random_adapter(model, "hira", 2), flora.add_adapter(model, "flora", 3)
    ours = flora.adapters_of(model, flora_id)
    for name, adapter in flora.adapters_of(model, hira).items():
        assert isinstance(adapter, HiRA)
        ours[name].A.data = 3 * torch.cat([adapter.A.data, torch.ones_like(adapter.A[:1])])
        ours[name].B.data = torch.cat([adapter.B.data, torch.ones_like(adapter.B[:, :1])], dim=1)
    both = model(ids, torch.tensor([hira, hira])), model(ids, torch.tensor([flora_id, flora_id]))
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    assert (both[0] - model(ids)).abs().max() > 0.1

"""Fused forward-backward adapters: their definition, fused and unfused, alone and beside every other kind."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import flora
from extras import hot_swap
from extras.graphs import GraphEngine
from extras.tests.conftest import EXTRA_KINDS
from flora import BASE
from generate import Engine
from model import GPT
from plumbing.files import BadInput
from plumbing.tests.test_adapter_files import test_saved_adapters_load_equal_and_carry_their_metadata  # noqa: F401
from test_flora import (  # noqa: F401, run again here with the fixtures below
    CONFIG, DEVICES, MIXED, check_prompts_in_one_batch, plain, random_adapter, random_model,
    save_embedded_adapters,
    test_a_batch_of_mixed_kinds_ranks_and_targets_equals_each_row_alone,
    test_a_request_that_is_not_finite_fails_alone_and_leaves_nothing_behind,
    test_every_kind_and_rank_starts_as_the_base_model_bit_for_bit,
    tiny_model)


@pytest.fixture
def kind():
    return "ffba"


@pytest.fixture(params=[Engine, GraphEngine])
def engine_class(request):
    return request.param


@pytest.fixture
def mixed():
    return MIXED["gpt_bigcode"] + EXTRA_KINDS["gpt_bigcode"]


@pytest.fixture(params=EXTRA_KINDS["gpt_bigcode"][:2])
def adapter(request):
    return request.param


FFBAS = [(3, None, "identity"), (2, ["mlp"], "block"), (5, ["attn"], "block"), (1, ["attn", "mlp"], "identity")]


def ffba_model(adapters=FFBAS):
    model = random_model(CONFIG)
    for rank, targets, activation in adapters:
        random_adapter(model, "ffba", rank, targets, activation=activation)
    return model.requires_grad_(False)


class MatmulCount(TorchDispatchMode):
    """Counts the matmuls that are launched, in whatever form; a fused attention is two."""
    NAMES = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_linear_pointwise"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        matmuls = 2 if name.startswith("_scaled_dot_product") else name in self.NAMES
        self.count = getattr(self, "count", 0) + matmuls
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["identity", "block"])
@pytest.mark.parametrize("rank", [1, 4])
def test_ffba_equals_its_definition_forward_and_backward(rank, activation, device):
    """y = f(x W1 + b1) W2 + b2 + (alpha / r) s(x B) A, on the pair of an MLP."""
    model = ffba_model([(rank, ["mlp"], activation)]).to(device)
    mlp = model.transformer.h[1].mlp
    B, A = mlp.c_fc.adapters["1"].B, mlp.c_proj.adapters["1"].A
    x = torch.randn(3, 7, 32, device=device, requires_grad=True)
    leaves = [x, A.requires_grad_(), B.requires_grad_()]
    hidden = F.gelu(x @ B, approximate="tanh") if activation == "block" else x @ B
    dense = mlp(x, None) + 8 / rank * hidden @ A
    y = mlp(x, flora.gather(mlp, torch.ones(3, dtype=torch.int64, device=device)))
    assert (y - dense).abs().max() < 1e-5 < 1e-2 < (y - mlp(x, None)).abs().max()
    for got, want in zip(torch.autograd.grad(y.sin().sum(), leaves),
                         torch.autograd.grad(dense.sin().sum(), leaves)):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_ffba_equals_unfused_and_each_row_of_a_mixed_batch_alone(dtype):
    """Packed or not, adapters per example or per token; alone: a model with that one adapter, unfused."""
    model, ids = ffba_model(), torch.randint(0, 300, (6, 9))
    random_adapter(model, "lora", 2)
    kinds = [("ffba", *adapter[:2], {"activation": adapter[2]}) for adapter in FFBAS] + [("lora", 2, None, {})]
    model = model.to(dtype)
    for name, p in model.named_parameters():
        p.data = p.data.float() if ".adapters." in name else p.data
    adapter_ids = torch.tensor([4, 2, 0, 1, 5, 3])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    unfused = model(ids, adapter_ids)
    for row, i in enumerate(adapter_ids.tolist()):
        alone = random_model(CONFIG).to(dtype)
        if i:
            flora.add_adapter(alone, *kinds[i - 1][:3], **kinds[i - 1][3])
            for mine, other in zip(flora.adapter_parameters(alone, 1).values(),
                                   flora.adapter_parameters(model, i).values()):
                mine.data = other.data
        one = alone(ids[row:row + 1], torch.tensor([min(i, 1)]))[0]
        assert (unfused[row] - one).abs().max() < tolerance * one.abs().max()
        assert i == 0 or (one - model(ids[row:row + 1])[0]).abs().max() > 0.05 * one.abs().max()
    flora.freeze_bank(model)
    assert all(bank.fused for bank in (layer.frozen_bank for _, layer in flora.adapter_layers(model)))
    for pack in (False, True):
        with torch.no_grad():
            model.pack() if pack else None
            for batch in (adapter_ids, adapter_ids[:, None].expand(6, 9)):
                assert (model(ids, batch) - unfused).abs().max() < tolerance * unfused.abs().max()
    with pytest.raises(IndexError):
        model(ids, torch.full((6,), 6))


@pytest.mark.parametrize("T", [1, 9])
def test_fused_ffba_launches_the_number_of_matmuls_of_the_base_model(T):
    model, ids = ffba_model(), torch.randint(0, 300, (5, T))
    adapter_ids, position = torch.tensor([4, 2, 0, 1, 3]), torch.full((5, 1), 9)

    def count(adapter_ids):
        cache = model.new_kv_cache(5, 12)
        with torch.no_grad(), MatmulCount() as mode:
            model(ids, adapter_ids, cache, position if T == 1 else None)
        return mode.count

    base, pairs = count(None), 2 * CONFIG.n_layer
    assert base > 4 * CONFIG.n_layer and count(adapter_ids) == base + 2 * pairs   # unfused: B and A of each pair
    flora.freeze_bank(model)
    assert count(adapter_ids) == count(flora.gather(model, adapter_ids)) == base
    model.pack()
    assert count(flora.gather(model, adapter_ids)) == count(None) == base


def test_ffba_adapters_come_and_go_in_place_while_others_run(tmp_path):
    """What fits the columns of the fused weights is written there, for packed copies too."""
    served, donor = ffba_model(), tiny_model()
    engine = Engine(served, slots=4)
    flora.freeze_bank(served)
    long = engine.submit([1, 2, 3], adapter_id=2, max_new_tokens=30)
    alone = plain(ffba_model(), [1, 2, 3], 2, 30)
    engine.step()
    fused = served.transformer.h[0].mlp.c_fc.frozen_bank.fused.weight
    for evicted, rank, targets, activation, in_place in [
            (1, 3, None, "block", True), (3, 2, ["mlp"], "identity", True), (1, 6, ["mlp"], "block", False)]:
        i = random_adapter(donor, "ffba", rank, targets, activation=activation)
        flora.save_adapter(donor, i, tmp_path / "a.safetensors")
        hot_swap.remove_adapter(engine, evicted)
        assert hot_swap.load_adapter(engine, tmp_path / "a.safetensors") == evicted
        assert (served.transformer.h[0].mlp.c_fc.frozen_bank.fused.weight is fused) == in_place
        request = engine.submit([7, 8], adapter_id=evicted, max_new_tokens=4)
        while request.state != "done":
            engine.step()
        assert request.ids == plain(donor, [7, 8], i, 4) != plain(donor, [7, 8], BASE, 4)
    engine.run()
    assert long.ids == alone


def test_merging_ffba_widens_the_mlp_or_is_refused_in_a_sentence(tmp_path):
    """With target mlp and the block's activation it is an ordinary model, with r hidden units more."""
    model, ids = ffba_model([(3, ["mlp"], "block")]), torch.randint(0, 300, (2, 9))
    wanted = model(ids, torch.tensor([1, 1]))
    flora.merge_adapter(model, 1)
    assert model.config.n_inner == CONFIG.n_inner + 3 and (model(ids) - wanted).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    assert (GPT.from_pretrained(tmp_path)(ids) - wanted).abs().max() < 1e-5
    for targets, activation in [(["mlp"], "identity"), (["attn"], "block"), (None, "block")]:
        model = ffba_model([(3, targets, activation)])
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(BadInput, match="an ffba adapter of .* cannot be merged, only one of StarCoder's target mlp and"):
            flora.merge_adapter(model, 1)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(BadInput, match='activation is .relu.; use "identity" or "block"'):
        flora.add_adapter(model, "ffba", activation="relu")


@pytest.mark.parametrize("kind,rank,targets,sentence", [
    ("ffba", 1, ["c_attn"], "unknown target 'c_attn'; use one of attn, mlp, or all"),
    ("ffba", 1, ["mlp", "mlp"], "adapt transformer.h.0.mlp.c_fc twice"),
    ("lora", 1, ["attn"], "unknown target 'attn'; use one of c_attn"),
])
def test_adapters_that_cannot_be_are_refused_in_a_sentence(kind, rank, targets, sentence):
    with pytest.raises(BadInput, match=sentence):
        flora.add_adapter(tiny_model(), kind, rank, targets)


def test_gradients_are_the_same_under_checkpointing_and_a_copy_has_pairs_of_its_own():
    model, ids = ffba_model(), torch.randint(0, 300, (5, 9))
    adapter_ids, twin = torch.tensor([4, 2, 0, 1, 3]), copy.deepcopy(model)
    grads = []
    for one, checkpointing in [(model, False), (model, True), (twin, True)]:
        one.gradient_checkpointing = checkpointing
        parameters = [p for i in range(1, 5) for p in flora.adapter_parameters(one, i).values()]
        for p in parameters:
            p.requires_grad_()
        grads.append(torch.autograd.grad(one(ids, adapter_ids).sin().sum(), parameters))
    for others in zip(*grads):
        assert all(torch.allclose(others[0], g, atol=1e-5) for g in others[1:])
    mlp, other = model.transformer.h[0].mlp, twin.transformer.h[0].mlp
    assert mlp.c_fc.pair is mlp.c_proj.pair is not other.c_fc.pair is other.c_proj.pair
    assert mlp.c_fc.pair is not model.transformer.h[1].mlp.c_fc.pair


def test_prompts_with_ffba_adapters_in_one_batch_give_the_tokens_of_each_alone(tmp_path, monkeypatch):
    """Through the command line, on the embedded model; a mixed batch of every kind is above."""
    files = save_embedded_adapters(tmp_path, [("ffba8", "ffba", 8, 0.1), ("ffba2", "ffba", 2, 0.1)])
    check_prompts_in_one_batch([files["ffba8"], "none", files["ffba2"]], tmp_path, monkeypatch)

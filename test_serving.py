"""What the engine and the benchmark promise. Tiny random models; every equality is against a plain run."""
import json
import os
import subprocess
import sys

import pytest
import torch

import flora
import generate
from flora import BASE, BadInput
from generate import Engine
from model import GPT, GPTConfig

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = [("flora", 1, None), ("lora", 2, None), ("ia3", 1, None), ("flora", 3, ["c_attn.qk"]),
         ("lora", 1, ["all"]), ("flora", 2, ["all"])]


def trained(model, adapter_id, seed=0):
    """Move an adapter away from the identity."""
    g = torch.Generator().manual_seed(seed + adapter_id)
    for p in flora.adapter_parameters(model, adapter_id).values():
        p.data += 0.5 * torch.randn(p.shape, generator=g)
    return adapter_id


def tiny_model(kinds=KINDS):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=128))
    for kind, rank, targets in kinds:
        trained(model, flora.add_adapter(model, kind, rank, targets))
    return model


def tiny_requests(n, adapters, seed=0):
    """[(prompt, settings)] of several lengths, adapters and limits."""
    g = torch.Generator().manual_seed(seed)
    def number(lo, hi):
        return int(torch.randint(lo, hi, (1,), generator=g))
    return [(torch.randint(0, 97, (number(1, 20),), generator=g).tolist(),
             dict(adapter_id=number(0, adapters + 1), max_new_tokens=number(1, 12), eos_id=number(0, 97),
                  temperature=(0.0, 0.8)[i % 3 == 2], top_k=20 * (i % 2), top_p=0.9, seed=i))
            for i in range(n)]


def plain(model, prompt, adapter_id=BASE, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, seed=0,
          eos_id=None):
    """The reference: one request, no cache, no batch, the whole text again for every token."""
    ids, g = list(prompt), torch.Generator().manual_seed(seed)
    u = torch.rand(max_new_tokens, generator=g)
    for i in range(max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.tensor([adapter_id]))[:, -1]
        settings = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])
        ids.append(int(generate.sample(logits, *settings, u[i:i + 1])))
        if ids[-1] == eos_id:
            break
    return ids[len(prompt):]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def expected(model):
    """40 requests and what each returns alone."""
    requests = tiny_requests(40, len(KINDS))
    return requests, [plain(model, prompt, **settings) for prompt, settings in requests]


@pytest.mark.parametrize("setting", [
    dict(slots=5), dict(slots=1), dict(slots=64), dict(slots=5, continuous=False),
    dict(slots=5, max_batched_tokens=30), dict(slots=5, sync_every=4), dict(slots=5, all_slots=True)],
    ids=str)
def test_each_request_returns_what_it_returns_alone(model, expected, setting):
    requests, alone = expected
    engine = Engine(model, **{k: v for k, v in setting.items() if k != "all_slots"})
    engine.fixed_shapes |= setting.get("all_slots", False)  # as for CUDA graphs
    submitted, arrivals = [], iter(requests)
    while engine.busy or len(submitted) < len(requests):
        for prompt, settings in [r for _, r in zip(range(2), arrivals)]:  # two arrive before each step
            submitted.append(engine.submit(prompt, **settings))
        engine.step()
        assert len(engine.running) <= engine.slots
    assert [r.ids for r in submitted] == alone
    assert all(r.state == "done" for r in submitted)


def test_thousand_requests_in_thousand_results_out_each_reported_once_in_order_of_arrival():
    model = tiny_model([("flora", 1, None)])
    engine = Engine(model, slots=32)
    requests = [engine.submit([i % 97], adapter_id=i % 2, max_new_tokens=1 + i % 3) for i in range(1000)]
    ended, tokens = [], 0
    while engine.busy:
        for request, ids in engine.step():
            tokens += len(ids)
            ended += [request] if request.state == "done" else []
    assert len(ended) == 1000 and set(ended) == set(requests)
    assert tokens == sum(len(r.ids) for r in requests) == sum(r.max_new_tokens for r in requests)
    first = [r.first_token for r in requests]
    assert first == sorted(first) and all(r.arrived <= r.first_token <= r.ended for r in requests)


def test_a_cancelled_a_failing_and_a_too_long_request_disturb_no_other(model, expected):
    requests, alone = expected
    requests = [(p, s | dict(eos_id=None)) for p, s in requests[:8]]
    alone = [plain(model, p, **s) for p, s in requests]
    def broken(ids):
        raise KeyError("mine")
    engine = Engine(model, slots=4)
    submitted = [engine.submit(prompt, **settings) for prompt, settings in requests[:4]]
    too_long = engine.submit([1] * 65, max_new_tokens=5)
    unknown = engine.submit([1], adapter_id=77)
    nonsense = engine.submit([97])
    failing = engine.submit([1, 2, 3], max_new_tokens=9, stopped=broken)
    running = engine.submit([4, 5], adapter_id=1, max_new_tokens=50)
    waiting = engine.submit([6], max_new_tokens=5)
    submitted += [engine.submit(prompt, **settings) for prompt, settings in requests[4:]]
    engine.cancel(waiting)
    while engine.busy:
        engine.step()
        if len(running.ids) == 3:
            engine.cancel(running)
    assert [r.ids for r in submitted] == alone
    assert [r.state for r in (running, waiting, failing, too_long)] == ["cancelled"] * 2 + ["failed"] * 2
    assert len(running.ids) == 3 and waiting.ids == []
    assert "65 tokens, more than the model's context of 64 (n_positions); shorten it" in too_long.error
    assert unknown.error == "the model has no adapter 77; load it first"
    assert "outside 0 to 96" in nonsense.error and "stopped() raised KeyError" in failing.error


def test_a_request_ends_at_the_end_of_the_context(model):
    engine = Engine(model, slots=2)
    full, almost = engine.submit([1] * 64), engine.submit([1] * 62, adapter_id=1, max_new_tokens=9)
    engine.run()
    assert (full.state, full.ids, almost.state, len(almost.ids)) == ("done", [], "done", 2)


def test_adapters_come_and_go_between_steps(tmp_path):
    """Loaded and evicted while others run, in place where they fit, and ids are used again."""
    model, donor = tiny_model(), tiny_model()
    files = {}
    for kind, rank, targets in [("flora", 2, None), ("lora", 1, ["all"]), ("flora", 9, None)]:
        i = trained(donor, flora.add_adapter(donor, kind, rank, targets), seed=5)
        files[kind, rank] = str(tmp_path / f"{kind}{rank}.safetensors")
        flora.save_adapter(donor, i, files[kind, rank])
    engine = Engine(model, slots=4)
    long = engine.submit([1, 2, 3], adapter_id=2, max_new_tokens=30)
    alone = plain(model, [1, 2, 3], 2, 30)
    engine.step()
    with pytest.raises(BadInput, match="adapter 2 is in use by a request"):
        engine.remove_adapter(2)
    layer = model.transformer.h[0].attn.c_attn
    for evicted, file, in_place in [(3, ("flora", 2), True), (1, ("lora", 1), True), (4, ("flora", 9), False)]:
        engine.remove_adapter(evicted)
        before = layer.frozen_bank.scale_A.data_ptr()
        assert engine.submit([5], adapter_id=evicted).error
        adapter_id = engine.load_adapter(files[file])
        assert adapter_id == evicted
        assert (layer.frozen_bank.scale_A.data_ptr() == before) == in_place
        request = engine.submit([7, 8], adapter_id=adapter_id, max_new_tokens=4)
        while request.state != "done":
            engine.step()
        reference = tiny_model([])
        flora.load_adapter(reference, files[file])
        assert request.ids == plain(reference, [7, 8], 1, 4)
    engine.run()
    assert long.ids == alone


def test_generate_equals_the_plain_loop(model, expected):
    requests, _ = expected
    prompts, adapter_ids = [p for p, _ in requests[:9]], [s["adapter_id"] for _, s in requests[:9]]
    settings = dict(max_new_tokens=7, temperature=0.7, top_k=30, top_p=0.9)
    got = generate.generate(model, prompts, adapter_ids, seed=3, **settings)
    assert got == [plain(model, p, a, seed=3 + row, **settings)
                   for row, (p, a) in enumerate(zip(prompts, adapter_ids))]


def test_packed_weights_follow_the_weights_and_never_touch_gradients(model):
    model = tiny_model([("flora", 2, None)])
    prompt, before = [3, 1, 4], None
    model.pack()
    for _ in range(2):
        assert generate.generate(model, [prompt], max_new_tokens=8)[0] == plain(model, prompt, max_new_tokens=8)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.mul_(-1)
            model.transformer.wte.weight.add_(torch.randn(97, 64))
    model(torch.tensor([prompt]), torch.tensor([1])).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in flora.adapter_parameters(model, 1).values())


@pytest.mark.parametrize("path", ["example", "token", "masked"])
@pytest.mark.parametrize("T", [1, 7])
def test_lora_variants_equal_the_dense_definition(path, T):
    """y_i = x_i (W0 + (alpha / r) B_i A_i), mixed ranks, the base among them, with and without gather."""
    torch.manual_seed(0)
    layer = flora.AdapterLinear(16, 24)
    layer.num_adapters, layer.lora_path = 3, path
    for i, rank in [(1, 1), (3, 4)]:
        layer.adapters[str(i)] = flora.Adapter("lora", rank, "c_fc", 16, 24)
        torch.nn.init.normal_(layer.adapters[str(i)].A)
    x, ids = torch.randn(5, T, 16), torch.tensor([3, 0, 1, 2, 3])
    with torch.no_grad():
        W = [layer.weight.T + (8 / a.rank * a.B @ a.A if a else 0)
             for a in (layer.adapters[str(i)] if str(i) in layer.adapters else None for i in range(4))]
        dense = torch.stack([x[row] @ W[i] for row, i in enumerate(ids.tolist())]) + layer.bias
        torch.testing.assert_close(layer(x, ids), dense)
        torch.testing.assert_close(layer(x, ids[:, None].expand(5, T)), dense)
        if T == 1:
            torch.testing.assert_close(layer(x, {layer: layer.gather(ids)}), dense)

"""extras/blend.py: weighted sets of adapters, against dense weights that are computed here."""
import json
import math

import pytest
import torch

import flora
from extras import blend_losses
from extras.blend import blend, parse
from flora import BASE
from generate import Engine, generate, load_adapters
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED
from plumbing.tokenizer import Tokenizer
from plumbing.tests.conftest import write_jsonl
from test_flora import layer_with, plain, random_adapter, run_script, tiny_model

KINDS = ["flora", "lora", "ia3", "hira"]
COLUMNS = [None, (0, 24), (6, 30)]   # of 36: all, a beginning, a middle


def dense(adapter, layer):
    """W [d, k] and bias [k] of one adapter, from its definition."""
    lo, hi = adapter.columns
    W, bias = layer.weight.detach().T.clone(), layer.bias.detach().clone()
    W0 = W[:, lo:hi].clone()
    if adapter.kind == "flora":
        W[:, lo:hi] = W0 * (adapter.B @ adapter.A) / adapter.rank
    elif adapter.kind == "hira":
        W[:, lo:hi] = W0 * (1 + adapter.B @ adapter.A)
    elif adapter.kind == "lora":
        W[:, lo:hi] = W0 + adapter.alpha / adapter.rank * adapter.B @ adapter.A
    else:
        W[:, lo:hi], bias[lo:hi] = W0 * adapter.l, bias[lo:hi] * adapter.l
    return W.detach(), bias.detach()


def layer_of_all():
    """One layer with an adapter of every kind and every choice of columns, ids from 1, in a model's place."""
    layer, _ = layer_with("flora", 1)
    for kind in KINDS:
        for columns in COLUMNS:
            i = layer.num_adapters = layer.num_adapters + 1
            _, layer.adapters[str(i)] = layer_with(kind, 1 if kind == "ia3" else i % 3 + 1, columns)
    return torch.nn.ModuleDict({"c_attn": layer}), layer


@pytest.mark.parametrize("path", ["expand", "materialise"])
@pytest.mark.parametrize("seed", range(4))
def test_a_blend_equals_the_dense_sum_of_what_its_parts_change(path, seed):
    """Every kind, rank and choice of columns: two to four of them, with weights of either sign."""
    model, layer = layer_of_all()
    torch.manual_seed(seed)
    x = torch.randn(5, 7, 24)
    ids, wanted = [], []
    for parts in [(1, 4, 7, 10), (2, 6), (3, 8, 11), (5, 5 + 7), (9, 10, 2)]:
        weights = dict(zip(parts, torch.randn(len(parts)).tolist()))
        ids.append(blend(model, weights))
        W, bias = layer.weight.T.clone(), layer.bias.clone()
        for i, weight in weights.items():
            its_W, its_bias = dense(layer.adapters[str(i)], layer)
            W, bias = W + weight * (its_W - layer.weight.T), bias + weight * (its_bias - layer.bias)
        wanted.append(x[len(wanted)] @ W + bias)
    layer.path = path
    y = layer(x, flora.gather(layer, torch.tensor(ids)))
    torch.testing.assert_close(y, torch.stack(wanted), atol=2e-5, rtol=1e-5)
    assert (y - layer(x)).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("kind, rank, targets", [
    ("flora", 1, None), ("flora", 3, ["all"]), ("flora", 2, ["c_attn.k"]), ("lora", 2, ["all"]), ("ia3", 1, None),
    ("hira", 2, ["all"])])
def test_weight_0_is_the_base_and_weight_1_the_adapter_bit_for_bit(kind, rank, targets):
    model, ids = tiny_model(), torch.randint(0, 300, (1, 9))
    i, other = random_adapter(model, kind, rank, targets), random_adapter(model, "flora", 4, ["all"])
    for same, weights in [(BASE, {i: 0.0}), (BASE, {i: 0, other: 0.0}), (i, {i: 1.0}), (i, {other: 0, i: 1}),
                          (i, {BASE: 0.5, i: 1})]:
        new = blend(model, weights)
        assert torch.equal(*(model(ids, torch.tensor([a])) for a in (new, same))), weights
    assert blend(model, {BASE: 3.0}) == BASE
    assert not torch.equal(*(model(ids, torch.tensor([a])) for a in (i, BASE)))
    for p in flora.adapter_parameters(model, i).values():
        p.data[:] = float("nan")   # 0 of what diverged is 0 as well
    assert torch.equal(*(model(ids, torch.tensor([a])) for a in (blend(model, {i: 0}), BASE)))


def test_a_batch_of_adapters_blends_and_the_base_equals_each_request_alone():
    model = tiny_model()
    a, b, c = (random_adapter(model, *how) for how in [
        ("flora", 2, ["all"]), ("lora", 3, ["c_attn.qk"]), ("ia3", 1, None)])
    ids = [BASE, a, b, c, blend(model, {a: 0.5, b: 0.5}), blend(model, {a: 0.3, b: -0.7, c: 1.4}), blend(model, {c: 2})]
    ids.append(blend(model, {ids[4]: 0.5, a: 0.5}))   # a blend may be a part
    prompts = [[5 + n] * (n + 1) for n in range(len(ids))]
    alone = [plain(model, prompt, i, 12) for prompt, i in zip(prompts, ids)]
    assert len(set(map(tuple, alone))) >= len(ids) - 1
    flora.freeze_bank(model)
    engine = Engine(model, slots=5)
    requests = [engine.submit(prompt, adapter_id=i, max_new_tokens=12) for prompt, i in zip(prompts, ids)]
    engine.run()
    assert [r.ids for r in requests] == alone
    flora.remove_adapter(model, b)   # blends keep the parts that they were made of
    assert plain(model, prompts[4], ids[4], 12) == alone[4]


def test_a_merged_blend_is_the_blend():
    model, ids = tiny_model(), torch.randint(0, 300, (1, 9))
    i = blend(model, {random_adapter(model, kind, 2, targets): 0.6 for kind, targets in [
        ("flora", ["all"]), ("lora", ["c_attn.qk"]), ("ia3", None)]})
    before = model(ids, torch.tensor([i]))
    flora.merge_adapter(model, i)
    torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("parts, kind, rank", [
    ([("flora", 2, ["all"]), ("flora", 1, ["c_attn"])], "flora", 4),
    ([("flora", 2, ["c_attn.k"])], "flora", 3),
    ([("flora", 2, ["c_attn.qk"]), ("hira", 1, ["c_attn.qk", "c_fc"])], "flora", 5),
    ([("flora", 1, ["c_attn.k"]), ("flora", 2, ["c_attn"])], "flora", 5),
    ([("lora", 2, ["all"]), ("lora", 3, None)], "lora", 5)])
def test_a_blend_that_one_kind_can_hold_is_saved_as_that_kind(parts, kind, rank, tmp_path):
    model, ids = tiny_model(), torch.randint(0, 300, (1, 9))
    i = blend(model, {random_adapter(model, *part): 0.4 + 0.5 * n for n, part in enumerate(parts)})
    want = model(ids, torch.tensor([i]))
    flora.save_adapter(model, i, tmp_path / "blend.safetensors")
    j = flora.load_adapter(model, tmp_path / "blend.safetensors")
    assert {(a.kind, a.rank) for a in flora.adapters_of(model, j).values()} == {(kind, rank)}
    torch.testing.assert_close(model(ids, torch.tensor([j])), want, atol=1e-5, rtol=0)
    assert (want - model(ids)).abs().max() > 0.1


def test_what_cannot_be_blended_or_saved_is_refused_in_a_sentence(tmp_path):
    model = tiny_model()
    a, b, c, d = (random_adapter(model, *how) for how in [
        ("flora", 2, None), ("lora", 2, None), ("ia3", 1, None), ("ffba", 1, None)])
    for weights, sentence in [
            ({a: 0.5, d: 0.5}, "kind ffba, which is no sum of components"), ({a: float("nan")}, "use a number from"),
            ({a: float("inf")}, "use a number from"), ({a: True}, "use a number from"), ({a: "1"}, "use a number"),
            ({a: 101}, "use a number from -100 to 100"), ({77: 1}, "no adapter 77")]:
        before = [len(layer.adapters) for _, layer in flora.adapter_layers(model)]
        with pytest.raises(BadInput, match=sentence):
            blend(model, weights)
        assert before == [len(layer.adapters) for _, layer in flora.adapter_layers(model)]
    file = tmp_path / "blend.safetensors"
    for weights, why in [({a: 0.5, b: 0.5}, "it multiplies and adds"), ({c: 0.5}, "it changes biases"),
                         ({a: 0.0}, "it changes nothing")]:
        with pytest.raises(BadInput, match=f"not this one: {why}"):
            flora.save_adapter(model, blend(model, weights), file)
        assert not file.exists()


@pytest.mark.parametrize("text, weights", [
    ("a*0.7 + b*0.3", {"a": 0.7, "b": 0.3}), ("a*0.7+b*.3", {"a": 0.7, "b": 0.3}),
    ("c++*1e-1 + b*-2", {"c++": 0.1, "b": -2}),
    ("dir/a*b.safetensors * 2.", {"dir/a*b.safetensors": 2}), ("a*0.5 + a*0.25", {"a": 0.75})])
def test_blends_are_written_as_files_times_weights(text, weights):
    assert parse(text) == weights


@pytest.mark.parametrize("text", [
    "a + b", "a*", "a*x", "*0.5", "a*0.5 +", "+", "a*nan", "c++.safetensors"])
def test_what_is_no_blend_is_refused(text):
    with pytest.raises(BadInput, match="write FILE.WEIGHT"):
        parse(text)


def test_files_of_blends_are_loaded_once_and_a_file_may_be_named_like_a_blend(tmp_path):
    model, files = tiny_model(), [str(tmp_path / name) for name in ("a", "b", "a*0.5")]
    for file in files:
        flora.save_adapter(model, random_adapter(model, "flora"), file)
    model = tiny_model()
    names = [files[0], f"{files[0]}*0.5 + {files[1]}*0.25", f"{files[1]}*0.5+{files[0]}*0.5", files[2]]
    loaded = load_adapters(model, names)
    assert sorted(loaded.values()) == [0, 1, 2, 3, 4, 5] and len(set(loaded)) == 6
    kinds = [{a.kind for a in flora.adapters_of(model, loaded[name]).values()} for name in names]
    assert kinds == [{"flora"}, {"blend"}, {"blend"}, {"flora"}]


PERL, CPP = (f"{EMBEDDED}/adapters/{name}.safetensors" for name in ("perl", "cpp"))


def test_generate_and_requests_serve_blends_of_files(tmp_path, run_here):
    """Of the shipped adapters, by either command: the tokens that Python gives."""
    model, tokenizer = GPT.from_pretrained(EMBEDDED), Tokenizer(EMBEDDED)
    perl, cpp = flora.load_adapter(model, PERL), flora.load_adapter(model, CPP)
    ids = [blend(model, {perl: 0.3, cpp: 0.7}), perl, BASE]
    prompt = "sub f {\n"
    want = generate(model, [tokenizer.encode(prompt)] * 3, ids, eos_id=tokenizer.eos_ids, max_new_tokens=12)
    assert want[0] != want[1]
    names = [f"{PERL}*0.3 + {CPP}*0.7", PERL, "none"]
    flags = [flag for name in names for flag in ("--adapter", name)]
    run = run_here("generate.py", "--prompt", prompt, "--max-new-tokens", 12, "--json", tmp_path / "out.json", *flags)
    assert run.returncode == 0, run.stderr
    assert [row["tokens"] for row in json.loads((tmp_path / "out.json").read_text())] == want

    lines = [dict(prompt=prompt, adapter=adapter) for adapter in ({PERL: 0.3, CPP: 0.7}, names[0], PERL)]
    lines += [dict(prompt=prompt, adapter={PERL: 1e3}), dict(prompt=prompt, adapter={PERL: "1"})]
    requests, results = write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = ["generate.py", "--requests", requests, "--results", results, "--max-new-tokens", 12]
    run = run_here(*command)
    assert run.returncode == 0, run.stderr
    got = {r["line"]: r for r in map(json.loads, results.read_text().splitlines())}
    assert [got[line]["tokens"] for line in (1, 2, 3)] == [want[0], want[0], want[1]]
    assert "from -100 to 100" in got[4]["error"] and "no object of files and weights" in got[5]["error"]
    assert got[1]["made_with"]["adapter_file"] == got[2]["made_with"]["adapter_file"]
    assert "5 requests" not in run_here(*command).stderr   # those that are done are kept
    run = run_here("generate.py", "--prompt", prompt, "--adapter", f"{PERL} + {CPP}")
    assert run.returncode == 2 and "no such adapter file, and no blend" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_losses_of_blends_are_those_of_their_parts_at_the_ends(tmp_path, monkeypatch):
    """blend_losses.py on two short texts: the corners of its grid are base, Perl and C++ alone."""
    texts = {"perl": ["sub f { return $_[0] + 1; }\n" * 4], "cpp": ["namespace at { struct Tensor; }\n" * 4]}
    monkeypatch.setattr(blend_losses, "heldout_texts", lambda: texts)
    monkeypatch.setattr(blend_losses, "WEIGHTS", [0.0, 1.0])
    flags = ["--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")]
    run_script(blend_losses.main, ["blend_losses", *flags], monkeypatch)
    rows = {(row["perl"], row["cpp"]): row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    model, tokenizer = GPT.from_pretrained(EMBEDDED), Tokenizer(EMBEDDED)
    ids = {(0, 0): BASE, (1, 0): flora.load_adapter(model, PERL), (0, 1): flora.load_adapter(model, CPP)}
    assert len(rows) == 4 and (tmp_path / "b.png").exists()
    for corner, i in ids.items():
        for language, (text,) in texts.items():
            tokens = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
            logits = model(tokens[:, :-1], torch.tensor([i])).log_softmax(-1)
            nats = -logits.gather(-1, tokens[:, 1:, None]).sum().item()
            assert abs(rows[corner][f"{language}_bpb"] - nats / len(text.encode()) / math.log(2)) < 1e-4

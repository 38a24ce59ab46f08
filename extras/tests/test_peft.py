"""PEFT's folders, against golden values of PEFT 0.21 that fixtures/make_golden.py made.

Also folders of merged models.
"""
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import flora
from extras.peft import save_peft
from generate import Engine, generate
from model import GPT
from plumbing.files import BadInput
from plumbing.tokenizer import Tokenizer
from test_flora import FIXTURES, TINY, assert_close, random_adapter, tiny_model


def assert_within_1e_5(ours, theirs):
    """Of the largest logit."""
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.fixture(params=["", "_llama", "_llama3"])
def name(request):
    return request.param


PEFT_CONFIG = {
    "lora": dict(peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=8, bias="none",
                 lora_dropout=0.1, use_dora=False, modules_to_save=None, rank_pattern={},
                 qalora_group_size=16),
    "ia3": dict(peft_type="IA3", task_type="CAUSAL_LM", init_ia3_weights=True),
    "hira": dict(peft_type="HIRA", task_type="CAUSAL_LM", r=2, hira_dropout=0.1,
                 init_weights="gaussian", fan_in_fan_out=False, modules_to_save=None,
                 rank_pattern={})}
PEFT_MODULES = {  # PEFT's defaults, by family
    "lora": [["c_attn"], ["q_proj", "v_proj"]],
    "hira": [["c_attn"], ["q_proj", "v_proj"]],
    "ia3": [["mlp.c_proj", "c_attn"], ["down_proj", "k_proj", "v_proj"]]}


def peft_config(kind, keys):
    """What PEFT wrote beside the tensors of these names."""
    modules = PEFT_MODULES[kind]["self_attn" in "".join(keys)]
    config = PEFT_CONFIG[kind] | dict(target_modules=modules)
    if kind == "ia3":
        config["feedforward_modules"] = modules[:1]
    return config


def peft_folder(folder, kind, golden, prefix=None, **changes):
    """The PEFT adapter in `golden` as a folder of PEFT's. changes: of its adapter_config.json."""
    folder.mkdir(exist_ok=True)
    prefix = f"{prefix or kind}:"
    tensors = {key.removeprefix(prefix): t for key, t in golden.items() if key.startswith(prefix)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(kind, tensors) | changes))
    return folder


@pytest.mark.parametrize("kind", ["lora", "ia3", "hira"])
def test_adapter_equals_peft(tiny, golden, kind, tmp_path):
    ids, theirs = golden["ids"], golden[f"{kind}_logits"]
    shown = theirs.shape[1]
    assert (theirs - golden["logits"][:, -shown:]).abs().max() > 1  # the adapter is no identity
    adapter_id = flora.load_adapter(tiny, peft_folder(tmp_path / kind, kind, golden))
    per_example = torch.full((len(ids),), adapter_id)
    for path in ("expand", "materialise"):
        for _, layer in flora.adapter_layers(tiny):
            layer.path = path
        assert_close(tiny(ids, per_example)[:, -shown:], theirs)
        assert_close(tiny(ids, per_example[:, None].expand_as(ids))[:, -shown:], theirs)
    flora.merge_adapter(tiny, adapter_id)
    assert_close(tiny(ids)[:, -shown:], theirs)


def test_mixed_batch_equals_hugging_face_and_peft_row_by_row(tiny, golden, tmp_path):
    lora, ia3, hira = (flora.load_adapter(tiny, peft_folder(tmp_path / kind, kind, golden))
                       for kind in ("lora", "ia3", "hira"))
    flora_id = golden_flora(tiny, golden)
    flora.freeze_bank(tiny)
    adapter_ids = torch.tensor([ia3, flora.BASE, lora, hira, flora_id] * 3)
    shown = golden["ia3_logits"].shape[1]
    ours = tiny(golden["ids"].repeat_interleave(5, 0), adapter_ids)[:, -shown:].unflatten(0, (3, 5))
    assert_close(ours[:, 0], golden["ia3_logits"])
    assert_close(ours[:, 1], golden["logits"][:, -shown:])
    assert_close(ours[:, 2], golden["lora_logits"])
    assert_within_1e_5(ours[:, 3], golden["hira_logits"])
    assert_within_1e_5(ours[:, 4], golden["flora_logits"])


# ------------------------------------------------------------------------ HiRA, and FLoRA as HiRA


def golden_flora(model, golden):
    """Add the FLoRA of rank 3 that `golden` holds -> its id."""
    adapter_id = flora.add_adapter(model, "flora", 3)
    for name, parameter in flora.adapter_parameters(model, adapter_id).items():
        parameter.data.copy_(golden[f"flora:{name}"])
    return adapter_id


def test_a_flora_written_for_peft_is_the_hira_that_peft_ran_and_comes_back_bit_for_bit(
        tiny, golden, tmp_path):
    """fixtures/make_golden.py gave PEFT the same HiRA and kept its logits."""
    adapter_id, ids = golden_flora(tiny, golden), golden["ids"]
    shown = golden["flora_logits"].shape[1]
    assert_within_1e_5(tiny(ids, torch.full((3,), adapter_id))[:, -shown:], golden["flora_logits"])
    save_peft(tiny, adapter_id, tmp_path / "out")
    theirs = peft_folder(tmp_path / "theirs", "hira", golden, "flora_as_hira", r=4)
    ours, wanted = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", theirs))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("HIRA", 4)
    for folder in (tmp_path / "out", theirs):
        back = flora.load_adapter(tiny, folder)
        assert_same_factors(tiny, adapter_id, back, 3)


def assert_same_factors(model, one, other, rank):
    """Bit for bit: B and A / r, which FLoRA runs; A too where dividing by r loses no bit."""
    both = (flora.adapters_of(model, i).values() for i in (one, other))
    for a, b in zip(*both, strict=True):
        assert a.kind == b.kind == "flora" and a.rank == b.rank == rank
        assert torch.equal(a.B, b.B) and torch.equal(a.A / rank, b.A / rank)
        assert torch.equal(a.A, b.A) or rank not in (1, 2, 4)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
def test_a_flora_survives_peft_bit_for_bit_at_any_rank(rank, tmp_path):
    model = tiny_model()
    save_peft(model, random_adapter(model, "flora", rank, ["all"]), tmp_path)
    back = flora.load_adapter(model, tmp_path)
    assert_same_factors(model, 1, back, rank)
    ids = torch.randint(0, 300, (1, 9))   # each alone: threads may split two rows differently
    assert torch.equal(model(ids, torch.tensor([1])), model(ids, torch.tensor([back])))


@pytest.mark.parametrize("kind,rank", [("hira", 1), ("hira", 3), ("flora", 2)])
@pytest.mark.parametrize("target", ["c_attn.qk", "c_attn.k"])
def test_some_columns_are_written_for_peft_as_ones_outside(kind, rank, target, tmp_path):
    """PEFT computes W0 ∘ (1 + hira_B hira_A) of what is written; here it comes back as a HiRA of
    all columns."""
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
    wanted = model(ids, torch.tensor([random_adapter(model, kind, rank, [target])] * 2))
    save_peft(model, 1, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    other, dense = tiny_model(), tiny_model()
    for name, layer in flora.adapter_layers(dense):
        if name.endswith("c_attn"):
            hira_A, hira_B = (tensors[f"base_model.model.{name}.hira_{x}"] for x in "AB")
            lo, hi = model.columns(target)
            outside = torch.cat([hira_B[:lo], hira_B[hi:]])
            assert len(hira_B) == len(layer.weight) and len(outside) and (outside == 0).all()
            layer.weight.data *= 1 + hira_B @ hira_A
    assert (dense(ids) - wanted).abs().max() < 1e-5
    back = flora.load_adapter(other, tmp_path)
    assert {a.kind for a in flora.adapters_of(other, back).values()} == {"hira"}
    assert (other(ids, torch.tensor([back, back])) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("slots", [40, 7])
def test_32_hiras_from_peft_run_in_one_continuous_batch_each_as_peft_ran_it_alone(slots, tmp_path):
    """Beside FLoRA, LoRA, IA3 and the base. PEFT 0.21 has no mixed batch for HiRA: golden_hira32
    holds 32 single runs."""
    model, golden = GPT.from_pretrained(TINY), load_file(FIXTURES / "golden.safetensors")
    hiras = load_file(FIXTURES / "golden_hira32.safetensors")
    prompts = [ids[:length].tolist() for ids, length in zip(golden["ids"], golden["lengths"])]
    folders = [peft_folder(tmp_path / str(i), "hira", hiras, str(i), r=i % 4 + 1)
               for i in range(32)]
    ids = [flora.load_adapter(model, folder) for folder in folders]
    work = [(i, prompts[n % 3], hiras["greedy"][n].tolist()) for n, i in enumerate(ids)]
    work += [(flora.BASE, prompt, greedy.tolist())
             for prompt, greedy in zip(prompts, golden["greedy"])]
    for kind in ("flora", "lora", "ia3"):
        i = random_adapter(model, kind, 2)
        work.append((i, prompts[0], generate(model, prompts[:1], [i], max_new_tokens=12)[0]))
    work = work[1::2] + work[::2]
    flora.freeze_bank(model)
    engine = Engine(model, slots=slots, length=32)
    requests = [engine.submit(prompt, adapter_id=i, max_new_tokens=12) for i, prompt, _ in work]
    engine.run()
    assert len({tuple(request.ids) for request in requests}) > 30
    for request, (_, _, alone) in zip(requests, work):
        assert request.ids == alone
    for n, prompt in enumerate(prompts):   # and the logits at the prompt's end
        logits = model(torch.tensor([prompt] * len(ids[n::3])), torch.tensor(ids[n::3]))[:, -1]
        assert_within_1e_5(logits, hiras["logits"][n::3])


# ----------------------------------------------------------- PEFT's folders and merged checkpoints


@pytest.mark.parametrize("kind", ["lora", "ia3", "hira"])
def test_a_peft_folder_comes_back_key_for_key_and_bit_for_bit(tiny, golden, kind, tmp_path):
    adapter_id = flora.load_adapter(tiny, peft_folder(tmp_path / "in", kind, golden))
    save_peft(tiny, adapter_id, tmp_path / "out", "some/base")
    theirs, ours = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("in", "out"))
    assert sorted(os.listdir(tmp_path / "out")) == [
        "adapter_config.json", "adapter_model.safetensors"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    wanted = peft_config(kind, theirs)
    for key in ("target_modules", "feedforward_modules"):   # ours are longer: attn.c_attn
        assert all(any(m.endswith(module) for m in config[key]) for module in wanted.get(key, []))
        assert len(config.get(key, [])) == len(wanted.get(key, []))
    assert config["base_model_name_or_path"] == "some/base"
    for key in ("peft_type", "r", "lora_alpha"):
        assert config.get(key) == wanted.get(key)


@pytest.mark.parametrize("kind,rank,targets", [
    ("lora", 8, ["all"]), ("lora", 2, ["c_attn.qk", "c_proj"]), ("ia3", 1, ["all"]),
    ("ia3", 1, ["c_attn.k", "c_fc"]), ("hira", 3, ["all"]), ("flora", 1, ["all"]),
    ("flora", 2, ["c_attn.qk", "c_proj"])])
def test_adapters_exported_to_peft_come_back_with_their_logits(kind, rank, targets, tmp_path):
    model, ids = tiny_model(), torch.randint(0, 300, (2, 9))
    wanted = model(ids, torch.tensor([random_adapter(model, kind, rank, targets)] * 2))
    save_peft(model, 1, tmp_path)
    other = tiny_model()
    back = flora.load_adapter(other, tmp_path)
    assert (other(ids, torch.tensor([back, back])) - wanted).abs().max() < 1e-5
    flora.save_adapter(other, 1, tmp_path / "ours.safetensors")  # and in our own form
    third = tiny_model()
    flora.load_adapter(third, tmp_path / "ours.safetensors")
    assert (third(ids, torch.tensor([1, 1])) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", [""])
def test_rslora_divides_alpha_by_the_root_of_the_rank(tiny, golden, tmp_path):
    """W0 + alpha / √r B A, written into the weights of another model; LoRA's own is alpha / r."""
    ids = golden["ids"]
    for changes, scale in [(dict(use_rslora=True), 3 / 2**0.5), ({}, 3 / 2)]:
        folder = peft_folder(tmp_path, "lora", golden, lora_alpha=3, **changes)
        adapter_id, dense = flora.load_adapter(tiny, folder), GPT.from_pretrained(TINY)
        for i, block in enumerate(dense.blocks):
            name = f"lora:base_model.model.transformer.h.{i}.attn.c_attn"
            A, B = (golden[f"{name}.lora_{factor}.weight"] for factor in "AB")
            block.attn.c_attn.weight.data += scale * B @ A
        assert_close(tiny(ids, torch.full((len(ids),), adapter_id)), dense(ids))


@pytest.mark.parametrize("name", [""])
@pytest.mark.parametrize("changes,sentence", [
    (dict(peft_type="PREFIX_TUNING"),
     "peft_type is 'PREFIX_TUNING'; only LORA, IA3 and HIRA can be loaded"),
    (dict(use_dora=True), "use_dora is True, which cannot be represented here"),
    (dict(rank_pattern={"c_attn": 4}), "rank_pattern is {'c_attn': 4}, which cannot"),
    (dict(alpha_pattern={"c_attn": 4}), "alpha_pattern is {'c_attn': 4}, which cannot"),
    (dict(lora_bias=True), "lora_bias is True, which cannot"),
    (dict(bias="all"), "bias is 'all', which cannot"),
    (dict(modules_to_save=["wte"]), "modules_to_save is ['wte'], which cannot"),
    (dict(layers_to_transform=[0]), "layers_to_transform is [0], which cannot"),
    (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which cannot"),
    (dict(made_up_later=1), "made_up_later is 1, which cannot"),
    (dict(target_modules=["q_proj"]),
     "names 'q_proj', which is none of this model's projections: attn.c_attn, "),
    (dict(target_modules="c_.*"),
     "target_modules is 'c_.*'; it must list the names of projections"),
    (dict(target_modules=["h.0.attn.c_attn"]),
     "leaves out transformer.h.1.attn.c_attn but not the same projection"),
    (dict(target_modules=["c_attn", "c_fc"]),
     "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight is missing"),
    (dict(target_modules=["c_fc"]),
     "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight is unexpected"),
    (dict(r=3), "c_attn.lora_A.weight has shape [2, 24], this model needs [3, 24]"),
    (dict(r=None), "adapter_config.json: rank is None; use a whole number"),
    (dict(lora_alpha="8"), "lora_alpha is '8'; it must be a number"),
    (dict(lora_alpha=float("nan")), "lora_alpha is nan; it must be a number"),
])
def test_what_a_peft_folder_asks_and_we_lack_is_refused_by_name(
        tiny, golden, tmp_path, changes, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)):
        flora.load_adapter(tiny, peft_folder(tmp_path / "lora", "lora", golden, **changes))
    assert all(layer.num_adapters == 0 for _, layer in flora.adapter_layers(tiny))


@pytest.mark.parametrize("name", [""])
def test_peft_folders_without_safetensors_and_exports_that_peft_lacks_are_refused(
        tiny, golden, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="adapter_config.json: no such file"):
        flora.load_adapter(tiny, tmp_path / "empty")
    folder = peft_folder(tmp_path / "lora", "lora", golden)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    sentence = "adapter_model.bin is a pickle, which is not opened; load it in PEFT and save"
    with pytest.raises(BadInput, match=sentence):
        flora.load_adapter(tiny, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(BadInput, match="adapter_model.safetensors: no such adapter file"):
        flora.load_adapter(tiny, folder)
    sentence = "adapter 1 is of kind ffba, which PEFT does not have; .*flora.merge_adapter"
    with pytest.raises(BadInput, match=sentence):
        save_peft(tiny, random_adapter(tiny, "ffba"), tmp_path / "ffba")
    assert not (tmp_path / "ffba").exists()


@pytest.mark.parametrize("kind", ["flora", "lora", "ia3"])
def test_a_merged_folder_holds_the_adapted_model_and_its_tokenizer(tiny, golden, kind, tmp_path):
    wanted = tiny(golden["ids"], torch.tensor([random_adapter(tiny, kind, 2)] * 3))
    assert (wanted - golden["logits"]).abs().max() > 0.1
    flora.merge_adapter(tiny, 1)
    tiny.save_pretrained(tmp_path / "merged")
    Tokenizer(TINY).save(tmp_path / "merged")
    assert_close(GPT.from_pretrained(tmp_path / "merged")(golden["ids"]), wanted)
    assert sorted(os.listdir(tmp_path / "merged")) == [
        "config.json", "model.safetensors", "tokenizer.json"]
    # without this file CTranslate2 finds no eos
    (tmp_path / "merged" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "again").mkdir()
    Tokenizer(tmp_path / "merged").save(tmp_path / "again")
    assert sorted(os.listdir(tmp_path / "again")) == ["tokenizer.json", "tokenizer_config.json"]

"""Llama: what the core promises of StarCoder holds for it, and what it alone has."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from extras.llama import PRESETS
from extras.tests.conftest import EXTRA_KINDS
from model import GPT, model_from_config, preset
from plumbing.files import BadInput
from plumbing.tokenizer import Tokenizer
from plumbing.tests.test_adapter_files import test_saved_adapters_load_equal_and_carry_their_metadata  # noqa: F401
from plumbing.tests.test_folders import (  # noqa: F401
    test_folders_round_trip_whole_sharded_and_as_bin, test_saved_folder_keeps_every_tensor_of_hugging_face)
from plumbing.tests.test_tokenizer import (  # noqa: F401
    test_tokenizers_round_trip_a_text_whole_and_as_what_follows_another)
from test_flora import (  # noqa: F401, run again here with the fixtures below
    CONFIGS, FIXTURES, MIXED, TINY, assert_close, random_model,
    test_a_batch_of_mixed_kinds_ranks_and_targets_equals_each_row_alone,
    test_a_cancelled_a_failing_and_a_too_long_request_disturb_no_other,
    test_a_request_ends_at_the_end_of_the_context,
    test_cached_generation_equals_uncached_token_for_token_on_ragged_prompts,
    test_each_request_returns_what_it_returns_alone,
    test_every_kind_and_rank_starts_as_the_base_model_bit_for_bit,
    test_generate_equals_the_plain_loop,
    test_gradient_checkpointing_changes_no_gradient,
    test_greedy_of_a_ragged_batch_equals_hugging_face_one_by_one,
    test_logits_equal_hugging_face,
    test_merging_gives_the_adapted_model,
    test_only_the_adapter_gets_gradients,
    test_plain_math_attention_equals_scaled_dot_product_attention,
    test_requests_are_the_same_with_the_tokens_read_every_fourth_step,
    tiny_model)


@pytest.fixture(scope="module")
def family():
    return "llama"


@pytest.fixture(params=["flora", "lora", "ia3", "ffba", "hira"])
def kind(request):
    return request.param


@pytest.fixture
def mixed():
    return MIXED["llama"] + EXTRA_KINDS["llama"]


@pytest.fixture(params=["_llama", "_llama3"])
def name(request):
    """Grouped-query Llama, Llama with scaled RoPE."""
    return request.param


@pytest.fixture(params=["tiny_llama", "tiny_llama3", "sentencepiece"])
def tokenizer_folder(request, llama_sentencepiece):
    return llama_sentencepiece if request.param == "sentencepiece" else FIXTURES / request.param


@pytest.fixture(scope="session")
def llama_sentencepiece(tmp_path_factory):
    """A folder with a tokenizer.model of Llama 2's kind: a space before each text, <s>, </s>, bytes."""
    import sentencepiece
    folder = tmp_path_factory.mktemp("sentencepiece")
    with open(folder / "tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(Path(train.__file__).read_text(encoding="utf-8").splitlines()), model_writer=f,
            model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=True, remove_extra_whitespaces=False, minloglevel=2)
    return folder


def test_presets_have_the_published_sizes():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in model_from_config(preset(name)).parameters()) for name in PRESETS}
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "llama-2-7b": 6738, "llama-2-13b": 13016, "llama-cpu": 27, "llama-smollm2": 135}


def test_llama_folders_that_do_not_fit_are_refused_naming_the_key(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config["rope_scaling"]
    for changes, sentence in [
            (dict(hidden_act="gelu"), "hidden_act is 'gelu', but only 'silu' is supported"),
            (dict(attention_bias=True), "attention_bias is True, but only False"),
            (dict(mlp_bias=True), "mlp_bias is True, but only False"),
            (dict(num_hidden_layers=None), "num_hidden_layers is None, but must be a positive whole number"),
            (dict(num_key_value_heads=3), "n_head 4 is not a multiple of n_kv_head 3"),
            (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic', but only 'default' or"),
            (dict(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn', but only"),
            (dict(rope_scaling={"type": "linear"}), "rope_type linear needs a number factor above 0, not None"),
            (dict(rope_scaling=scaling | {"low_freq_factor": "1"}), "llama3 needs a number low_freq_factor above 0, not '1'"),
            (dict(rope_theta="10000"), "rope_theta is '10000', but must be a number")]:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(BadInput, match=sentence):
            GPT.from_pretrained(tmp_path)


def test_linear_rope_scaling_divides_the_positions():
    plain = replace(CONFIGS["llama"], rope_scaling=None)
    scaled = replace(plain, rope_scaling={"rope_type": "linear", "factor": 4.0})
    ids, positions = torch.randint(0, 300, (2, 9)), 4 * torch.arange(9).expand(2, 9)
    assert_close(random_model(scaled)(ids, positions=positions), random_model(plain)(ids))


def test_llama_tokenizers_put_their_bos_before_a_text_and_read_their_eos(llama_sentencepiece, tmp_path):
    import sentencepiece
    plain = sentencepiece.SentencePieceProcessor(model_file=str(llama_sentencepiece / "tokenizer.model"))
    tokenizer = Tokenizer(llama_sentencepiece)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in ["def f(x):", " x", "x  y\n"]:  # as Llama's own: sentencepiece adds the space
        assert tokenizer.encode(text, bos=True) == [1] + plain.encode(text)
    for kind, bos, eos in [("tiny", None, 0), ("tiny_llama", 1, 2), ("tiny_llama3", 0, 1)]:
        tokenizer = Tokenizer(FIXTURES / kind)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
        whole = tokenizer.backend.hf.encode("return x").ids   # with what the family's post-processor adds
        assert tokenizer.encode("return x", bos=True) == whole
        assert tokenizer.encode("return x") == whole[bos is not None:]
    Tokenizer(llama_sentencepiece).save(tmp_path)
    for stored, eos in [(7, 7), ([9, 7], 9), (None, 2)]:
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stored}))
        assert Tokenizer(tmp_path).eos_id == eos


def test_tokens_added_beside_a_tokenizer_model_are_single_ids(llama_sentencepiece, tmp_path):
    """As in transformers, which puts the space of a text before each part; ids without a text are nothing."""
    n = Tokenizer(llama_sentencepiece).vocab_size
    shutil.copy(llama_sentencepiece / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": n, "<|im_end|>": n + 1, "<|im": n + 2}))
    plain, tokenizer = Tokenizer(llama_sentencepiece), Tokenizer(tmp_path)
    text = "<|im_start|>def f():<|im_end|> x"
    assert tokenizer.encode(text) == [n, *plain.encode("def f():"), n + 1, *plain.encode(" x")]
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == n + 3
    assert tokenizer.decode([*plain.encode("a"), n + 9, n + 1]) == "a<|im_end|>"
    assert tokenizer.token_id("<|im_end|>") == n + 1
    (tmp_path / "added_tokens.json").write_text('{"x": "y"}')
    with pytest.raises(BadInput, match="added_tokens.json: .* must be a whole number"):
        Tokenizer(tmp_path)

"""What the tests of the extras share: the core's fixtures, and the families and kinds of extras/."""
import pytest

pytest.register_assert_rewrite("test_flora")

from extras.llama import LlamaConfig  # noqa: E402
from extras.packed import packs_bfloat16  # noqa: E402
from extras.tests.two_processes import pytest_runtestloop  # noqa: E402, F401
from model import GPT  # noqa: E402
from plumbing.tests.conftest import run_here  # noqa: E402, F401
from plumbing.tokenizer import Tokenizer  # noqa: E402
from test_flora import (  # noqa: E402, F401
    ALL, CONFIGS, FIXTURES, MIXED, SERVED, adapter, embedded_adapters, expected, family, golden, kind, mixed,
    model, name, served, tiny, tiny_folder)

CONFIGS["llama"] = LlamaConfig(
    vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_kv_head=2, bos_token_id=0,
    eos_token_id=0, rope_scaling=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0,
                                      high_freq_factor=4.0, original_max_position_embeddings=16))
MIXED["llama"] = [
    ("flora", 1, None), ("flora", 4, ["all"]), ("lora", 8, None), ("ia3", 1, None),
    ("flora", 2, ["q_proj", "k_proj"]), ("ia3", 1, ["k_proj", "up_proj"]), ("lora", 2, ["q_proj", "o_proj"])]
SERVED["llama"] = [
    ("flora", 1, None), ("lora", 2, None), ("ia3", 1, None), ("flora", 3, ["q_proj", "k_proj"]),
    ("lora", 1, ["all"]), ("flora", 2, ["all"])]
ALL["llama"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXTRA_KINDS = {   # adapters of the kinds in extras/, by family
    "gpt_bigcode": [("ffba", 3, None), ("ffba", 1, ["mlp"]), ("hira", 2, ["all"]), ("hira", 1, ["c_attn.qk"])],
    "llama": [("ffba", 3, None), ("ffba", 1, ["mlp"]), ("hira", 2, ["all"]), ("hira", 1, ["q_proj"])]}
PACKED = ["float32", pytest.param("bfloat16", marks=pytest.mark.skipif(   # that weights are packed in
    not packs_bfloat16(), reason="needs AVX-512: weights packed in bfloat16"))]


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory):
    """Like tiny_folder, a Llama: fixtures/tiny_llama with a longer context."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    model = GPT.from_pretrained(FIXTURES / "tiny_llama")
    model.config.n_positions = 64
    model.save_pretrained(folder)
    Tokenizer(FIXTURES / "tiny_llama").save(folder)
    return folder

"""Tokenizers: text in, the same text out."""
import json
import shutil
from pathlib import Path

import pytest

import generate
import train
from model import GPT
from plumbing.files import BadInput
from plumbing.flags import EMBEDDED
from plumbing.prompts import new_text
from plumbing.requests import as_list
from plumbing.tokenizer import Tokenizer
from test_flora import TINY, tiny_flags

CODE = ("def f(x):\n\t  return x  # é ▁▁ 漢字 🙂\r\n\n"
        "    if x == 10:\n        pass\x00 \n   \n<|endoftext|>\n")


def test_embedded_tokenizer_round_trips_code_exactly():
    tokenizer = Tokenizer(EMBEDDED)
    for text in [CODE, "", " ", "\n", Path(train.__file__).read_text(encoding="utf-8")]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id == 0 and 0 not in tokenizer.encode(CODE)


@pytest.fixture(params=[TINY, Path(EMBEDDED)], ids=["tokenizer.json", "tokenizer.model"])
def tokenizer_folder(request):
    return request.param


@pytest.mark.parametrize("text", [
    "def add(self, other):\n    return self.items[10] + other\n",
    "\tif x:\r\n\t\ty  =  2024   \n\n   \n", " leading", "  two", "trailing \t ", "", " ",
    "s = 'Grüße, 世界 🎉 e\u0301 \u00a0'", "<fim_prefix>a<|endoftext|> b", "\x00\x7f\u2581",
    "\u2581 a\u2581\u2581b",
])
def test_tokenizers_round_trip_a_text_whole_and_as_what_follows_another(tokenizer_folder, text):
    tokenizer = Tokenizer(tokenizer_folder)
    if tokenizer_folder.name == "tiny_llama":   # whose tokenizer.json takes a ▁ for a space
        text = text.replace("\u2581", "")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    whole = tokenizer.encode("x = 1" + text)
    for n in range(1, len(whole)):  # what a prompt and its continuation are, wherever one ends
        start, rest = tokenizer.decode(whole[:n]), tokenizer.decode(whole[n:], continues=True)
        assert "\ufffd" in start + rest or start + rest == "x = 1" + text


def test_tokenizer_json_special_tokens():
    tokenizer = Tokenizer(TINY)
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_id == 0
    assert tokenizer.fim_ids == [1, 3, 2]  # prefix, suffix, middle: the order of a FIM prompt
    one, zero = tokenizer.encode("10")  # every digit a token, as in StarCoder
    assert tokenizer.encode("<fim_prefix>1<fim_suffix>0<fim_middle>") == [1, one, 3, zero, 2]
    assert len(tokenizer.encode("    return")) == 2  # merges apply


def copy_of_tiny(folder, **config):
    shutil.copytree(TINY, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def test_every_end_token_of_a_folder_ends_a_text_and_none_is_in_it(tmp_path):
    """generation_config.json comes first, then config.json; as in transformers."""
    folder = copy_of_tiny(tmp_path / "a", eos_token_id=[2, 7])
    assert Tokenizer(folder).eos_ids == [2, 7]
    assert GPT.from_pretrained(folder).config.eos_token_id == [2, 7]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 250]}))
    tokenizer, model = Tokenizer(folder), GPT.from_pretrained(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (9, [9, 250])
    prompts = [tokenizer.encode("def f(")]
    free = generate.generate(model, prompts, max_new_tokens=12)[0]
    for eos in (free[3], free[:4], [300 - 1, *free[2:3]]):
        end = min(free.index(i) for i in as_list(eos) if i in free)
        ids = generate.generate(model, prompts, max_new_tokens=12, eos_id=eos)[0]
        assert ids == free[:end + 1]
    assert new_text(tokenizer, [9, *tokenizer.encode("x"), 250]) == "x"
    for bad in ([3, -1], -1, "x", [True]):
        copy_of_tiny(tmp_path / f"bad{bad}", eos_token_id=bad)
        for load in (Tokenizer, GPT.from_pretrained):
            with pytest.raises(BadInput, match="eos_token_id"):
                load(tmp_path / f"bad{bad}")


@pytest.mark.parametrize("stated,kept,written", [
    (50256, [], 50256), ([300, 299], [299], [299]), ([300], [], [300])])
def test_an_end_token_outside_of_the_vocabulary_ends_no_text_and_is_told_once(
        stated, kept, written, tmp_path, capsys):
    """transformers writes eos_token_id 50256 for any small random GPTBigCode, in both files."""
    folder = copy_of_tiny(tmp_path / "a", eos_token_id=stated)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    tokenizer, model = Tokenizer(folder), GPT.from_pretrained(folder)
    told = capsys.readouterr().err.splitlines()
    outside = stated if isinstance(stated, int) else 300
    assert told == [f"warning: {folder}: eos_token_id {outside} is outside of the vocabulary of "
                    "300, so it ends no text"]
    assert tokenizer.eos_ids == kept and tokenizer.eos_id == (kept or [0])[0]
    assert model.config.eos_token_id == written
    free = generate.generate(model, [tokenizer.encode("def f(")], max_new_tokens=12)
    assert free == generate.generate(model, [tokenizer.encode("def f(")], max_new_tokens=12,
                                     eos_id=tokenizer.eos_ids)
    first = [i for i in (*kept, 0)][:1]   # what an empty prompt is
    assert generate.generate(model, [[]], max_new_tokens=3) == generate.generate(
        model, [first], max_new_tokens=3)
    model.save_pretrained(tmp_path / "again")
    assert GPT.from_pretrained(tmp_path / "again").config.eos_token_id == written


def test_what_training_scripts_leave_in_a_tokenizer_json_changes_no_text(tmp_path):
    """Truncation and padding are off; a prefix space stands at the start of a prompt alone."""
    from tokenizers import Tokenizer as HFTokenizer
    folder, text = copy_of_tiny(tmp_path / "a"), "def fibonacci(n):\n    return n"
    hf = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    hf.enable_truncation(4)
    hf.enable_padding(length=9)
    hf.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).encode(text) == Tokenizer(TINY).encode(text)
    values = json.loads((TINY / "tokenizer.json").read_text())
    steps = values["pre_tokenizer"].get("pretokenizers", [values["pre_tokenizer"]])
    changed = [step for step in steps if step["type"] == "ByteLevel"]
    changed[0]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("x")) == " x"
    for text in ("return", " return", "\n    return 1"):
        assert tokenizer.decode(Tokenizer(TINY).encode(text), continues=True) == text


def test_text_that_the_model_has_no_ids_for_is_refused_by_tokenizer_and_training(tmp_path):
    folder = copy_of_tiny(tmp_path / "a")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 300, "content": "<extra>"})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("a<fim_pad>b") and tokenizer.decode([300]) == "<extra>"
    for text, sentence in [
            ("a<extra>b", "a text has token id 300, but the model of .* has ids 0 to 299"),
            ("caf\udce9", "half of a surrogate pair .*not Unicode")]:
        with pytest.raises(BadInput, match=sentence):
            tokenizer.encode(text)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(6):
        (data / f"{i}.py").write_text(f"x = {i}\n" * 9 + "<extra>")
    flags = tiny_flags(folder, tmp_path / "out", "--data", data, "--keep-duplicates",
                       "--block-size", 8)
    with pytest.raises(BadInput, match="token id 300"):
        train.train(train.parse_args(flags))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A tokenizer.model of Llama 2's kind of 310 pieces: <unk>, <s>, </s>, bytes, a space before
    each text."""
    import sentencepiece
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    lines = ["the quick brown fox jumps over the lazy dog", "hello world answer question"] * 50
    with open(file, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=f, model_type="bpe", vocab_size=310,
            byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
            remove_extra_whitespaces=False)
    return file


def piece_tokenizer(pieces, folder, decoder={}, **config):
    """The Tokenizer of a folder with transformers' tokenizer_config.json."""
    folder.mkdir()
    shutil.copy(pieces, folder)
    decoder = {"2": dict(content="</s>", special=True)} | decoder
    values = dict(add_bos_token=True, legacy=True, added_tokens_decoder=decoder) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer(folder)


def test_special_tokens_in_a_text_are_the_ids_that_transformers_gives_them(pieces, tmp_path):
    extra = dict(content="<|im_end|>", special=True)
    plain = piece_tokenizer(pieces, tmp_path / "plain")
    chat = piece_tokenizer(pieces, tmp_path / "chat", {"310": extra})
    hello, hello_space, world = map(plain.encode, ("hello", "hello ", "world"))
    assert plain.encode("hello </s><s>world", bos=True) == [1, *hello_space, 2, 1, *world]
    assert plain.encode("<unk>hello") == [0, *hello]
    assert chat.encode("hello<|im_end|>", bos=True) == [1, *hello, 310]
    assert chat.token_id("<|im_end|>") == 310 and plain.token_id("<|im_end|>") is None
    stripping = piece_tokenizer(pieces, tmp_path / "rstrip", {"310": extra | dict(rstrip=True)})
    assert stripping.encode("hello<|im_end|>\n world") == [*hello, 310, *world]
    bare = tmp_path / "bare"   # no tokenizer_config.json: the control pieces alone
    bare.mkdir()
    shutil.copy(pieces, bare)
    for tokenizer in (plain, chat, Tokenizer(bare)):
        assert tokenizer.encode("hello</s>world") == [*hello, 2, *world]
        for text in ("</s> hello <s>\n<unk>", " <|im_end|> hello", "a</s>", "<s>▁</s>"):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_config_says_whether_a_bos_and_where_a_space_is_put(pieces, tmp_path):
    def tokenizer(name, **config):
        return piece_tokenizer(pieces, tmp_path / name, **config)

    hello = tokenizer("plain").encode("hello")
    for name, bos, config in [("yes", 1, dict(add_bos_token=True)),
                              ("no", None, dict(add_bos_token=False)),
                              ("null", None, dict(add_bos_token=None)),
                              ("other", 2, dict(bos_token="</s>")),
                              ("object", 2, dict(bos_token=dict(content="</s>")))]:
        assert tokenizer(name, **config).bos_id == bos
        ids = tokenizer(name + "2", **config).encode("hello", bos=True)
        assert ids == [bos] * bool(bos) + hello
    modern = tokenizer("modern", legacy=False)   # the space is put before the first part alone
    assert modern.encode("hello</s> hello") == [*hello, 2, *hello]
    assert modern.encode("hello</s>hello") != modern.encode("hello</s> hello")
    for text in ("hello</s>hello", "hello</s> hello", "</s>hello", "</s> hello", " </s>▁ x"):
        assert modern.decode(modern.encode(text)) == text


def test_what_looks_like_a_special_token_in_code_is_code_to_the_embedded_model():
    tokenizer = Tokenizer(EMBEDDED)
    for text in ("<|endoftext|>", "x = '<unk>'", "</s><s>"):
        ids = tokenizer.encode(text)
        assert min(ids) > 1 and tokenizer.decode(ids) == text
    assert tokenizer.bos_id is None

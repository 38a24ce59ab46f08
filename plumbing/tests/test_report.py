"""What a training tells at its end."""
import flora
import generate
import train
from flora import BASE
from model import GPT
from plumbing.report import side_by_side
from plumbing.texts import load_texts, middle_line
from plumbing.tokenizer import Tokenizer
from test_flora import alone, tiny_flags


def test_a_training_ends_with_samples_of_the_base_and_of_the_saved_adapter(
        tiny_folder, tmp_path, capsys):
    """Each as it is when generated alone."""
    args = train.parse_args(tiny_flags(tiny_folder, tmp_path, "--steps", 2, "--lr", 0.1))
    report, printed = train.train(args), capsys.readouterr().out
    model, tokenizer = GPT.from_pretrained(tiny_folder), Tokenizer(tiny_folder)
    ids = [BASE, flora.load_adapter(model, report["adapter_file"])]
    for n, text in enumerate(load_texts(args)[1][:3]):
        prompt = tokenizer.encode(middle_line(text))[:16]
        base, adapter = (
            alone(model, prompt, adapter_id=i, max_new_tokens=64, temperature=0.8,
                  seed=generate.row_seed(args.seed, 2 * n + j)) for j, i in enumerate(ids))
        base, adapter = (tokenizer.decode(text, continues=True) for text in (base, adapter))
        columns = side_by_side([f"[base]\n{base}", f"[adapter]\n{adapter}"], width=48)
        assert f">>> {tokenizer.decode(prompt).strip()}\n{columns}\n" in printed


def test_texts_of_several_heights_stand_side_by_side():
    texts = ["a\nbcd", "e\nf\n\ng\n"]
    assert side_by_side(texts) == "a     e\nbcd   f\n\n      g"
    assert side_by_side(texts, width=2) == "a    e\nbc   f\n\n     g"

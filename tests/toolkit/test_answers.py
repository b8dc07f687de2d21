"""--evaluate --generate: which answers are asked for, how they are scored, what is written."""

import contextlib
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

import train_qlora
from quantization_utils import create_bnb_config, load_model_and_tokenizer
from toolkit import answers
from toolkit.answers import Words, samples, score, score_lines
from toolkit.compare import SCORES, answer_scores

CHATS = [
    [("user", f"What is {i} and {i}?"), ("assistant", "a word"), ("user", "Say it again."), ("assistant", f"word {i}")]
    for i in range(12)
]


ENDS = (0, 2)  # <|endoftext|> and <|im_end|> of the tiny tokenizer


@pytest.fixture
def tiny_main() -> Callable[..., int]:
    """A function that runs train_qlora.py with tiny/'s settings and these flags, and returns its exit code."""
    config = str(Path(__file__).parents[2] / "tiny" / "config.yaml")

    def call(*flags: object) -> int:
        return train_qlora.main([*(() if "--adapter" in flags else ("--config", config)), *map(str, flags)])

    return call


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, tiny_main) -> Path:
    """The folder of a run of two steps on chats."""
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--dataset", data, "--validation_fraction", "0.5", "--max_steps", 2, "--max_length", 128)
    assert tiny_main(*flags, "--compute_dtype", "float32", "--output_dir", tmp_path / "out") == 0
    return tmp_path / "out"


def test_answers_are_greedy_and_their_references_the_last_turns(run: Path, tiny_model: Path, tiny_main, capsys) -> None:
    flags = ("--evaluate", "--adapter", run, "--dataset", run.parent / "chats.jsonl", "--generate", 3)
    assert tiny_main(*flags, "--max_new_tokens", 8) == 0
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3
    tokenizer = AutoTokenizer.from_pretrained(run)
    bnb_config = create_bnb_config(compute_dtype="float32")
    base, _ = load_model_and_tokenizer(str(tiny_model), bnb_config, compute_dtype="float32", device="cpu")
    model = PeftModel.from_pretrained(base, run).eval()
    for row in rows:
        number = int(row["reference"].removeprefix("word "))
        chat = [{"role": role, "content": text} for role, text in CHATS[number][:-1]]
        assert row["prompt"] == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        for name in ("base", "adapter"):
            new = list(ids[0])
            while len(new) < ids.shape[1] + 8 and (len(new) == ids.shape[1] or new[-1] not in ENDS):
                with torch.inference_mode(), model.disable_adapter() if name == "base" else contextlib.nullcontext():
                    new.append(int(model(input_ids=torch.tensor([new]), use_cache=False).logits[0, -1].argmax()))
            assert row[name] == tokenizer.decode(new[ids.shape[1] :], skip_special_tokens=True)
    scores = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["answers"]
    assert set(scores) == {"base", "adapter"} and answer_scores(run / "evaluation.json") == scores["adapter"]
    assert "3 answers beside their references are in " in capsys.readouterr().out


def test_memory_holds_one_base_at_a_time(run: Path, tiny_main, monkeypatch) -> None:
    """One for the losses, gone before the one for the answers of base and adapter is loaded."""
    loads: list[weakref.ref] = []

    def load(original: Callable) -> Callable:
        def watched(*arguments, **keys):
            assert not [alive for alive in loads if alive() is not None]
            model, tokenizer = original(*arguments, **keys)
            loads.append(weakref.ref(next(model.parameters())))
            return model, tokenizer

        return watched

    monkeypatch.setattr(train_qlora, "load_base", load(train_qlora.load_base))
    monkeypatch.setattr(answers, "load_base", load(answers.load_base))
    flags = ("--evaluate", "--adapter", run, "--dataset", run.parent / "chats.jsonl", "--generate", 2)
    assert tiny_main(*flags, "--max_new_tokens", 4) == 0
    assert len(loads) == 2 and len((run / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_running_text_has_no_answers(run: Path, tiny_main, capsys) -> None:
    text = Path(__file__).parents[2] / "tiny" / "text"
    assert tiny_main("--evaluate", "--adapter", run, "--dataset", text, "--format", "text", "--generate", 3) == 2
    assert "error: --generate: expected chats or pairs" in capsys.readouterr().err
    assert tiny_main("--evaluate", "--adapter", run, "--generate", 0) == 2
    assert "error: --generate: expected a number of prompts >= 1, got 0" in capsys.readouterr().err


def test_the_last_learned_part_is_the_answer() -> None:
    class Two:
        """Two packed samples in one block; the second has two learned parts."""

        def __len__(self) -> int:
            return 1

        def spans(self, number: int) -> list[tuple[int, int]]:
            return [(0, 4), (4, 11)]

        def __getitem__(self, number: int) -> torch.Tensor:
            labels = [-100, -100, 3, 4, -100, 6, 7, -100, 9, 10, -100]
            return torch.tensor([list(range(1, 12)), labels]).numpy()

    assert list(samples(Two())) == [([1, 2], [3, 4]), ([5, 6, 7, 8], [9, 10])]


def test_scores_are_those_of_the_libraries_and_count_chinese_by_character() -> None:
    assert Words().tokenize("Ab c-d 你好ok 12") == ["ab", "c", "d", "你", "好", "ok", "12"]
    assert score(["a ", "b"], ["a", "c"])["exact match"] == 50
    if "ROUGE-L" in (found := score(["the cat sat", "你好嗎"], ["the cat", "你好"])):
        # F1 of the longest common subsequence by hand: 2 of 3 and 2 words; 2 of 3 and 2 characters.
        assert found["ROUGE-L"] == pytest.approx(100 * 2 * (2 / 3) / (2 / 3 + 1))
    if "BLEU" in found:
        assert score(["今天天氣很好"], ["今天天氣很好"])["BLEU"] == pytest.approx(100)
        assert score(["a b c d e"], ["a b c d e"])["BLEU"] == pytest.approx(100)


def test_what_is_not_installed_is_named(monkeypatch) -> None:
    for name in ("rouge_score", "rouge_score.rouge_scorer", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    found = score(["a"], ["a"])
    assert found == {"exact match": 100}
    assert score_lines({"base": found})[-1] == "for more scores: pip install rouge-score sacrebleu"
    assert SCORES[0] in found

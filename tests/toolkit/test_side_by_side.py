"""Answers beside each other, and the blind test: alignment, the sign test, what is counted, what is refused."""

import builtins
import json
import random
from pathlib import Path

import pytest

from config import ConfigError, GenerationConfig
from toolkit.adapter_choice import names_of
from toolkit.chat import Conversation, command, help_text
from toolkit.side_by_side import BlindTest, beside, read_results, sign_test, summary
from toolkit.text_width import width

TEXTS = {
    "base": "天空是藍色的,因為空氣散射藍光。\n\nShort.",
    "r8": "The sky is blue because air scatters blue light more than red light.",
    "a/very/long/folder/of/an/adapter_r16": "\x1b[2J\tcontrol",
}


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_columns_fit_and_are_aligned(columns):
    text = beside(TEXTS, columns)
    assert max(map(width, text.splitlines())) <= columns
    assert "\x1b" not in text and "\\x1b[2J" in text.replace("\n", "")
    squeezed = "".join(text.split()).replace("-", "")
    for word in ("天空是藍色的", "Short.", "scatters"):
        assert word in squeezed


def test_a_column_begins_at_one_place():
    lines = beside(TEXTS, 80).splitlines()
    rule = next(line for line in lines if line.startswith("---"))
    second, third = rule.index(" -") + 1, rule.rindex(" -") + 1  # where the second and the third column begin
    assert len(set(map(len, rule.split("  ")))) == 1
    for line in lines:
        places, at = {}, 0
        for char in line:
            places[at] = char
            at += width(char)
        assert places.get(second - 1, " ") == " " and places.get(third - 1, " ") == " "


# From the binomial distribution: 2 * P(X <= few), X ~ B(n, 1/2).
@pytest.mark.parametrize(
    "wins, losses, p",
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (5, 0, 0.0625), (9, 1, 0.021484375), (15, 5, 0.04138946533203125)],
)
def test_sign_test(wins, losses, p):
    assert sign_test(wins, losses) == sign_test(losses, wins) == pytest.approx(p, abs=1e-12)


def rows(*better: str | None) -> list[dict]:
    return [{"voices": ["r8", "r16"] if i % 2 else ["r16", "r8"], "better": b} for i, b in enumerate(better)]


def test_summary_counts_a_pair_in_both_orders():
    [line] = summary(rows(*["r8"] * 9, "r16", None))
    assert line == "r16 better 1, r8 better 9, alike 1: sign test p = 0.0215 (unlikely to be chance)"
    assert summary([]) == [] and "p = 1 (may be chance)" in summary(rows(None))[0]


class Bench:
    """A blind test whose voices answer with their own name."""

    def __init__(self, monkeypatch, typed: list[str]):
        self.typed, self.now, self.asked = typed, "r8", []
        self.test = BlindTest(dict.fromkeys(("base", "r8", "r16"), "…"), "r8", self.use, self.answer, random.Random(3))
        self.talk = Conversation(GenerationConfig())
        monkeypatch.setattr(builtins, "input", lambda prompt="": self.typed.pop(0))

    def use(self, name: str) -> None:
        self.now = name

    def answer(self, text: str, talk: Conversation) -> str:
        self.asked.append(self.now)
        return f"I am {self.now}"

    def command(self, line: str) -> None:
        command(line, self.talk, pytest.fail, self.test.commands())


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_comparison_is_blind_and_counted(here, monkeypatch, capsys):
    bench = Bench(monkeypatch, ["x", "2", "=", "s"])
    bench.command("/ab r8 r16 果.jsonl")
    bench.test.turn("hello", bench.talk)
    out = capsys.readouterr().out
    shown = out.split("[1 was")[0]
    assert "r8" not in shown.split("--- answer 1")[1] and sorted(bench.asked) == ["r16", "r8"]
    [row] = [json.loads(line) for line in Path("果.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["voices"] == bench.asked and row["better"] == row["voices"][1] and row["prompt"] == "hello"
    assert bench.talk.messages[-1] == {"role": "assistant", "content": f"I am {row['better']}"}
    assert bench.now == "r8", "the voice that was active goes on"
    bench.test.turn("again", bench.talk)
    bench.test.turn("skipped", bench.talk)
    assert len(read_results(Path("果.jsonl"))) == 2 and len(bench.talk.messages) == 4
    capsys.readouterr()
    bench.command("/ab off")
    assert "alike 1: sign test p = 1" in capsys.readouterr().out and bench.test.file is None


def test_the_question_says_what_it_reads_and_lets_the_test_end(here, monkeypatch, capsys):
    bench = Bench(monkeypatch, ["Tell me a tale", "/ab off", "never read"])
    bench.command("/ab r8 r16")
    bench.test.turn("hello", bench.talk)
    out = capsys.readouterr().out
    assert out.count("[not read: here 1, 2, =, s or /ab off is expected, then the next message]") == 1
    assert "the message was dropped" in out and "no comparison was made" in out
    assert bench.test.file is None and bench.typed == ["never read"] and bench.talk.messages == [] and bench.now == "r8"


def test_both_orders_come(here, monkeypatch):
    bench = Bench(monkeypatch, ["1"] * 20)
    bench.command("/ab base r8")
    for _ in range(20):
        bench.test.turn("hello", bench.talk)
    orders = {tuple(row["voices"]) for row in read_results(Path("ab.jsonl"))}
    assert orders == {("base", "r8"), ("r8", "base")}


def test_a_stopped_comparison_changes_nothing(here, monkeypatch):
    bench = Bench(monkeypatch, [])
    bench.command("/ab")

    def interrupted(prompt: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.test.turn("hello", bench.talk)
    assert not Path("ab.jsonl").exists() and bench.talk.messages == [] and bench.now == "r8"


def test_earlier_counts_go_on(here, monkeypatch, capsys):
    Path("old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("r8", "r8")))
    bench = Bench(monkeypatch, ["1"])
    bench.command("/ab r8 r16 old.jsonl")
    assert "which has 2 comparisons" in capsys.readouterr().out
    bench.test.turn("hello", bench.talk)
    assert len(read_results(Path("old.jsonl"))) == 3


@pytest.mark.parametrize(
    "line, reason",
    [
        ("/ab r8", "/ab: expected two different ones of base, r8, r16, got r8"),
        ("/ab r8 r8", "/ab: expected two different ones"),
        ("/ab r8 r9", "/ab: there is no r9; the names are base, r8, r16"),
        ("/ab 'r8", "/ab: No closing quotation"),
        ("/ab other.jsonl", "/ab: expected a file of earlier comparisons"),
        ("/ab folder.jsonl", "/ab: expected a file of earlier comparisons"),
        ("/ab torn.jsonl", "/ab: expected a file of earlier comparisons"),
        ("/ab nowhere/new.jsonl", "/ab: cannot write nowhere/new.jsonl"),
        ("/adapter r9", "/adapter: there is no r9"),
        ("/adapter", "/adapter: there is no name"),
    ],
)
def test_wrong_words_are_refused_in_one_line(here, monkeypatch, line, reason):
    Path("other.jsonl").write_text('{"prompt": "not ours"}\n')
    Path("folder.jsonl").mkdir()
    Path("torn.jsonl").write_text(json.dumps(rows("r8")[0]))
    bench = Bench(monkeypatch, [])
    with pytest.raises(ConfigError) as found:
        bench.command(line)
    assert len(found.value.problems) == 1 and found.value.problems[0].startswith(reason)
    assert (
        bench.test.file is None and bench.now == "r8" and Path("other.jsonl").read_text() == '{"prompt": "not ours"}\n'
    )


def test_switching_keeps_the_conversation(here, monkeypatch, capsys):
    bench = Bench(monkeypatch, [])
    bench.talk.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bench.command("/adapter r16")
    bench.command("/adapters")
    assert bench.now == "r16" and len(bench.talk.messages) == 2
    assert "* r16 (…)" in capsys.readouterr().out
    assert "/adapter NAME" in help_text(80, bench.test.commands()) and "/adapter" not in help_text(80)


def test_an_adapter_in_a_folder_named_base_is_not_taken_for_the_base(tmp_path):
    assert names_of([tmp_path / "base", tmp_path / "r8"]) == ["./base", "r8"]
    assert names_of([tmp_path / "a" / "out", tmp_path / "b" / "out"]) == ["a/out", "b/out"] and names_of([]) == []


def test_a_name_with_a_space_is_quoted(here, monkeypatch):
    bench = Bench(monkeypatch, [])
    bench.test.voices["my run"] = "…"
    bench.command("/ab 'my run' base")
    assert bench.test.pair == ["my run", "base"]

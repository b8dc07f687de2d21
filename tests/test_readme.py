"""Every command of the README parses and every file that it names exists."""

import re
import shlex
from pathlib import Path

import pytest

import inference_example
import train_qlora
from config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python (train_qlora\.py[^\n&`#]*)", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_training_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, *arguments = shlex.split(command)
    try:
        train_qlora.parse(arguments)
    except ConfigError as error:  # an adapter that the reader has yet to train
        assert error.problems == ("--adapter: no adapter_config.json in output_r8",)


@pytest.mark.parametrize("command", re.findall(r"python (inference_example\.py[^\n&`#]*)", README))
def test_inference_commands_parse(command, monkeypatch, tmp_path):
    """The adapter and the prompts are the reader's to make."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output_tiny").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "output_tiny" / name).touch()
    (tmp_path / "questions.txt").write_text("Hello\n", encoding="utf-8")
    _, *arguments = shlex.split(command)
    assert inference_example.parse(arguments)[0].adapter == Path("output_tiny")


def test_every_file_named_exists():
    names = set(re.findall(r"(?<![\w/])((?:tests/benchmarks/|tiny/)?[a-z_]+\.(?:py|yaml|txt))\b", README))
    left_by_a_run = {"training_log.txt", "my_texts.txt", "questions.txt"}
    assert names - left_by_a_run
    assert [name for name in sorted(names - left_by_a_run) if not (ROOT / name).exists()] == []

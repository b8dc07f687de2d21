"""Every command of the README parses and every file that it names exists."""

import re
import shlex
import subprocess
import sys
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
    (tmp_path / "output_tiny" / "adapter_model.safetensors").touch()
    described = '{"peft_type": "LORA", "r": 16, "lora_alpha": 32}'
    (tmp_path / "output_tiny" / "adapter_config.json").write_text(described, encoding="utf-8")
    (tmp_path / "questions.txt").write_text("Hello\n", encoding="utf-8")
    _, *arguments = shlex.split(command)
    assert inference_example.parse(arguments)[0].adapter == Path("output_tiny")


def test_every_file_named_exists():
    names = set(
        re.findall(r"(?<![\w/])((?:tests/benchmarks/|tiny/|toolkit/|fast_path/)?[a-z_]+\.(?:py|yaml|txt))\b", README)
    )
    left_by_a_run = {"training_log.txt", "my_texts.txt", "questions.txt"}
    assert names - left_by_a_run
    assert [name for name in sorted(names - left_by_a_run) if not (ROOT / name).exists()] == []


def test_the_set_up_commands_are_those_that_ci_runs():
    """Two of them, on plain PyPI; the first installs nothing beyond requirements.txt and torch, and so no Triton."""
    first, second = (
        subprocess.run(
            [sys.executable, ROOT / ".ci" / "readme_command.py", number], capture_output=True, text=True
        ).stdout
        for number in ("1", "2")
    )
    installed = re.findall(r"pip install (.*?)(?:&&|$)", first, flags=re.M)
    assert [words.split() for words in installed] == [["torch==2.13.0"], ["-r", "requirements.txt"]]
    assert "python train_qlora.py --config tiny/config.yaml" in first and "triton" not in first
    assert "triton" in second and "python -m pytest" in second and "index-url" not in first + second


def test_every_other_index_of_torch_is_one_that_pytorch_has():
    found = re.findall(r"--index-url (\S+)", README)
    assert found and all(re.fullmatch(r"https://download\.pytorch\.org/whl/(cpu|cu\d{3})", index) for index in found)

"""Every command of the README parses and every file that it names exists."""

import re
import shlex
from pathlib import Path

import pytest

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


def test_every_file_named_exists():
    names = set(re.findall(r"(?<![\w/])((?:tests/benchmarks/|tiny/)?[a-z_]+\.(?:py|yaml|txt))\b", README))
    left_by_a_run = {"training_log.txt", "my_texts.txt"}
    assert names - left_by_a_run
    assert [name for name in sorted(names - left_by_a_run) if not (ROOT / name).exists()] == []

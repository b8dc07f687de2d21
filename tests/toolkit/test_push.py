"""What --push stages of a run, what it refuses, and what it says where the hub cannot be reached or answers no."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import ConfigError, load_config
from toolkit import push
from toolkit.push import stage, upload
from toolkit.runs import read_run

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "abcdefgh" * 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a small finished run on a local base and local text."""
    import train_qlora

    folder = tmp_path_factory.mktemp("push") / "run"
    flags = ["--config", str(ROOT / "tiny" / "config.yaml"), "--dataset", str(corpus), "--max_steps", "1"]
    flags += ["--max_length", "32", "--batch_size", "1", "--max_train_samples", "20", "--max_eval_samples", "4"]
    assert train_qlora.main([*flags, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    (tmp_path / "staged").mkdir()
    return tmp_path / "staged"


def test_the_staged_folder_is_an_adapter_without_paths_of_this_machine(run, staged, tiny_model):
    names = stage(run, staged, "some/base")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "tokenizer.json"} <= set(
        names
    )
    assert not any(name.startswith((".", "checkpoint")) for name in names) and "training_log.txt" not in names
    for path in staged.iterdir():
        if path.suffix not in (".png", ".safetensors"):
            text = path.read_text(encoding="utf-8")
            assert str(ROOT) not in text and str(run.parent) not in text and "/tmp" not in text, path.name
    config = load_config(staged / "config.yaml")
    assert config.model.name == "some/base" and not os.path.isabs(config.data.dataset)
    card = (staged / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: some/base\n") and "base_model:adapter:some/base" in card
    settings = json.loads((staged / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "some/base"
    assert (staged / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), staged)
    assert AutoTokenizer.from_pretrained(staged).chat_template


def unfinished(run: Path) -> None:
    (run / "adapter_model.safetensors").unlink()


def with_secret(run: Path) -> None:
    (run / "README.md").write_text((run / "README.md").read_text() + f"\ntoken: {TOKEN}\n")


def with_path(run: Path) -> None:
    (run / "chat_template.jinja").write_text(f"{{# {os.path.expanduser('~')}/notes #}}{{{{ messages }}}}")


def other_base(run: Path) -> None:
    (run / "README.md").write_text((run / "README.md").read_text().replace("base_model: ", "base_model: x", 1))


def damaged(run: Path) -> None:
    (run / "adapter_model.safetensors").write_bytes(b"\x00" * 64)


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no run": (lambda run: (run / "metrics.jsonl").unlink(), "no run in"),
    "unfinished": (unfinished, "expected a finished run in"),
    "no card": (lambda run: (run / "README.md").unlink(), "whose README.md is missing"),
    "secret": (with_secret, "README.md holds what looks like a secret"),
    "path": (with_path, "chat_template.jinja names a path of this machine"),
    "card of another base": (other_base, "expected base_model: some/base in its header"),
    "damaged weights": (damaged, "cannot read adapter_model.safetensors"),
    "damaged settings": (lambda run: (run / "adapter_config.json").write_text("{"), "adapter_config.json"),
}


@pytest.mark.parametrize("spoil, says", SPOILED.values(), ids=SPOILED)
def test_what_is_not_to_be_shared_is_refused(run, staged, spoil, says):
    spoil(run)
    with pytest.raises(ConfigError) as found:
        stage(run, staged, "some/base")
    [problem] = found.value.problems
    assert says in problem and TOKEN not in problem


def test_a_local_base_needs_the_name_that_others_know(run, staged):
    with pytest.raises(ConfigError, match="model.name: expected the hub id of the base.*give it as --model_name"):
        stage(run, staged, None)
    assert not any(staged.iterdir())


def test_a_link_does_not_take_another_file_along(run, staged, tmp_path):
    (tmp_path / "private.json").write_text('"private"')
    (run / "added_tokens.json").symlink_to(tmp_path / "private.json")
    assert "added_tokens.json" not in stage(run, staged, "some/base")


class Hub:
    """Stands for the hub's client; `fails` says in which call it raises what."""

    fails: dict[str, Exception] = {}
    private = True  # whether the repository that may be there already is
    calls: list[tuple] = []

    def create_repo(self, name: str, **options: object) -> SimpleNamespace:
        return self._call("create_repo", name, options, SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}"))

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: object) -> None:
        return self._call("upload_folder", options["repo_id"], options, None)

    def _call(self, what: str, name: object, options: dict, result: object):
        self.calls.append((what, name, options))
        if what in self.fails:
            raise self.fails[what]
        return result


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.setattr(Hub, "fails", {})
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def refused(status: int) -> HfHubHTTPError:
    answer = SimpleNamespace(status_code=status, headers={}, request=None, reason_phrase="no", url="u")
    return HfHubHTTPError(f"{status} for a token", response=answer)  # type: ignore[arg-type]


@pytest.mark.parametrize("private", [True, False])
def test_one_repository_gets_the_whole_folder(hub, run, tmp_path, capsys, monkeypatch, private):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", False)
    said: list[str] = []
    assert push.push("mine", run, "some/base", private, False, said.append) == 0
    (made, _, how), (sent, name, what) = hub.calls
    assert (made, sent, name) == ("create_repo", "upload_folder", "me/mine")
    assert how == {"private": private, "exist_ok": False} and not Path(what["folder_path"]).exists()
    out = capsys.readouterr().out
    assert out.startswith("private: " if private else "public: ") and TOKEN not in out + "".join(said)


@pytest.mark.parametrize(
    "call, error, says",
    [
        ("create_repo", refused(401), "the hub does not accept the token"),
        ("create_repo", refused(403), "the token may not write to me/mine"),
        ("create_repo", refused(409), "me/mine is taken: choose another name, or add --overwrite"),
        ("create_repo", refused(500), "answers 500"),
        ("create_repo", ConnectionError(), "no connection to "),
        (
            "upload_folder",
            TimeoutError(),
            r"no connection to .*\(the repository me/mine is not complete: repeat the command with --overwrite\)",
        ),
    ],
)
def test_what_the_hub_says_no_to_is_one_line(hub, staged, call, error, says):
    hub.fails = {call: error}
    with pytest.raises(ConfigError, match=says) as found:
        upload(staged, "me/mine", True, False)
    assert len(found.value.problems) == 1 and "\n" not in found.value.problems[0]


def test_a_repository_that_is_there_keeps_nothing_of_another_run(hub, staged):
    upload(staged, "me/mine", True, True)
    upload(staged, "me/other", True, False)
    patterns = [options["delete_patterns"] for what, _, options in hub.calls if what == "upload_folder"]
    kept = ["notes.md", "picture.png", "model.gguf"]
    old = ["chat_template.jinja", "adapter_model.safetensors", "tokenizer.json"]
    assert [*filter_repo_objects([*kept, *old], allow_patterns=patterns[0])] == old and patterns[1] is None


@pytest.mark.parametrize(
    "private, says", [(True, "is public on the hub; add"), (False, "is private on the hub; leave")]
)
def test_a_repository_that_others_see_is_not_taken_for_a_private_one(hub, monkeypatch, staged, private, says):
    monkeypatch.setattr(hub, "private", not private)
    with pytest.raises(ConfigError, match=f"--push: me/mine {says}"):
        upload(staged, "me/mine", private, True)
    assert [what for what, *_ in hub.calls] == ["create_repo"]


def command(*flags: object, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    words = [sys.executable, str(ROOT / "train_qlora.py"), *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True, env=own | {"HF_HOME": str(home)} | environment)


@pytest.mark.parametrize(
    "name, environment, says",
    [
        ("me/mine", {}, "--push: no token: log in with"),
        (
            "me/mine",
            {"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"},
            "--push: no connection to http://127.0.0.1:9",
        ),
        ("me/mine", {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "--push: HF_HUB_OFFLINE is set"),
        ("a/b/c", {"HF_TOKEN": TOKEN}, "--push: expected NAME or OWNER/NAME, got a/b/c"),
    ],
)
def test_the_command_fails_in_one_line(run, tmp_path, name, environment, says):
    done = command(
        "--push", name, "--output_dir", run, "--model_name", "some/base", home=tmp_path / "home", **environment
    )
    *before, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith(f"error: {says}") and TOKEN not in done.stderr + done.stdout
    assert all(line.startswith("uploading ") for line in before) and read_run(run).state == "finished"


def test_public_goes_with_push(tmp_path):
    done = command("--public", home=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --public: goes with --push\n")

"""Hostile inputs achieve nothing: see adversary.py for what that means, and hostile_*.py for the inputs.

A share of them runs every time; all of them: pytest tests/faults/test_adversary.py -m ""
"""

import json
import shutil

import pytest

from tests.faults import hostile_adapters, hostile_checkpoints, hostile_configs, hostile_data, hostile_templates
from tests.faults.adversary import CODE, Ground, ask, execute, make_ground

KINDS = {
    "configs": (hostile_configs, 8),
    "data": (hostile_data, 8),
    "templates": (hostile_templates, 14),
    "adapters": (hostile_adapters, 18),
    "checkpoints": (hostile_checkpoints, 18),
}  # how many of a kind run every time; the rest is marked `long`


def cases() -> list:
    """Return every attack as a parameter; all but a share of each kind, spread evenly, are marked `long`."""
    found = []
    for kind, (module, share) in KINDS.items():
        every = max(1, len(module.ATTACKS) // share)
        for number, (name, build) in enumerate(module.ATTACKS.items()):
            marks = [pytest.mark.long] if number % every or number >= every * share else []
            found.append(pytest.param(build, id=f"{kind}-{name}", marks=marks))
    return found


@pytest.fixture(scope="module")
def ground(tmp_path_factory, forker) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground"), forker)


@pytest.mark.faults
@pytest.mark.parametrize("build", cases())
def test_hostile_input_achieves_nothing(build, ground, tmp_path, forker):
    folder = tmp_path / "here"
    folder.mkdir()
    assert execute(build(folder, ground), folder, forker) == []


def test_the_watch_sees_what_it_watches_for(ground, tmp_path, forker):
    """A control: a model folder whose code the user has asked for is reported as run, and its canary is found."""
    folder = tmp_path / "here"
    folder.mkdir()
    model = shutil.copytree(ground.model, folder / "model")
    settings = json.loads((model / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text(
        f"{CODE}\nfrom transformers import Qwen2Config as Config, Qwen2ForCausalLM as Model\n"
    )
    problems = execute(
        ask("--adapter", "none", "--model_name", model, "--trust_remote_code", "true", codes=(0,)), folder, forker
    )
    assert "the canary was written" in problems
    assert any(problem.startswith("seen: exec") for problem in problems)

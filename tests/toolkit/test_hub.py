"""A hub that does not answer, slips in names, and what a cache holds. Its answers: tests/faults."""

import time

import pytest
from huggingface_hub import constants

from config import ConfigError
from quantization_utils import load_tokenizer
from toolkit import hub
from toolkit.hub import asking_hub


@pytest.mark.parametrize("name, offline, said", [("a/b", False, True), ("a/b", True, False), ("/a/b", False, False)])
def test_a_hub_that_does_not_answer_is_named_while_it_is_asked(monkeypatch, capsys, name, offline, said):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "check_connection", lambda name, kind: time.sleep(0.3))
    with asking_hub(name, patience=0.01):
        time.sleep(0.3)
    assert capsys.readouterr().err == f"still waiting for {constants.ENDPOINT} ({name})\n" * said
    with asking_hub(name, patience=1):
        pass
    time.sleep(1)
    assert capsys.readouterr().err == ""


@pytest.fixture
def dead_hub(monkeypatch, tmp_path):
    """The current folder is an empty one, the caches are empty too, and nobody answers for the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nobody := "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "near, said",
    [("", ""), ("none", ", and the folder models here has no qwn"), ("qwen", "here has qwen, but no qwn")],
)
def test_a_slip_in_a_path_does_not_wait_for_a_hub_out_of_reach(dead_hub, near, said):
    if near:
        (dead_hub / "models" / near).mkdir(parents=True)
    began = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        load_tokenizer("models/qwn")
    assert time.monotonic() - began < 8  # huggingface_hub alone needs 23 seconds
    (line,) = refused.value.problems
    start = "model.name: cannot get models/qwn from the hub: no connection to http://127.0.0.1:1 (Connection refused)"
    assert line.startswith(start) and line.removeprefix(start).partition("; give")[0].endswith(said)
    assert ("the folder" in line) == bool(near)


@pytest.mark.parametrize(
    "kind, cached", [("model", "hub/models--a--b"), ("dataset", "hub/datasets--a--b"), ("dataset", "datasets/a___b")]
)
def test_what_a_cache_holds_is_left_to_the_libraries(dead_hub, kind, cached):
    with pytest.raises(ConnectionError, match="no connection"), asking_hub("a/b", kind):
        pytest.fail("asked without a connection")
    (dead_hub / "home" / cached).mkdir(parents=True)
    with asking_hub("a/b", kind):
        pass
    with pytest.raises(ConnectionError), asking_hub("a/c" if kind == "model" else "c/b", kind):
        pass

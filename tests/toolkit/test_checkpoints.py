"""Checkpoints: nothing is lost in a round trip, damage is noticed, and a crash never leaves a false checkpoint."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from config import LEAVES, Config, ConfigError, load_config
from toolkit import checkpoints as checkpoints_module
from toolkit.checkpoints import (
    LOCK,
    RESULTS,
    TEMPORARY,
    Log,
    Progress,
    check_output,
    check_space,
    clean_up,
    flatten_state,
    interrupted_early,
    latest_checkpoint,
    locked,
    open_output,
    read_checkpoint,
    restore_state,
    stop_on_signal,
    stopped_at_once,
    write_atomically,
    write_checkpoint,
)
from toolkit.data_blocks import Blocks
from toolkit.earlier_run import checkpoints, settings
from toolkit.resume import check_resumable, find_checkpoint, fingerprint

FILES = {
    "adapter_model.safetensors",
    "adapter_config.json",
    "training_state.safetensors",
    "training_state.json",
    "checksums.json",
}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, in which NaN equals itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(a, b) -> bool:
    """Whether two nested states are equal in structure, types of keys, dtypes and bits; tuples count as lists."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(bits_of(a), bits_of(b))
        )
    if isinstance(a, dict):
        keys = [(type(key), key) for key in a]
        return isinstance(b, dict) and keys == [(type(key), key) for key in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def round_trip(state):
    """What a checkpoint's two files give back, by way of the text of one and the tensors of the other."""
    tensors = {}
    tree = json.loads(json.dumps(flatten_state(state, "state", tensors)))
    return restore_state(tree, tensors)


def stepped(kind, steps: int = 3):
    """An optimizer after some steps over a large (8-bit), a small (32-bit) and a bfloat16 parameter."""
    generator = torch.Generator().manual_seed(0)
    shapes = (((64, 128), torch.float32), ((7,), torch.float32), ((64, 64), torch.bfloat16))
    parameters = [torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape, dtype in shapes]
    optimizer = kind(parameters, lr=1e-2, weight_decay=0.01)
    for _ in range(steps):
        step(optimizer, generator)
    return optimizer, parameters, generator


def step(optimizer, generator) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def write(folder, number: int, keep: int = 10, **more):
    """A checkpoint whose content depends on its number."""
    adapter = {"a.lora_A.weight": torch.full((2, 3), float(number))}
    return write_checkpoint(folder, number, adapter, {"r": 2}, {"progress": {"step": number}, **more}, keep)


def state_of(step: int) -> dict:
    """The state that a run of the default settings leaves after a step, without its tensors."""
    return {
        "progress": dataclasses.asdict(Progress(step=step)),
        "optimizer": {},
        "scheduler": {"last_epoch": step},
        "scaler": {},
        "best_adapter": {},
        "config": settings(Config()),
        "fingerprint": prints_of(),
        "shape": {"window": 16, "micro_batch": 1, "checkpointed": 0, "processes": 1},
    }


def ignore(line: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.AdamW32bit, torch.optim.AdamW])
def test_optimizer_state_survives_the_round_trip_bit_for_bit(kind):
    optimizer, _, _ = stepped(kind)
    state = optimizer.state_dict()
    assert same(round_trip(state), state)
    first = state["state"][0]
    if kind is bnb.optim.AdamW8bit:
        nested = first["__bnb_optimizer_quant_state__"]
        assert nested["state1"].dtype is torch.uint8  # else this test would not look at 8-bit states


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.AdamW32bit, torch.optim.AdamW])
def test_restored_optimizer_goes_on_as_the_one_that_was_never_stopped(kind, tmp_path):
    optimizer, parameters, generator = stepped(kind)
    write(tmp_path, 1, optimizer=optimizer.state_dict())
    again, copies, _ = stepped(kind, steps=0)
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.data.copy_(parameter.data)
    again.load_state_dict(read_checkpoint(tmp_path / "checkpoint-1")[1]["optimizer"])
    before = generator.get_state()
    for _ in range(3):
        step(optimizer, generator)
    generator.set_state(before)
    for _ in range(3):
        step(again, generator)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    assert same(again.state_dict()["state"], optimizer.state_dict()["state"])


def test_state_keeps_types_of_keys_and_values(tmp_path):
    base = torch.arange(12, dtype=torch.float32)
    state = {
        "numbers": {0: 1, 10: 2.5, -3: None, "0x": True},
        "empty": [{}, [], ""],
        "text": "μ 中",
        "extremes": [2**40, 1e-300, float("inf"), -0.0],
        "lists": [[1, [2, {"three": torch.tensor(3)}]], (4, 5)],
        "tensors": [
            torch.tensor(2.0),
            torch.zeros(0, 3),
            torch.tensor([True, False]),
            torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
            torch.tensor([2**62]),
            torch.arange(6, dtype=torch.uint8).reshape(2, 3).t(),  # not contiguous
            base[:4],
            base[2:8],  # shares the storage of the one before
        ],
    }
    write(tmp_path, 4, **state)
    _, restored = read_checkpoint(tmp_path / "checkpoint-4")
    assert same({key: restored[key] for key in state}, state)


def test_tensors_under_names_that_look_alike_stay_apart():
    state = {1: torch.tensor([1]), "1": torch.tensor([2]), "a": {"b": torch.tensor([3])}, "a.b": torch.tensor([4])}
    assert same(round_trip(state), state)


# ------------------------------------------------------------------------------------------------ written and found


def test_checkpoint_holds_the_files_it_names_and_no_pickle(tmp_path):
    folder = write(tmp_path, 7, best=torch.ones(3))
    assert folder == tmp_path / "checkpoint-7"
    assert {path.name for path in folder.iterdir()} == FILES
    assert set(json.loads((folder / "checksums.json").read_text(encoding="utf-8"))) == FILES - {"checksums.json"}
    adapter, state = read_checkpoint(folder)
    assert torch.equal(adapter["a.lora_A.weight"], torch.full((2, 3), 7.0))
    assert state["progress"] == {"step": 7} and torch.equal(state["best"], torch.ones(3))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-7"}


def test_newest_is_by_number_and_other_names_are_not_checkpoints(tmp_path):
    for number in (9, 20, 100):
        write(tmp_path, number)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-3-old", "checkpoint-5.bak", "mycheckpoint-8"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert latest_checkpoint(tmp_path, ignore)[0].name == "checkpoint-100"
    assert latest_checkpoint(tmp_path / "absent", ignore) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_save_total_limit(tmp_path, keep):
    for number in range(1, 6):
        write(tmp_path, number, keep)
        expected = [f"checkpoint-{n}" for n in range(number, max(0, number - keep), -1)]
        assert [path.name for path in checkpoints(tmp_path)] == expected
    assert {path.name for path in tmp_path.iterdir()} == set(expected)  # nothing else lies about


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoint_of_an_abandoned_future_does_not_outlive_the_one_just_written(tmp_path, keep):
    """After going back (the newest was damaged, or an older one was asked for) the newest is the one written last."""
    for number in (3, 6, 9):
        write(tmp_path, number, 3)
    (tmp_path / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"damaged")
    write(tmp_path, 7, keep)
    assert latest_checkpoint(tmp_path, ignore)[0].name == "checkpoint-7"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-7", "checkpoint-6"][:keep]


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["half", "empty", "absent", "bit"])
def test_damaged_file_is_noticed_and_the_checkpoint_before_is_taken(tmp_path, name, damage):
    write(tmp_path, 3, moments=torch.randn(50))
    folder = write(tmp_path, 6, moments=torch.randn(50))
    path = folder / name
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    with pytest.raises(ValueError, match=r"\w"):
        read_checkpoint(folder)
    lines = []
    found = latest_checkpoint(tmp_path, lines.append)
    assert found[0].name == "checkpoint-3" and found[2]["progress"] == {"step": 3}
    assert len(lines) == 1 and "checkpoint-6" in lines[0] and "\n" not in lines[0]


def test_no_undamaged_checkpoint_is_none_with_a_line_each(tmp_path):
    for number in (1, 2):
        (write(tmp_path, number) / "training_state.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-4").write_text("a file, not a folder", encoding="utf-8")
    lines = []
    assert latest_checkpoint(tmp_path, lines.append) is None
    assert [line.split()[0] for line in lines] == [f"checkpoint-{n}" for n in (4, 3, 2, 1)]


@pytest.mark.parametrize("sums", ["{}", "[]", "null", "7"])
def test_checksums_that_name_nothing_vouch_for_nothing(tmp_path, sums):
    folder = write(tmp_path, 1)
    (folder / "checksums.json").write_text(sums, encoding="utf-8")
    with pytest.raises(ValueError):
        read_checkpoint(folder)


# ------------------------------------------------------------------------------------------------ crashes


class Crash(BaseException):
    """Stands for a kill: nothing in the program catches it."""


CALLS = [(checkpoints_module, "write_atomically"), (os, "replace"), (os, "rename"), (os, "fsync"), (shutil, "rmtree")]


@pytest.mark.parametrize("module, function", CALLS, ids=[name for _, name in CALLS])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_crash_at_any_write_leaves_only_whole_checkpoints(tmp_path, monkeypatch, module, function, moment):
    """A step is written again over an older folder, and an old one is deleted: every path of write_checkpoint."""
    real = getattr(module, function)
    crashes = 0
    for fatal in range(40):
        output_dir = tmp_path / str(fatal)
        for number in (2, 4):
            write(output_dir, number)
        calls = iter(range(100))

        def fails(*arguments, calls=calls, fatal=fatal, **keywords):
            now = next(calls) == fatal
            if now and moment == "before":
                raise Crash
            result = real(*arguments, **keywords)
            if now:
                raise Crash
            return result

        monkeypatch.setattr(module, function, fails)
        try:
            write(output_dir, 4, keep=1)
            done = True
        except Crash:
            done, crashes = False, crashes + 1
        finally:
            monkeypatch.setattr(module, function, real)
        for folder in checkpoints(output_dir):
            read_checkpoint(folder)  # raises where a folder with the name is not a checkpoint
        assert latest_checkpoint(output_dir, pytest.fail) is not None  # one of the two is always there
        clean_up(output_dir)
        assert {path.name for path in output_dir.iterdir()} <= {"checkpoint-2", "checkpoint-4"}
        if done:
            break
    assert done and crashes, "the loop has to meet every call once, and there have to be some"


@pytest.mark.parametrize("module, function", CALLS[1:4], ids=[name for _, name in CALLS[1:4]])
def test_write_that_the_disk_refuses_keeps_what_was_there(tmp_path, monkeypatch, module, function):
    """A full or read-only disk at every call of a write: an error, the checkpoints of before, and no litter."""
    real, failures = getattr(module, function), 0
    for fatal in range(40):
        output_dir = tmp_path / str(fatal)
        for number in (2, 4):
            write(output_dir, number)
        calls, failed = iter(range(100)), []

        def fails(*arguments, calls=calls, fatal=fatal, failed=failed, **keywords):
            if next(calls) == fatal:
                failed.append(True)
                raise OSError(28, "No space left on device")
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(module, function, fails)
            try:
                write(output_dir, 4, keep=2, moments=torch.ones(4))
                written = True
            except OSError:
                written = False
        failures += bool(failed)
        assert {path.name for path in output_dir.iterdir()} == {"checkpoint-2", "checkpoint-4"}
        for folder in checkpoints(output_dir):
            assert ("moments" in read_checkpoint(folder)[1]) <= (folder.name == "checkpoint-4")
        assert written == ("moments" in read_checkpoint(output_dir / "checkpoint-4")[1]) or failed
        if not failed:
            break
    assert failures, "there have to be some calls"


def test_old_checkpoint_that_cannot_be_deleted_is_no_failed_write(tmp_path, monkeypatch):
    """Windows, where a virus scanner or an open window holds it."""
    write(tmp_path, 2)
    real = os.rename

    def held(source, target):
        if source.name == "checkpoint-2":
            raise PermissionError(13, "in use")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", held)
        write(tmp_path, 4, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
    write(tmp_path, 6, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6"]


@pytest.mark.skipif(not hasattr(os, "setresuid") or os.geteuid() != 0, reason="becomes another user, as only root can")
def test_read_only_checkpoint_stays_and_blocks_nothing():
    """It is not deleted, and nothing is left that the next start stumbles over. As its owner: nothing is refused to root."""
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others
        folder = Path(name)
        write(folder, 2)
        half = folder / f"{TEMPORARY}checkpoint-3"
        half.mkdir()
        (half / "a").write_bytes(b"half")
        for path in (folder, half, folder / "checkpoint-2"):
            os.chown(path, 65534, 65534)
            path.chmod(0o700 if path == folder else 0o500)
        os.setresuid(65534, 65534, 0)
        try:
            clean_up(folder)
            for number in (4, 6):
                write(folder, number, keep=1)
            assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-6"}
        finally:
            os.setresuid(0, 0, 0)


def test_link_in_the_place_of_a_checkpoint_is_removed_and_not_followed(tmp_path):
    outside = write(tmp_path / "outside", 2)
    output_dir = tmp_path / "output"
    output_dir.mkdir()
    for name in ("checkpoint-2", f"{TEMPORARY}checkpoint-4", "checkpoint-4"):
        (output_dir / name).symlink_to(outside)
    write(output_dir, 4, keep=1)
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-4"]
    assert not (output_dir / "checkpoint-4").is_symlink() and {path.name for path in outside.iterdir()} == FILES


def test_half_deleted_folder_is_never_one_with_the_name(tmp_path, monkeypatch):
    """rmtree that dies in the middle, with some files gone, is the worst of crashes."""
    real = shutil.rmtree

    def dies(path, *arguments, **keywords):
        files = sorted(path.iterdir()) if path.exists() else []
        if not files:
            return real(path, *arguments, **keywords)
        files[0].unlink()
        raise Crash

    for number in (2, 4):
        write(tmp_path, number)
    for number, keep in ((4, 5), (6, 1)):  # the same step again; an old one too many
        monkeypatch.setattr(shutil, "rmtree", dies)
        with pytest.raises(Crash):
            write(tmp_path, number, keep)
        monkeypatch.setattr(shutil, "rmtree", real)
        for folder in checkpoints(tmp_path):
            read_checkpoint(folder)
        clean_up(tmp_path)


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    write(tmp_path, 2)
    half = tmp_path / f"{TEMPORARY}checkpoint-4"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / f"{TEMPORARY}metrics.jsonl").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    clean_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "notes.txt"}
    write(tmp_path, 4)
    assert latest_checkpoint(tmp_path, pytest.fail)[0].name == "checkpoint-4"


def test_leftover_of_the_same_step_is_not_mixed_in(tmp_path):
    half = tmp_path / f"{TEMPORARY}checkpoint-4"
    half.mkdir()
    (half / "old.bin").write_bytes(b"old")
    folder = write(tmp_path, 4)
    assert {path.name for path in folder.iterdir()} == FILES


def test_atomic_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_atomically(path, b"old")
    real = os.replace

    def fails(*arguments):
        raise Crash

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(Crash):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.setattr(os, "replace", real)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# ------------------------------------------------------------------------------------------------ resume


def prints_of(weight: float = 0.0, token: int = 7, cut: int = 4, word: str = "a") -> dict[str, str]:
    """The fingerprint of a frozen weight, an adapter that says nothing about it, five tokens and a word."""
    model = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, weight).requires_grad_(False)
    model.lora_A = torch.nn.Parameter(torch.randn(2))
    part = Blocks((np.array([1, 2, 3, 4, token], np.int32),), 4, np.array([0, cut, 5]), 1, 1)
    return fingerprint(model, SimpleNamespace(get_vocab=lambda: {word: 0}), {"train": part, "validation": None})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, set()),
        ({"weight": 1.0}, {"model", "weights"}),
        ({"token": 8}, {"data"}),
        ({"cut": 3}, {"data"}),
        ({"word": "b"}, {"tokenizer"}),
    ],
)
def test_fingerprint_tells_apart_what_a_run_learns_from(change, part):
    before, now = prints_of(), prints_of(**change)
    assert {name for name in before if before[name] != now[name]} == part


def sized(model: torch.nn.Module) -> dict[str, str]:
    part = Blocks((np.array([1, 2, 3, 4, 5], np.int32),), 4, np.array([0, 4, 5]), 1, 1)
    return fingerprint(model, SimpleNamespace(get_vocab=lambda: {"a": 0}), {"train": part, "validation": None})


@pytest.mark.parametrize("element", [0, 256, 4001, 100 * 100 - 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fingerprint_sees_one_element_anywhere(element, dtype):
    model = torch.nn.Linear(100, 100, bias=False, dtype=dtype).requires_grad_(False)
    before = sized(model)
    model.weight.view(-1)[element] += 1
    now = sized(model)
    assert before["weights"] != now["weights"] and (before["model"] != now["model"]) == (element < 256)


def test_fingerprint_sees_swapped_rows_and_other_scales():
    """Both keep what the other hash looks at: the sum of the bytes, and the packed weights."""
    model = torch.nn.Linear(128, 128, bias=False).requires_grad_(False)
    before = sized(model)
    model.weight.copy_(model.weight[list(range(64)) + list(range(127, 63, -1))])
    assert sized(model)["weights"] != before["weights"]
    packed = bnb.nn.Linear4bit(128, 128, bias=False, quant_storage=torch.uint8)
    packed.weight = bnb.nn.Params4bit(model.weight, requires_grad=False).to("cpu")
    packed.weight = packed.weight if packed.weight.quant_state else packed.weight._quantize("cpu")
    before = sized(packed)
    packed.weight.quant_state.absmax[-1] += 1
    now = sized(packed)
    assert before["model"] == now["model"] and before["weights"] != now["weights"]


def test_checkpoint_from_before_the_second_hash_is_compared_by_the_first():
    """Their fingerprint has three hashes: what it cannot tell is not asked, and what it can tell is."""
    old = {name: value for name, value in prints_of().items() if name != "weights"}
    state = {"config": settings(Config()), "fingerprint": old, "shape": {"window": 16}}
    now = prints_of()
    check_resumable(state, Config(), now | {"weights": "another"}, 16, "checkpoint-2")
    with pytest.raises(ConfigError, match="^model.name: its content has changed since checkpoint-2"):
        check_resumable(state, Config(), now | {"model": "another"}, 16, "checkpoint-2")
    new = state | {"fingerprint": now}
    with pytest.raises(ConfigError, match="^model.name: its content has changed since checkpoint-2"):
        check_resumable(new, Config(), now | {"weights": "another"}, 16, "checkpoint-2")


def test_resume_refuses_every_change_of_what_is_learned_and_no_other():
    prints = prints_of()
    for name in LEAVES:
        state = {"config": settings(Config()) | {name: "another"}, "fingerprint": prints, "shape": {"window": 16}}
        if LEAVES[name].field.metadata["resumable"] or name in ("model.name", "data.dataset"):  # content, not path
            check_resumable(state, Config(), prints, 16, "checkpoint-2")
        else:
            with pytest.raises(ConfigError) as caught:
                check_resumable(state, Config(), prints, 16, "checkpoint-2")
            (problem,) = caught.value.problems
            assert problem.startswith(f"{name}: was another in checkpoint-2, is ") and "--overwrite" in problem


def test_resume_refuses_other_contents_and_another_window():
    other = prints_of(weight=1.0, token=8, word="b")
    state = {"config": settings(Config()), "fingerprint": prints_of(), "shape": {"window": 8}}
    with pytest.raises(ConfigError) as caught:
        check_resumable(json.loads(json.dumps(state)), Config(), other, 16, "checkpoint-2")
    names = [
        "training.batch_size x training.gradient_accumulation_steps",
        "model.name",
        "data.dataset",
        "the tokenizer",
    ]
    (problem,) = caught.value.problems
    *parts, _ = problem.split("; ")
    assert [part.split(":")[0] for part in parts] == names
    assert all("its content has changed since checkpoint-2 was written" in part for part in parts[1:])


@pytest.mark.parametrize(
    ("changes", "now", "named"),
    [
        ({"lora.target_modules": ["q_proj"]}, {"weight": 1.0}, ["lora.target_modules"]),
        ({"quantization.quant_type": "fp4"}, {"weight": 1.0}, ["quantization.quant_type"]),
        ({"quantization.experts": "16bit"}, {"weight": 1.0}, ["quantization.experts"]),
        ({"quantization.experts": "16bit"}, {}, []),  # a model without experts
        ({"quantization.experts": "cpu"}, {}, []),
        ({"data.max_length": 64}, {"token": 8}, ["data.max_length"]),
        ({"data.max_eval_samples": 5}, {"token": 8}, ["data.max_eval_samples"]),
        ({"training.seed": 1}, {"token": 8}, ["training.seed"]),
        ({"data.dataset": "moved"}, {}, []),
        ({"data.dataset": "moved"}, {"token": 8}, ["data.dataset"]),
        ({"model.name": "./moved"}, {"weight": 1.0, "word": "b", "token": 8}, ["model.name"]),
        ({"lora.rank": 8}, {"token": 8}, ["lora.rank", "data.dataset"]),  # which explains nothing of the data
    ],
)
def test_changed_content_is_named_by_the_setting_that_explains_it(changes, now, named):
    before = settings(Config()) | {"data.dataset": "./gone"} | changes
    state = {"config": before, "fingerprint": prints_of(), "shape": {"window": 16}}
    config = load_config((), {"data.dataset": "./gone"} if "data.dataset" not in changes else {})
    with pytest.raises(ConfigError) if named else contextlib.nullcontext() as caught:
        check_resumable(state, config, prints_of(**now), 16, "checkpoint-2")
    if named:
        *parts, _ = caught.value.problems[0].split("; ")
        assert [part.split(":")[0] for part in parts] == named and ": was " in parts[0]


def test_checkpoint_to_go_on_from(tmp_path):
    for number in (2, 4):
        write(tmp_path, number, **state_of(number))
    training = dataclasses.replace(Config().training, output_dir=str(tmp_path))
    assert find_checkpoint(training, False, ignore)[0].name == "checkpoint-4"
    assert find_checkpoint(training, True, ignore) is None
    assert find_checkpoint(dataclasses.replace(training, resume="never"), False, ignore) is None
    older = dataclasses.replace(training, resume=str(tmp_path / "checkpoint-2"))
    assert find_checkpoint(older, False, ignore)[2]["progress"]["step"] == 2
    with pytest.raises(ConfigError, match="training.resume: cannot continue from nowhere"):
        find_checkpoint(dataclasses.replace(training, resume="nowhere"), False, ignore)
    for folder in checkpoints(tmp_path):
        (folder / "checksums.json").unlink()
    with pytest.raises(
        ConfigError, match="are damaged; use --overwrite to start over"
    ):  # rather than that nobody asked for it
        find_checkpoint(training, False, ignore)
    write(tmp_path, 6)
    with pytest.raises(
        ConfigError, match="checkpoint-6 is of another model or version, .* its state: expected best_adapter, config"
    ):
        find_checkpoint(training, False, ignore)


@pytest.mark.parametrize(
    "edit, line",
    [
        ({"pieces": 3}, r"shape.pieces: expected one of 1, 4, 8, got 3"),
        ({"kept_attention": "3"}, r"shape.kept_attention: expected a whole number from 0 to \d+, got '3'"),
        ({"kept": -1}, r"shape.kept: expected a whole number from 0 to \d+, got -1"),
    ],
)
def test_a_shape_that_no_run_writes_is_refused(tmp_path, edit, line):
    state = state_of(2)
    write(tmp_path, 2, **state | {"shape": state["shape"] | edit})
    training = dataclasses.replace(Config().training, output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=line):
        find_checkpoint(training, False, ignore)


def test_progress_counts_steps_and_finds_evaluations():
    progress = Progress()
    progress.count(6.0, 3, 4, 0.5)
    progress.count(2.0, 1, 7, 0.25)
    progress.history += [{"step": 0, "eval_loss": 2.0}, {"step": 2, "loss": 2.0}]
    fields = (progress.step, progress.tokens, progress.loss_sum, progress.loss_tokens, progress.seconds)
    assert fields == (2, 4, 8.0, 4, 0.75) and progress.positions == 11
    assert progress.evaluations == progress.history[:1]
    assert Progress(**dataclasses.asdict(progress)) == progress


# ------------------------------------------------------------------------------------------------ the output folder


@pytest.mark.parametrize("fresh", [True, False])
def test_output_folder_is_as_of_the_step(tmp_path, fresh):
    """A fresh run takes the place of the one before; a resumed one keeps all but the rows after its checkpoint."""
    output_dir = tmp_path / "output"
    write(output_dir, 2)
    for name in (*RESULTS, "notes.txt", f"{TEMPORARY}metrics.jsonl"):
        (output_dir / name).write_text("before", encoding="utf-8")
    config = load_config((), {"training.output_dir": str(output_dir), "training.resume": "never"})
    history = [] if fresh else [{"step": 0, "eval_loss": 2.0}]
    assert open_output(config, history, fresh) == output_dir
    kept = {"notes.txt", "metrics.jsonl", "config.yaml"} | (set() if fresh else {*RESULTS, "checkpoint-2"})
    assert {path.name for path in output_dir.iterdir()} == kept
    rows = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, rows)) == history
    assert load_config(output_dir / "config.yaml").training.resume == "auto"  # started again as it stands, it goes on


def test_the_models_own_folder_is_no_output_folder(tmp_path):
    """Its tokenizer has the names of the one that a run leaves, which a fresh run removes first."""
    (tmp_path / "tokenizer.json").write_text("the model's", encoding="utf-8")
    config = load_config((), {"training.output_dir": f"{tmp_path}/", "model.name": str(tmp_path)})
    with pytest.raises(ConfigError, match="^training.output_dir: .* is the folder of model.name"):
        open_output(config, [], fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_lock_is_one_runs_alone_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        with pytest.raises(ConfigError, match="another run is writing in"), locked(folder):
            pytest.fail("two runs in one folder")
        training = dataclasses.replace(Config().training, output_dir=str(folder))
        with pytest.raises(ConfigError, match="another run is writing in"):
            check_output(training)
        assert (folder / LOCK).exists()
    assert not list(tmp_path.iterdir())  # nothing was written in it
    with locked(folder):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    check_output(training)


def test_taking_the_folder_puts_back_what_a_kill_left_between_two_names(tmp_path):
    """Before a checkpoint to go on from is looked for: with save_total_limit 1 it is the only one."""
    folder = write(tmp_path, 4)
    os.rename(folder, tmp_path / f".replaced-{folder.name}")
    with locked(tmp_path):
        assert latest_checkpoint(tmp_path, pytest.fail)[0] == folder


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_space_is_what_checkpoints_take(train, monkeypatch, capsys, optim):
    """Measured on a run: never less than its three checkpoints and the adapter, and not twice as much."""
    code, folder = train("--optim", optim, "--rank", 16, "--save_steps", 1, "--save_total_limit", 3)
    assert code == 0
    sizes = [tensor.numel() for tensor in read_checkpoint(folder / "checkpoint-3")[0].values()]
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    training = dataclasses.replace(Config().training, output_dir="nowhere", save_total_limit=2, optim=optim)
    for free in (written, 2 * written):
        if free == written:
            with pytest.raises(
                ConfigError, match=r"expected \d+ MB free in .* for the adapter and 3 checkpoints .*, got \d+ MB"
            ):
                check_space(training, sizes)
        else:
            check_space(training, sizes)
    free = written // 2  # what is there already need not be found again
    check_space(dataclasses.replace(training, output_dir=str(folder)), sizes)
    free = 1000
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train("--optim", optim, "--rank", 16, "--max_steps", 4, "--save_total_limit", 9)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: training.output_dir: expected") and line.endswith("got 0 MB")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_folder_that_lets_nobody_delete_is_refused(tmp_path, monkeypatch):
    """As an append-only one: chattr +a."""

    def refuse(path, **keywords):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(ConfigError, match="^training.output_dir: cannot write in .*: Operation not permitted$"):
        check_output(dataclasses.replace(Config().training, output_dir=str(tmp_path / "output")))


def test_log_waits_for_its_folder(tmp_path, capsys):
    log = Log(silent=False)
    log.row({"step": 0})  # before the folder is known to be the run's, nothing is written
    log.say("one ✓")
    assert not list(tmp_path.iterdir())
    log.open(tmp_path)
    log.say("two")
    log.row({"step": 1, "loss": 2.0})
    assert (tmp_path / "training_log.txt").read_text(encoding="utf-8") == "one ✓\ntwo\n"
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "loss": 2.0}\n'
    Log(silent=True).say("three")
    assert capsys.readouterr().out == "one ✓\ntwo\n"


def test_log_keeps_what_a_full_disk_does_not_take(tmp_path):
    """No half line, nothing lost once there is room, and an error where there never is."""
    resource = pytest.importorskip("resource")  # Windows has no such limits
    log = Log(silent=False)
    log.open(tmp_path)
    log.say("one")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        log.say("two, which is longer than what fits")
        log.row({"step": 1})
        assert (tmp_path / "training_log.txt").read_text(encoding="utf-8") == "one\n"
        with pytest.raises(OSError):
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.say("three")
    lines = (tmp_path / "training_log.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["one", "two, which is longer than what fits", "three"]
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n'


def test_log_outlives_its_console(tmp_path, monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        flush = close = lambda self: None

    log = Log(silent=False)
    log.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        log.say("one")
    assert (tmp_path / "training_log.txt").read_text(encoding="utf-8") == "one\n"


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request_and_the_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    lines = []
    with stop_on_signal(lines.append) as request:
        assert request.signum is None
        signal.raise_signal(number)
        assert request.signum == number and len(lines) == 1
    assert {n: signal.getsignal(n) for n in before} == before


HANGUP = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")


@HANGUP
def test_terminal_that_closes_hangs_up_twice_and_stops_the_run_once(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"exit {code}"))
    with stop_on_signal(ignore) as request:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert request.signum == signal.SIGHUP and 128 + request.signum == 129


@HANGUP
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(ignore) as request:
            signal.raise_signal(signal.SIGHUP)
        assert request.signum is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_signal_exits_at_once(monkeypatch):
    codes, lines = [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    with stop_on_signal(lines.append, lambda: "how to continue"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert codes == [128 + signal.SIGINT] and lines[1] == "how to continue"


def test_the_line_after_a_second_signal_names_the_checkpoint(tmp_path):
    none = "stopped at once; there is no checkpoint yet; to start again:\n  train"
    assert stopped_at_once(tmp_path / "absent", "train") == stopped_at_once(tmp_path, "train") == none
    for step in (9, 10, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / ".writing-checkpoint-11").mkdir()
    last = tmp_path / "checkpoint-10"
    assert stopped_at_once(tmp_path, "train") == f"stopped at once; to continue from {last}:\n  train"


def test_ctrl_c_before_the_first_step_is_a_line(monkeypatch):
    """A script's imports leave SIGINT at its default, which ends the process without a word."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    lines = []
    try:
        with interrupted_early(lines.append):
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not interrupted")
        assert lines == ["stopped before the first step; the same command starts again"]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)

"""The plan of layers that are swapped to main memory: what they take, when they pay, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from config import ConfigError, load_config
from fast_path import families, swapping
from tests.conftest import ROOT
from toolkit import memory, memory_plan
from toolkit.cards import Rates
from toolkit.control_groups import free_in_groups
from toolkit.memory_plan import COMPILED, GIB, MemoryPlan, fit, most_swapped, plan_memory, step_down, step_seconds
from toolkit.model_shape import model_shape

SLOW = Rates(20e12, 100e9, 8e9, 16 * GIB)  # much like an RTX 4060 in a machine with 32 GiB


def settings(**overrides):
    return load_config((), {name.replace("__", "."): value for name, value in overrides.items()})


@pytest.fixture
def shape(qwen_3b):
    return model_shape(str(qwen_3b))


def test_a_plan_with_swapped_layers_holds_no_inputs_of_theirs_but_one_more_layer(shape):
    config = settings(data__max_length=512)
    before, after = (plan_memory(shape, config, 4, 32, swapped=swapped) for swapped in (0, 8))
    tokens, hidden = 4 * 512, "checkpointed hidden states"
    saved = memory_plan.saved_bytes(shape, config, COMPILED) * tokens
    assert before.parts[hidden] - after.parts[hidden] == 8 * tokens * shape.hidden * 2
    assert after.waiting == 8 * saved and after.swapped == 8 and not before.waiting
    live = "one live layer, forward and backward"
    full = [plan_memory(shape, config, 4, 36, swapped=swapped).parts[live] for swapped in (0, 8)]
    in_place = 4 * shape.inner * tokens  # where a recomputed layer writes the gradients of gate and up
    assert full[1] - full[0] == saved + in_place
    # Four layers are not checkpointed: their memory is free again when the swapped ones come back.
    assert after.parts[live] == before.parts[live]
    assert "micro-batch 4, 32 of 36 layers checkpointed, 8 of them swapped" in after.shape
    assert (
        f"(swapped, in pinned main memory    {8 * saved / GIB:8.3f})" in after.table()
        and "swapped" not in before.table()
    )
    assert plan_memory(shape, config, 4, 36, swapped=99).swapped == 35  # never the last layer
    assert plan_memory(shape, config, 4, 36, offload=True, swapped=9).swapped == 0


def test_as_many_layers_are_swapped_as_the_bus_carries_and_main_memory_holds(shape):
    config = settings(data__max_length=512)
    each = memory_plan.saved_bytes(shape, config, COMPILED) * 4 * 512
    slower = dataclasses.replace(SLOW, link=4e9)
    free, all_of_them = (step_seconds(shape, config, slower, 4, n) for n in (0, 36))
    most = most_swapped(shape, config, slower, 4, 36)
    assert 10 < most < 36 and most * each / slower.link <= all_of_them - free < (most + 1) * each / slower.link
    half = dataclasses.replace(SLOW, main_memory=9 * each)
    assert most_swapped(shape, config, half, 4, 36) == 9
    assert most_swapped(shape, config, dataclasses.replace(SLOW, main_memory=0), 4, 36) == 0
    assert most_swapped(shape, config, dataclasses.replace(SLOW, link=1e12), 4, 36) == 36
    assert most_swapped(shape, config, SLOW, 4, 0) == 0
    assert step_seconds(shape, config, SLOW, 4, 36, swapped=36) == pytest.approx(free)


def test_the_fastest_shape_that_fits_swaps_layers_where_that_pays(shape):
    config, limit = settings(data__max_length=512), 3.3 * GIB
    without, found = (
        fit(shape, config, 16, limit, rates) for rates in (dataclasses.replace(SLOW, main_memory=0), SLOW)
    )
    assert found.swapped and not without.swapped and found.total <= limit and found.waiting <= SLOW.main_memory

    def seconds(plan):
        how = plan.checkpointed, plan.rows_apart > 0, plan.kept, plan.swapped
        return step_seconds(shape, config, SLOW, plan.micro_batch, *how) / plan.micro_batch

    assert seconds(found) < 0.9 * seconds(without)
    assert fit(shape, config, 16, 30 * GIB, SLOW).swapped == 0  # all layers keep their activations on the GPU
    assert fit(shape, config, 16, limit, dataclasses.replace(SLOW, link=0.3e9)).swapped == 0  # too little to gain
    others = dataclasses.replace(SLOW, main_memory=0)
    for gib in (3.5, 4, 5, 6, 7, 8, 12):
        chosen, best = (fit(shape, config, 16, gib * GIB, rates) for rates in (SLOW, others))
        assert chosen == best or (chosen.swapped and seconds(chosen) < 0.9 * seconds(best))
    given = fit(shape, settings(data__max_length=512, performance__swap_activations=3), 16, limit, Rates())
    assert given.swapped == 3


@pytest.mark.parametrize(
    ("overrides", "changes", "reason"),
    [
        ({"performance__compile": "off"}, {}, "it needs compiled layers"),
        ({"performance__fused_lora": "off"}, {}, "it needs compiled layers"),
        ({"training__gradient_checkpointing": "offload"}, {}, "offload already keeps the layers' inputs"),
        ({}, {"family": families.UNKNOWN}, "families.py has no layers of this model"),
        ({}, {"processes": 2}, "it is for one process"),
    ],
)
def test_what_cannot_be_swapped_is_not_and_a_number_is_refused(shape, overrides, changes, reason):
    changed = dataclasses.replace(shape, **changes)
    assert most_swapped(changed, settings(**overrides), SLOW, 4, 36) == 0
    assert most_swapped(changed, settings(**overrides, performance__swap_activations=0), SLOW, 4, 36) == 0
    numbered = settings(**overrides, performance__swap_activations=7)
    with pytest.raises(ConfigError, match=rf"performance.swap_activations: expected auto or 0, got 7: .*{reason}"):
        fit(changed, numbered, 16, 24 * GIB, SLOW)


def test_a_run_on_a_cpu_refuses_a_number(train, capfd):
    code, folder = train("--swap_activations", 2)
    assert code == 2 and not folder.exists()
    line = "error: performance.swap_activations: expected auto or 0, got 2: there is no CUDA GPU"
    assert line in capfd.readouterr().err.splitlines()
    code, _ = train("--swap_activations", 0, "--max_steps", 1)
    assert code == 0


def test_a_resumed_run_swaps_what_it_did_as_far_as_main_memory_goes(shape, monkeypatch):
    config = settings(data__max_length=512)
    saved = plan_memory(shape, config, 4, 36, swapped=8).saved()
    each = memory_plan.saved_bytes(shape, config, COMPILED) * 4 * 512

    def again(free, config=config, saved=saved):
        monkeypatch.setattr(memory, "main_memory", lambda: free)
        return memory.choose_plan(shape, config, 16, None, 24 * GIB, saved).swapped

    assert saved["swapped"] == 8 and [again(free) for free in (99 * each, 8 * each, 5.5 * each, 0)] == [8, 8, 5, 0]
    assert again(99 * each, saved={name: value for name, value in saved.items() if name != "swapped"}) == 0
    assert again(0, settings(data__max_length=512, performance__swap_activations=3)) == 3
    assert again(99 * each, settings(data__max_length=512, performance__compile="off")) == 0


def test_without_auto_fit_or_with_deterministic_only_a_number_swaps(shape):
    for overrides, expected in (
        ({"performance__auto_fit": False}, 0),
        ({"performance__auto_fit": False, "performance__swap_activations": 5}, 5),
        ({"performance__deterministic": True}, 0),
        ({"performance__deterministic": True, "performance__swap_activations": 5}, 5),
    ):
        config = settings(data__max_length=512, training__gradient_checkpointing=True, **overrides)
        assert memory.choose_plan(shape, config, 16, torch.device("cpu"), 3.3 * GIB, {}).swapped == expected


def test_all_processes_take_the_number_that_the_first_one_chose(qwen_3b, monkeypatch):
    config = settings(model__name=str(qwen_3b), data__max_length=512)
    monkeypatch.setattr(memory, "memory_limit", lambda *_: 3.3 * GIB)
    monkeypatch.setattr(memory, "rates_here", lambda device, config, shape: SLOW)
    monkeypatch.setattr(memory, "gathered", lambda value: json.loads(json.dumps([value])))
    said = []
    plan = memory.plan_run(config, SimpleNamespace(device=None, num_processes=1), 16, {}, said.append)
    assert plan.swapped and plan.waiting and any("of them swapped" in line for line in said)


def test_a_shape_that_ran_out_of_memory_swaps_on_until_inputs_wait_in_main_memory(shape):
    plan = plan_memory(shape, settings(data__max_length=512), 1, 30, swapped=8)
    smaller = step_down(plan, 1, compiled=True)
    assert (smaller.checkpointed, smaller.swapped) == (36, 8)
    last = step_down(smaller, 1, compiled=True)
    assert last.offload and not last.swapped and not last.waiting
    assert step_down(MemoryPlan({}, 1, 8, 8, swapped=2), 1, compiled=False) is None


@pytest.mark.compiled
def test_a_run_with_swapped_layers_learns_the_same_and_goes_on_where_main_memory_is_short(train, monkeypatch, tmp_path):
    flags = (
        "--fused_lora",
        "on",
        "--compile",
        "on",
        "--gradient_checkpointing",
        4,
        "--max_steps",
        2,
        "--compute_dtype",
        "float32",
    )
    code, told = train(*flags, output_dir=tmp_path / "told")
    assert code == 0
    monkeypatch.setattr(swapping, "SMALL", 4096)
    unplanned, made = memory_plan.unplanned, []
    monkeypatch.setattr(memory_plan, "unplanned", lambda *a: dataclasses.replace(unplanned(*a), swapped=2))
    monkeypatch.setattr(swapping, "pinned", lambda size, pin: made.append(size) or torch.empty(size, dtype=torch.uint8))
    code, found = train(*flags, output_dir=tmp_path / "found")
    assert code == 0 and len(made) > 6

    def refuse(size, pin):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(swapping, "pinned", refuse)
    code, short = train(*flags, output_dir=tmp_path / "short")
    log = (short / "training_log.txt").read_text(encoding="utf-8")
    assert code == 0 and "out of main memory with micro-batch 2, 4 of 4 layers checkpointed, 2 of them swapped" in log
    assert "repeating the step with micro-batch 2, 4 of 4 layers checkpointed; the effective" in log
    a, b, c = ((folder / "adapter_model.safetensors").read_bytes() for folder in (told, found, short))
    assert a == b == c


def group(folder, limit, used, cached=0, version=2):
    """Make a control group's files, in GiB. limit: a number or max."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, size in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{size if size == 'max' else int(size * GIB)}\n")
    word = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 17\n{word} {int(cached * GIB)}\nactive_file 5\n")


@pytest.mark.parametrize(
    ("line", "groups", "expected"),
    [
        ("0::/", {"": ("max", 3)}, []),
        ("0::/", {"": (32, 8)}, [24]),
        ("0::/", {"": (32, 30, 25)}, [27]),  # what is cached of files is given up
        ("0::/", {"": (4, 8)}, [0]),
        ("0::/slurm/job_7", {"": ("max", 90), "slurm": (64, 60), "slurm/job_7": (16, 4)}, [12, 4]),
        ("0::/outside/of/this/container", {"": (32, 8)}, [24]),
        ("4:cpu,cpuacct:/x\n3:memory:/job", {"memory": (99, 1), "memory/job": (10, 1, 0)}, [9, 98]),
        ("4:cpu,cpuacct:/x", {"": (32, 8)}, []),
    ],
)
def test_a_process_has_the_memory_of_its_control_groups(line, groups, expected, tmp_path):
    version = 1 if ":memory:" in line else 2
    for name, sizes in groups.items():
        group(tmp_path / "sys/fs/cgroup" / name, *sizes, **({"version": version}))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    assert [free / GIB for free in free_in_groups(tmp_path)] == expected


def test_main_memory_is_a_half_of_what_is_free_for_the_process(monkeypatch, tmp_path):
    assert [*free_in_groups(tmp_path)] == []  # no Linux
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    for limits, expected in (([], 50), ([24 * GIB, 200 * GIB], 12), ([0], 0)):
        monkeypatch.setattr(memory, "free_in_groups", lambda root, limits=limits: iter(limits))
        assert memory.main_memory() == expected * GIB


def test_too_few_tokens_for_a_copy_swap_nothing_by_themselves(shape):
    config = settings(data__max_length=16)
    assert 4 * shape.inner * 16 < swapping.SMALL and most_swapped(shape, config, SLOW, 1, 36) == 0


def test_copies_that_take_longer_than_the_passes_take_their_time(shape):
    config, slow = settings(data__max_length=512), dataclasses.replace(SLOW, link=1e9)
    plan = plan_memory(shape, config, 4, 36, swapped=35)
    assert step_seconds(shape, config, slow, 4, 36, swapped=35) == pytest.approx(2 * plan.waiting / 1e9)
    few = plan_memory(shape, config, 4, 36, swapped=2).waiting / SLOW.link
    assert few < 0.1 * step_seconds(shape, config, SLOW, 4, 36, swapped=2) < step_seconds(shape, config, SLOW, 4, 36)


def test_fewer_swapped_layers_than_asked_for_are_said(shape):
    config = settings(data__max_length=512, performance__swap_activations=20, performance__auto_fit=False)
    for layers, expected in ((0, 0), (7, 7), (36, 20)):
        plan = plan_memory(shape, config, 4, layers, swapped=20)
        lines = memory.chosen_lines(config, plan, None)
        said = f"swap_activations: 20 asked, {expected} swapped: only checkpointed layers are, and never the model's last one"
        assert (said in lines) == (expected < 20)


def test_swapped_layers_that_are_not_compiled_are_said(shape):
    plan = plan_memory(shape, settings(data__max_length=512), 1, 36, swapped=8)
    fast = {way: SimpleNamespace(compile=way, line="fast path: none") for way in (True, False)}
    assert memory_plan.without_compiled_layers(plan, fast[True]) == []
    said = memory_plan.without_compiled_layers(plan, fast[False])
    assert said == ["the 8 swapped layers are recomputed: they are not compiled"]
    assert memory_plan.without_compiled_layers(dataclasses.replace(plan, swapped=0), fast[False]) == []
    with pytest.raises(ConfigError, match="offload needs compiled layers; fast path: none"):
        memory_plan.without_compiled_layers(dataclasses.replace(plan, swapped=0, offload=True), fast[False])


def test_the_plan_says_how_fast_layers_are_swapped_or_that_a_run_may(qwen_3b, monkeypatch, capsys):
    import train_qlora

    flags = ["--plan", "--model_name", str(qwen_3b), "--dataset", str(ROOT / "tiny" / "text")]
    assert train_qlora.main([*flags, "--memory_limit_gib", "3.3"]) == 0
    assert "  a run may be faster: it swaps layers to main memory instead of recomputing" in capsys.readouterr().out
    small = ["--memory_limit_gib", "3.3"]
    for more in (
        ["--memory_limit_gib", "30"],
        [*small, "--swap_activations", "0"],
        [*small, "--deterministic", "true"],
    ):
        assert train_qlora.main([*flags, *more]) == 0
        assert "swap" not in capsys.readouterr().out
    assert train_qlora.main([*flags, *small, "--swap_activations", "3"]) == 0
    out = capsys.readouterr().out
    assert "  swapped layers leave and come back at 13.6 GB/s (PCIe 4.0 x8, if the slot has it)" in out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory_plan, "lacks_triton", lambda: False)
    monkeypatch.setattr(memory, "rates_here", lambda device, config, shape: SLOW)
    monkeypatch.setattr(memory, "memory_limit", lambda *_: 3.3 * GIB)
    assert train_qlora.main(flags) == 0
    out = capsys.readouterr().out
    assert "  swapped layers leave and come back at 8.0 GB/s (measured now)" in out
    assert "of them swapped" in out

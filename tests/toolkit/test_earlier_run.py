"""What an earlier run left in a folder is read without torch; the command line's side is in test_command_line.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config import FROM_ADAPTER, FROM_OWN_RUN, LEAVES, Config, ConfigError, Leaf, load_config
from toolkit import earlier_run
from toolkit.checkpoints import write_checkpoint
from toolkit.earlier_run import continues, continuing_command, may_have_moved, read_settings, refuse_other_run, settings


def write(output_dir: Path, step: int, **changes: object) -> Path:
    """Write a checkpoint as a run does, of the default settings with `changes` by dotted name."""
    state = {"config": settings(Config()) | changes, "shape": {"window": 16}}
    return write_checkpoint(output_dir, step, {}, {}, state, 9)


def refused(output_dir: Path, **overrides: object) -> tuple[str, ...]:
    """Return what is said to a run in this folder, or nothing."""
    values = {name.replace("__", "."): value for name, value in overrides.items()}
    try:
        refuse_other_run(load_config((), {"training.output_dir": str(output_dir)} | values), overwrite=False)
    except ConfigError as error:
        return error.problems
    return ()


def test_it_imports_no_torch():
    program = "import sys, toolkit.earlier_run; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    folder = Path(earlier_run.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_settings_are_read_back_as_they_were_written(tmp_path):
    folder = write(tmp_path, 3, **{"lora.target_modules": ["q_proj"], "training.seed": 7})
    before, window = read_settings(folder)
    assert before == settings(Config()) | {"lora.target_modules": ["q_proj"], "training.seed": 7} and window == 16
    mappings = {"data.template_options": {"n": 2}, "data.dataset": ["a.txt", {"dataset": "b.txt", "share": 0.5}]}
    assert read_settings(write(tmp_path, 4, **mappings))[0] == settings(Config()) | mappings
    for content in ("", "[]", "{}", '{"items": [["config", 3]]}', '{"items": 3}'):
        (folder / "training_state.json").write_text(content, encoding="utf-8")
        assert read_settings(folder) is None
    assert read_settings(tmp_path / "none") is None


def test_runs_that_began_when_sdpa_was_the_default_continue(tmp_path):
    write(tmp_path, 2, **{"model.attn_implementation": "sdpa"})
    assert refused(tmp_path) == () == refused(tmp_path, model__attn_implementation="sdpa")
    (problem,) = refused(tmp_path, model__attn_implementation="eager")
    assert problem.startswith("model.attn_implementation: was sdpa in checkpoint-2, is eager now; ")


def test_the_newest_readable_checkpoint_counts(tmp_path):
    write(tmp_path, 2, **{"training.seed": 1})
    write(tmp_path, 10)
    assert refused(tmp_path) == ()
    (tmp_path / "checkpoint-10" / "training_state.json").write_text("half", encoding="utf-8")
    (problem,) = refused(tmp_path)
    assert problem.startswith("training.seed: was 1 in checkpoint-2, is 42 now; ")
    (tmp_path / "checkpoint-2" / "training_state.json").write_text("half", encoding="utf-8")
    assert refused(tmp_path) == (
        f"training.resume: all checkpoints in {tmp_path} are damaged (checkpoint-10: training_state.json does not match its "
        "checksum); use --overwrite to start over",
    )


def test_only_what_is_learned_may_not_change(tmp_path):
    write(tmp_path, 1)
    free = {"training__max_steps": 9, "training__save_steps": 3, "performance__compile": "off", "generation__top_k": 3}
    assert refused(tmp_path, **free) == ()
    assert refused(tmp_path, training__batch_size=4, training__gradient_accumulation_steps=4) == ()  # the same product
    (problem,) = refused(tmp_path, training__batch_size=4)
    assert problem.startswith(
        "training.batch_size x training.gradient_accumulation_steps: was 16 in checkpoint-1, is 64"
    )


def test_a_checkpoint_of_before_a_key_was_there_had_its_default(tmp_path):
    before = settings(Config())
    del before["data.packing"]
    write_checkpoint(tmp_path, 1, {}, {}, {"config": before, "shape": {"window": 16}}, 9)
    assert refused(tmp_path) == ()
    assert "data.packing: was true in checkpoint-1, is false now" in refused(tmp_path, data__packing=False)[0]


def test_another_name_is_another_content_where_that_is_sure(tmp_path):
    a, b, longer = (tmp_path / name for name in ("a.txt", "b.txt", "longer.txt"))
    for path, text in ((a, "text"), (b, "TEXT"), (longer, "more text")):
        path.write_text(text, encoding="utf-8")
    folders = [tmp_path / name for name in ("m1", "m2", "m3")]
    for folder, size in zip(folders, (5, 5, 6), strict=True):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * size)
    (folders[0] / "README.md").touch()
    same = [("wikitext", "Salesforce/wikitext"), (a, b), ("/gone/a.txt", longer), ("Qwen/Q", folders[0])]
    same += [(folders[0], folders[1]), (["a"], ["a"])]
    other = [("Qwen/Q", "Qwen/Q2"), (a, longer), (folders[0], folders[2]), (["a"], ["b"]), ("a", ["a"])]
    for pairs, expected in ((same, True), (other, False)):
        for before, now in pairs:
            before, now = (str(name) if isinstance(name, Path) else name for name in (before, now))
            assert may_have_moved(before, now) == expected, (before, now)


@pytest.mark.parametrize("name", ["x" * 5000])
def test_a_name_that_no_folder_can_have_is_left_to_who_makes_it(name):
    assert refused(Path(name)) == ()


# ------------------------------------------------------------------------------------------------ an adapter's folder


def folder_of(place: Path, settings: dict[str, object], base: str = "some/base") -> Path:
    """Make an adapter's folder without weights, with these settings by dotted name in its config.yaml."""
    place.mkdir()
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    (place / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    tree: dict[str, dict[str, object]] = {}
    for name, value in ({"model.name": base} | settings).items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    (place / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return place


def used(adapter: Path, text: str = "", given: list[Path] | tuple = (), evaluate: bool = False, **flags: str) -> Config:
    """Return the configuration with an adapter. text: of the config.yaml beside the script."""
    beside = adapter.parent / "beside.yaml"
    beside.write_text(text, encoding="utf-8")
    overrides = {name.replace("__", "."): value for name, value in flags.items()}
    return earlier_run.config_with_adapter(adapter, list(given), beside, overrides, evaluate)[0]


def another(leaf: Leaf) -> object:
    """Return a valid value that is not the leaf's default, as YAML has it."""
    default, limits = leaf.field.default, leaf.field.metadata
    if bool in leaf.kinds:
        return not default
    if tuple in leaf.kinds:
        return [1] if leaf.items is int else ["one"]
    if dict in leaf.kinds:
        return {"one": True}
    if others := [choice for choice in limits.get("choices", ()) if choice != default]:
        return others[0]
    if float in leaf.kinds:
        return 0.5 if default != 0.5 else 0.25
    return 33 if int in leaf.kinds else "another"


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in FROM_ADAPTER])
def test_a_setting_that_is_not_on_the_list_has_no_effect_in_an_adapters_folder(name, tmp_path):
    value = another(LEAVES[name])
    assert load_config((), {name: value}) != Config()  # it is another value
    with_it = used(folder_of(tmp_path / "with", {name: value}))
    assert with_it == used(folder_of(tmp_path / "without", {}))
    if name in FROM_OWN_RUN:
        own = folder_of(tmp_path / "own", {name: value, "training.output_dir": str(tmp_path / "own")})
        assert settings(used(own))[name] == value


@pytest.mark.parametrize("name", sorted(FROM_ADAPTER))
def test_a_setting_on_the_list_is_read_in_an_adapters_folder(name, tmp_path):
    value = another(LEAVES[name])
    folder = folder_of(tmp_path / "with", {name: value}, "another" if name == "model.name" else "some/base")
    assert settings(used(folder))[name] == value


def test_an_adapter_without_a_configuration_takes_the_base_that_it_names(tmp_path):
    """As plain peft writes it. Before, the config.yaml beside the script named the base, whatever the adapter was made on."""
    adapter, local = folder_of(tmp_path / "adapter", {}, "some/base"), tmp_path / "a base"
    local.mkdir()
    (adapter / "config.yaml").unlink()
    (tmp_path / "given.yaml").write_text("model: {name: given/base}\n", encoding="utf-8")
    (tmp_path / "silent.yaml").write_text("lora: {rank: 4}\n", encoding="utf-8")
    mine = "model: {name: mine/base, revision: abc}\n"
    assert used(adapter, mine).model.name == "some/base" and used(adapter, mine).model.revision is None
    assert used(adapter, mine, [tmp_path / "silent.yaml"]).model.name == "some/base"
    assert used(adapter, mine, [tmp_path / "given.yaml"]).model.name == "given/base"
    assert used(adapter, mine, model__name="flag/base").model.name == "flag/base"
    for recorded, expected in ((str(local), str(local)), ("/not/here", "mine/base")):
        described = {
            "base_model_name_or_path": recorded,
            "target_modules": ["q_proj"],
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
        }
        (adapter / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
        assert used(adapter, mine).model.name == expected
    for inside in ("https://a.com/base", str(adapter)):
        described = {
            "base_model_name_or_path": inside,
            "target_modules": ["q_proj"],
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
        }
        (adapter / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
        with pytest.raises(ConfigError, match="^model.name: .*give"):
            used(adapter, mine)


def test_consent_comes_from_the_user(tmp_path):
    trust = {"model.trust_remote_code": True}
    adapter = folder_of(tmp_path / "adapter", trust)
    text = "model: {name: some/base, trust_remote_code: true}\n"
    other, given = text.replace("some/base", "other/base"), tmp_path / "given.yaml"
    assert not used(adapter).model.trust_remote_code
    assert used(adapter, model__trust_remote_code="true").model.trust_remote_code
    assert used(adapter, text).model.trust_remote_code  # the config.yaml beside the script, of that very base
    assert not used(adapter, other).model.trust_remote_code
    assert not used(adapter, text, model__trust_remote_code="false").model.trust_remote_code
    given.write_text(text, encoding="utf-8")
    assert used(adapter, given=[given]).model.trust_remote_code
    given.write_text("model: {trust_remote_code: true}\n", encoding="utf-8")  # of no base in particular
    assert not used(adapter, given=[given]).model.trust_remote_code
    (adapter / "config.yaml").unlink()  # what is beside the script is used, with another base by flag
    assert used(adapter, text).model.trust_remote_code
    assert not used(adapter, text, model__name="other/base").model.trust_remote_code


def test_a_version_that_the_adapter_names_is_no_version_that_the_user_trusts(tmp_path):
    adapter = folder_of(tmp_path / "adapter", {"model.revision": "refs/pr/1"})
    text = "model: {name: some/base, trust_remote_code: true}\n"
    assert used(adapter).model.revision == "refs/pr/1"  # weights only
    assert not used(adapter, text).model.trust_remote_code
    with pytest.raises(ConfigError, match="model.revision: .* names refs/pr/1, whose Python code would run"):
        used(adapter, model__trust_remote_code="true")
    found = used(adapter, model__trust_remote_code="true", model__revision="refs/pr/1")
    assert found.model.trust_remote_code


def test_a_base_in_the_adapters_folder_needs_a_flag(tmp_path, monkeypatch):
    adapter = folder_of(tmp_path / "adapter", {}, "base")
    (adapter / "base").mkdir()
    with pytest.raises(ConfigError, match="model.name: .* lies in the adapter's folder; give --model_name"):
        used(adapter)
    named = used(adapter, model__name=str(adapter / "base"))
    assert named.model.name == str(adapter / "base")
    monkeypatch.chdir(adapter)  # a hub id of the user's file is then the name of a folder that came with the adapter
    (adapter / "some" / "base").mkdir(parents=True)
    (adapter / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="lies in the adapter's folder"):
        used(adapter, "model: {name: some/base, trust_remote_code: true}\n")
    monkeypatch.chdir(tmp_path)
    assert used(adapter, "model: {name: some/base}\n").model.name == "base"  # as adapter_config.json says, from the hub


def test_a_flag_is_not_looked_up_in_the_adapters_folder(tmp_path):
    adapter = folder_of(tmp_path / "adapter", {})
    (adapter / "their" / "model").mkdir(parents=True)
    assert used(adapter, model__name="their/model", model__trust_remote_code="true").model.name == "their/model"


def test_two_bases_in_one_folder_need_a_flag(tmp_path):
    adapter = folder_of(tmp_path / "adapter", {"model.name": "other/base"})
    with pytest.raises(
        ConfigError, match="names other/base, but adapter_config.json beside it some/base; give --model"
    ):
        used(adapter)
    assert used(adapter, model__name="some/base").model.name == "some/base"


def test_data_to_evaluate_on_is_named_by_the_user_or_by_a_run_of_this_machine(tmp_path, monkeypatch):
    data = {"data.dataset": "some/data", "data.max_length": 64}
    foreign = folder_of(tmp_path / "foreign", data)
    own = folder_of(tmp_path / "own", data | {"training.output_dir": str(tmp_path / "own")})
    (own / "checkpoint-3").mkdir()
    for name in ("adapter_config.json",):
        (own / "checkpoint-3" / name).write_bytes((own / name).read_bytes())
    for folder in (own, own / "checkpoint-3"):
        assert used(folder, evaluate=True).data.dataset == "some/data"
    with pytest.raises(ConfigError, match="data.dataset: .*give --dataset some/data if you want"):
        used(foreign, evaluate=True)
    found = used(foreign, evaluate=True, data__dataset="other/data").data
    assert (found.dataset, found.max_length) == ("other/data", 64)
    assert used(foreign, "data: {dataset: some/data}\n", evaluate=True).data.dataset == "some/data"  # the user's too
    given = tmp_path / "given.yaml"
    given.write_text("data: {dataset: other/data}\n", encoding="utf-8")
    assert used(foreign, given=[given], evaluate=True).data.dataset == "other/data"
    assert used(foreign).data.dataset == Config().data.dataset  # an answer needs none
    monkeypatch.chdir(tmp_path)
    for output_dir in ("foreign", "./foreign", "/proc/self/cwd/foreign", str(tmp_path / "other" / ".." / "foreign")):
        pretends = data | {"training.output_dir": output_dir, "model.name": "some/base"}
        shutil.rmtree(foreign)
        with pytest.raises(ConfigError, match="give --dataset"):
            used(folder_of(tmp_path / "foreign", pretends), evaluate=True)


def test_a_list_of_sources_has_no_more_rights_than_one(tmp_path):
    """In a stranger's folder it names no data, and what it sets for a source is not taken either."""
    sources = ["some/data", {"dataset": "other/data", "text_column": "body", "share": 0.5}]
    foreign = folder_of(tmp_path / "foreign", {"data.dataset": sources})
    assert used(foreign).data.dataset == Config().data.dataset
    with pytest.raises(ConfigError) as caught:
        used(foreign, evaluate=True)
    (problem,) = caught.value.problems
    shown = '"[some/data, {dataset: other/data, share: 0.5, text_column: body}]"'
    assert problem.startswith("data.dataset: which data is read") and problem.count(f"--dataset {shown}") == 1
    listed = f"data: {{dataset: {json.dumps(sources)}}}\n"
    assert used(foreign, listed, evaluate=True).data.dataset == tuple(sources)  # the user's too
    for address in ("https://a.b/c", {"dataset": "//server/share"}):
        shutil.rmtree(foreign)
        folder_of(foreign, {"data.dataset": ["some/data", address]})
        with pytest.raises(ConfigError, match="which data is read"):
            used(foreign, f"data: {{dataset: {json.dumps(['some/data', address])}}}\n", evaluate=True)
    own = folder_of(tmp_path / "own", {"data.dataset": sources, "training.output_dir": str(tmp_path / "own")})
    assert used(own, evaluate=True).data.dataset == tuple(sources)


def test_sources_may_have_moved_each(tmp_path):
    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("c.txt", "three")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt"))
    assert may_have_moved([a, {"dataset": a, "share": 0.5}], [b, {"dataset": b, "share": 0.5}])
    for now in ([a], [a, c], [a, {"dataset": b, "share": 0.4}], [a, b], b):
        assert not may_have_moved([a, {"dataset": b, "share": 0.5}], now)
    assert not may_have_moved([a, c], [a, b]) and may_have_moved([a, "/gone/b.txt"], [a, b])


@pytest.mark.parametrize(
    "flags, resume, kept",
    [
        ("--rank 8", "auto", "--rank 8"),
        ("--overwrite --rank 8", "auto", "--rank 8"),
        ("--rank 8 --resume never --seed 1", "never", "--rank 8 --seed 1 --resume auto"),
        ("--training.resume=never", "never", "--resume auto"),
        ("--resume out/checkpoint-3 --overwrite", "out/checkpoint-3", "--resume auto"),
        ("--config c.yaml", "never", "--config c.yaml --resume auto"),  # the file says never
        ("--resume=auto", "auto", ""),
        ("--output-dir overwrite --output_dir=resume", "auto", "--output-dir overwrite --output_dir=resume"),
    ],
)
def test_the_command_that_continues_a_run_is_the_one_that_started_it(flags, resume, kept, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert continuing_command(flags.split(), resume) == f"train_qlora.main({kept.split()})"
    monkeypatch.setattr(sys, "argv", ["../train_qlora.py", *flags.split()])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "../train_qlora.py", *flags.split()])
    assert continuing_command(None, resume) == f"python3 -u ../train_qlora.py {kept}".strip()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert continuing_command(None, resume) == f"torchrun --nproc_per_node 2 ../train_qlora.py {kept}".strip()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    meet = "--nnodes 3 --rdzv_backend c10d --rdzv_endpoint HOST:29500"
    assert continuing_command(None, resume) == f"torchrun {meet} --nproc_per_node 2 ../train_qlora.py {kept}".strip()


@pytest.mark.skipif(sys.platform == "win32", reason="quotes of a POSIX shell")
def test_the_command_that_continues_can_be_pasted(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    words = ["train_qlora.py", "--target_modules", "[q_proj, v_proj]", "--output_dir", "it's $HOME"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *words])
    echo = continuing_command(None, "auto").replace("train_qlora.py", "-c 'import sys; print(sys.argv[1:])'", 1)
    shown = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True).stdout
    assert shown == f"{words[1:]}\n"


def test_only_a_folder_with_a_checkpoint_can_be_continued(tmp_path):
    assert continues(str(tmp_path), "this") == continues("", "this") == ""
    write(tmp_path, 2)
    assert continues(str(tmp_path), "this").endswith(": this")

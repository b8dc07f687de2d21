"""What an earlier run left in a folder is read without torch; the command line's side is in test_command_line.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from config import Config, ConfigError, load_config
from toolkit import earlier_run
from toolkit.checkpoints import write_checkpoint
from toolkit.earlier_run import may_have_moved, read_settings, refuse_other_run, settings


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
    for content in ("", "[]", "{}", '{"items": [["config", 3]]}', '{"items": 3}'):
        (folder / "training_state.json").write_text(content, encoding="utf-8")
        assert read_settings(folder) is None
    assert read_settings(tmp_path / "none") is None


def test_the_newest_readable_checkpoint_counts(tmp_path):
    write(tmp_path, 2, **{"training.seed": 1})
    write(tmp_path, 10)
    assert refused(tmp_path) == ()
    (tmp_path / "checkpoint-10" / "training_state.json").write_text("half", encoding="utf-8")
    (problem,) = refused(tmp_path)
    assert problem.startswith("training.seed: was 1 in checkpoint-2, is 42 now; ")
    (tmp_path / "checkpoint-2" / "training_state.json").write_text("half", encoding="utf-8")
    assert refused(tmp_path) == (
        f"training.resume: all checkpoints in {tmp_path} are damaged; use --overwrite to start over",
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


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_folder_can_have_is_left_to_who_makes_it(name):
    assert refused(Path(name)) == ()

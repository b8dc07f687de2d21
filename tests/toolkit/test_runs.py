"""The list of runs: what it reads, how wide it is, and that a damaged run does not hide the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config import ConfigError, load_config, save_config
from toolkit import runs
from toolkit.checkpoints import locked
from toolkit.text_width import width

ROOT = Path(__file__).resolve().parents[2]


def leave(
    folder: Path, losses: list[float], total: int, weights: bool = True, checkpoint: int = 0, **settings: str
) -> Path:
    """Leave in a folder what a run does that evaluated at every second step, and was to make `total` steps."""
    folder.mkdir(parents=True)
    flags = {"training.max_steps": str(total), "training.output_dir": str(folder)}
    flags |= {name.replace("__", "."): value for name, value in settings.items()}
    save_config(load_config([], flags), folder / "config.yaml")
    rows: list[dict] = []
    for number, loss in enumerate(losses):
        if number:
            row = {"step": 2 * number, "loss": 5.0, "tokens": 8, "tokens_per_second": 1.0, "peak_gib": 0.1}
            rows.append(row)
        rows.append({"step": 2 * number, "eval_loss": loss, "perplexity": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if weights:
        (folder / "adapter_model.safetensors").write_bytes(b"0" * 3_000_000)
    if checkpoint:
        (folder / f"checkpoint-{checkpoint}").mkdir()
        (folder / f"checkpoint-{checkpoint}" / "adapter_model.safetensors").write_bytes(b"0" * 1_000_000)
    return folder


def listed(capsys: pytest.CaptureFixture, folder: Path) -> list[str]:
    """Return the lines of the list."""
    assert runs.print_runs(folder, pytest.fail) == 0
    return capsys.readouterr().out.splitlines()


def test_states_of_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    leave(Path("a"), [3.5, 3.25, 3.3], total=4, data__dataset="/data/poems.jsonl", model__name="Qwen/Qwen2.5-0.5B")
    leave(Path("b/half"), [3.5, 3.25], total=40, weights=False, checkpoint=2, lora__rank="8")
    leave(Path("b/young"), [3.5], total=40, weights=False)
    leave(Path("patient"), [3.5, 3.25, 3.4, 3.6], total=40, training__early_stopping_patience="2")
    leave(Path("trimmed"), [3.5, 3.25], total=40)
    leave(Path("a/checkpoint-4"), [3.5], total=4)  # a copy of a run there is no run
    head, *rows = listed(capsys, Path("."))
    assert head.split() == ["run", "model", "data", "rank", "steps", "loss", "before", "after", "date", "state", "size"]
    cells = [[part.strip() for part in row.split("  ") if part.strip()] for row in rows]
    assert [row[0] for row in cells] == ["a", "b/half", "b/young", "patient", "trimmed"]
    assert cells[0][1:7] == ["Qwen2.5-0.5B", "poems.jsonl", "16", "4", "3.5000", "3.2500"]
    assert cells[1][3:7] == ["8", "2 of 40", "3.5000", "3.2500"]
    assert [row[8] for row in cells] == [
        "finished", "resumable at step 2", "stopped before its first checkpoint", "finished", "ended early",
    ]  # fmt: skip
    assert cells[1][9] == "1.0 MB" and cells[3][9] == "3.0 MB"


def test_a_run_at_work_is_said_to_run(tmp_path, capsys):
    folder = leave(tmp_path / "r", [3.5, 3.25], total=4, weights=False, checkpoint=2)
    with locked(folder):
        assert "running, at step 4" not in listed(capsys, tmp_path)[1]
        assert runs.read_run(folder).state == "running, at step 2"
    (folder / ".lock").touch()  # left by a run that was killed
    assert runs.read_run(folder).state == "resumable at step 2"


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_the_list_fits_the_terminal(columns):
    names = [
        "實驗/很長的名字_用來測試對齊/跑_一",
        "outputs/2026/november/output_qlora_qwen_3b_rank_16_all_linear",
        "r8",
    ]
    found = [
        runs.Run(name, 3 * 10**9, 0.0, model="Qwen2.5-Coder-0.5B-Instruct", data="資料集_一.jsonl, wikitext", rank=128,
                 step=12345, total=100000, before=12.3456, after=2.3456, state="resumable at step 12,345")
        for name in names
    ]  # fmt: skip
    table = runs.runs_table(found, columns)
    assert max(map(width, table.splitlines())) <= columns
    assert table.replace("\n", "").count("12.3456") == 3 and table.count("3,000.0 MB") == 3
    if columns >= 200:  # one table, where each column begins at the same place
        head, *rows = table.splitlines()
        place = width(head[: head.index("model")])
        begins = [width(row[: row.index("Qwen")]) for row in rows if "Qwen" in row]
        assert begins == [place] * 3


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("metrics.jsonl", '{"step": 3\n', "metrics.jsonl: Expecting"),
        ("metrics.jsonl", '{"step": "x"}\n', "metrics.jsonl: row 1: expected numbers"),
        ("metrics.jsonl", "\udcff\n", "metrics.jsonl: 'utf-8' codec"),
        ("metrics.jsonl", '{"step": -Infinity}\n', "metrics.jsonl: row 1: expected numbers"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "metrics.jsonl: maximum recursion"),
        ("config.yaml", "lora: [", "config.yaml"),
        ("config.yaml", "lora: {rank: -3}", "lora.rank: expected"),
        ("config.yaml", "#" * 5_000_000, "config.yaml: expected at most"),
    ],
)
def test_a_damaged_run_is_listed_as_such(tmp_path, capsys, monkeypatch, name, content, reason):
    monkeypatch.setenv("COLUMNS", "400")
    leave(tmp_path / "good", [3.5, 3.25], total=2)
    folder = leave(tmp_path / "odd", [3.5, 3.25], total=2)
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    text = "\n".join(listed(capsys, tmp_path))
    assert "finished" in text and "cannot be read" in text
    assert reason in runs.read_run(folder).problem


def test_names_cannot_change_the_screen(tmp_path, capsys):
    os.rename(leave(tmp_path / "r", [3.5, 3.25], total=2), tmp_path / "r\x1b[2J\ntwo")
    lines = listed(capsys, tmp_path)
    assert "\x1b" not in "".join(lines) and "r\\x1b[2J\\ntwo" in "".join(lines)


def test_a_pipe_as_metrics_is_no_run(tmp_path):
    leave(tmp_path / "r", [3.5], total=2)
    (tmp_path / "r" / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "r" / "metrics.jsonl")
    with pytest.raises(ConfigError, match="no run in"):
        runs.print_runs(tmp_path, pytest.fail)


def test_the_command_answers_without_torch(tmp_path):
    leave(tmp_path / "r8", [3.5, 3.25], total=2)
    program = (
        f"import sys; sys.argv = ['train_qlora.py', '--runs', {str(tmp_path)!r}]; import runpy\n"
        f"try: runpy.run_path({str(ROOT / 'train_qlora.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


@pytest.mark.parametrize("name, line", [("none", "is not there"), ("file", "is a file"), (".", "no run in")])
def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys, name, line):
    import train_qlora

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert train_qlora.main(["--runs", name]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and line in said.err and said.err.startswith("error: --runs: ")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    leave(tmp_path / "r8", [3.5, 3.25], total=2)
    said: list[str] = []
    real = os.scandir
    with pytest.MonkeyPatch.context() as patch:

        def scandir(path):
            if str(path).endswith("shut"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        (tmp_path / "shut").mkdir()
        patch.setattr(os, "scandir", scandir)
        assert runs.find_runs(tmp_path, said.append) == [tmp_path / "r8"]
    assert len(said) == 1 and "not searched" in said[0] and "shut" in said[0]

"""Every command of the guide parses, what it names exists, its figures are the plan's, and both languages say the same."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inference_example
import train_qlora
from config import ConfigError, leaves, load_config
from toolkit.memory_plan import GIB, plan_memory
from toolkit.model_shape import model_shape

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-TW.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
GUIDES = pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
FENCES = re.compile(r"^```\w*\n.*?^```$", re.M | re.S)


def commands(script: str) -> list[str]:
    """Return the different commands of a script that the guide and the reference hold, without their comments."""
    found = re.findall(rf"python ({script}[^\n&`#]*)", README + CHINESE + REFERENCE)
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", commands(r"train_qlora\.py"))
def test_training_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, *arguments = shlex.split(command)
    try:
        train_qlora.parse(arguments)
    except ConfigError as error:  # an adapter that the reader has yet to train, a file that is the reader's own
        assert error.problems in (
            ("--adapter: no adapter_config.json in output_r8",),
            ("data.dataset: no such file or folder: chats.jsonl",),
        )


@pytest.mark.parametrize("command", commands(r"inference_example\.py"))
def test_inference_commands_parse(command, monkeypatch, tmp_path):
    """The adapter and the prompts are the reader's to make."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output_tiny").mkdir()
    (tmp_path / "output_tiny" / "adapter_model.safetensors").touch()
    described = '{"peft_type": "LORA", "r": 16, "lora_alpha": 32}'
    (tmp_path / "output_tiny" / "adapter_config.json").write_text(described, encoding="utf-8")
    (tmp_path / "questions.txt").write_text("Hello\n", encoding="utf-8")
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    _, *arguments = shlex.split(command)
    expected = [] if "none" in arguments else [Path("output_tiny")]
    assert inference_example.parse(arguments)[0].folders == expected


# ------------------------------------------------------------------------------------------------ what is named


@pytest.mark.parametrize("text", [README, CHINESE, REFERENCE], ids=["English", "Chinese", "reference"])
def test_every_file_named_exists(text):
    folders = "tests/benchmarks/|tiny/|toolkit/|fast_path/|docs/|docs/pictures/|notebooks/"
    names = set(re.findall(rf"(?<![\w/])((?:{folders})?[a-z_0-9]+\.(?:py|yaml|txt|png|ipynb))\b", text))
    left_by_a_run = {"training_log.txt", "training_curves.png", "compare.png", "my_texts.txt", "questions.txt"}
    assert names - left_by_a_run
    assert [name for name in sorted(names - left_by_a_run) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("text", "folder"),
    [(README, ROOT), (CHINESE, ROOT), (REFERENCE, ROOT / "docs")],
    ids=["English", "Chinese", "reference"],
)
def test_every_link_leads_somewhere(text, folder):
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        assert (folder / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (folder / path).read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link


@GUIDES
def test_every_function_named_is_in_its_file(text):
    pairs = re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", text)
    pairs += [(name, path) for path, name in re.findall(r"`([\w/]+\.py)` (?:的|裡的) `(\w+)`", text)]
    assert len(pairs) >= 10
    for name, path in pairs:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)], (name, path)


def known_flags() -> set[str]:
    """Return the keys of config.yaml and the scripts' own flags, without their dashes."""
    scripts = [
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("train_qlora.py", "inference_example.py", "toolkit/flags.py", "toolkit/run_commands.py")
    ]
    own = {flag for script in scripts for flag in re.findall(r'"--([a-z_]+)"', script)}
    return own | {leaf.key for leaf in leaves()} | {"model_name"}


@GUIDES
def test_every_flag_and_setting_named_exists(text):
    """Flags are those of the two scripts, of pip and of the pictures; a remedy's settings are keys of config.yaml."""
    known = known_flags()
    named = set(re.findall(r"(?<![\w-])--([a-z_0-9]+(?:-[a-z]+)*)", text))
    assert len(named) > 15
    assert named - known - {"index-url", "run", "nproc_per_node"} == set()
    settings = set(re.findall(r"`([a-z_]+):", text)) - {"weight"}
    assert len(settings) > 8
    assert settings - known - {"name"} == set()


@pytest.mark.parametrize(("number", "name"), enumerate(("a.txt", "b.csv", "c.jsonl", "d.csv", "e.csv")))
def test_the_small_files_of_data_are_read_as_their_forms(number, name, tiny_model, tmp_path):
    """Each row of the table of forms is a file: text without labels, chats and pairs with the answers learned."""
    from transformers import AutoTokenizer

    cell = README.split("| form |")[1].splitlines()[2 + number].split("|")[2].strip()
    lines = [line.strip("`") for line in cell.split("<br>")]
    lines = [lines[0]] * 3 if name.endswith("jsonl") else ["" if line == "(blank line)" else line for line in lines]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--config", str(ROOT / "tiny" / "config.yaml"), "--dataset", str(tmp_path / name)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = train_qlora.prepare_dataset(train_qlora.parse(flags)[1], tokenizer)["train"]
    learned = [tokenizer.decode([i for i in row["labels"] if i >= 0]) for row in rows if "labels" in row]
    expected = {"c.jsonl": ["Hello!"] * 3, "d.csv": ["4", "6"], "e.csv": ["dog", "cat"]}.get(name, [])
    assert learned == [f"{answer}<|im_end|>" for answer in expected]
    assert len(rows) == (len(expected) or {"a.txt": 3, "b.csv": 2}[name])


# ------------------------------------------------------------------------------------------------ both languages


def test_headings_blocks_and_links_are_the_same():
    levels = [re.findall(r"^#+(?= )", FENCES.sub("", text), flags=re.M) for text in (README, CHINESE)]
    assert levels[0] == levels[1] and len(levels[0]) > 15
    assert FENCES.findall(README) == FENCES.findall(CHINESE)
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-TW.md"} for text in (README, CHINESE)]
    assert links[0] == links[1]


def sections(text: str) -> list[str]:
    """Return the parts between headings, without fenced blocks."""
    return re.split(r"^#+ ", FENCES.sub("", text), flags=re.M)


def test_tables_have_the_same_numbers_and_code():
    def rows(text: str) -> list[list[str]]:
        lines = [line for line in FENCES.sub("", text).splitlines() if line.startswith("|")]
        return [sorted(re.findall(r"\d[\d,.]*\d|\d|`[^`]+`", line)) for line in lines]

    assert rows(README) == rows(CHINESE)


def test_sections_name_the_same_things_in_code():
    for english, chinese in zip(sections(README), sections(CHINESE), strict=True):
        assert set(re.findall(r"`([\w./-]+)`", english)) == set(re.findall(r"`([\w./-]+)`", chinese)), english[:40]


@GUIDES
def test_it_stays_short(text):
    lines = text.splitlines()
    assert len(lines) <= 350 and max(map(len, lines)) <= 160


# ------------------------------------------------------------------------------------------------ figures


def memory_bar() -> list[list[float]]:
    """Return the numbers of the table whose first row is the packed weights, row by row."""
    _, table = README.split("### The memory bar")
    rows = [line.split("|")[2:4] for line in table.splitlines() if re.match(r"\|.*\|.*\d\.\d", line)]
    return [[float(cell) for cell in row] for row in rows[:9]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the guide's plan is that of a machine without a GPU")
@pytest.mark.parametrize(("column", "flags"), [(0, ()), (1, ("--memory_limit_gib", "8"))])
def test_the_memory_bar_is_the_plan(column, flags, qwen_3b, capsys):
    train_qlora.main(["--plan", "--model_name", str(qwen_3b), *flags])
    plan = capsys.readouterr().out
    parts = {
        name.strip(): float(gib) for name, gib in re.findall(r"^  ([^(\d][^\n]*?) +(\d+\.\d{3})$", plan, flags=re.M)
    }
    bar = [row[column] for row in memory_bar()]
    assert bar[6] == parts["total"]
    assert sum(bar[:6]) == pytest.approx(parts["total"], abs=0.002)
    assert bar[0] == pytest.approx(parts["packed weights"] + parts["quantisation constants"], abs=0.001)
    assert (
        bar[2] == pytest.approx(parts["adapters (fp32)"] + parts["gradients (fp32)"])
        and bar[5] == parts["CUDA context"]
    )
    assert bar[7] == pytest.approx(parts["total"] - parts["CUDA context"], abs=0.006)
    if flags:
        for line in (
            "true would save 4.10 GiB",
            "would save 2.29 GiB",
            "o_proj] would save 0.18 GiB",
        ):
            assert line in plan
            figure = re.search(r"[\d.,]*\d (?:GiB|tokens/s)", line)
            assert figure and figure.group() in README
    else:
        assert "lora.rank 8 would save 0.10 GiB" in plan and "only 0.10 GiB less" in README


def test_the_table_of_cards_is_the_plan(qwen_3b, capsys):
    """Three epochs are 891 steps of 16 sequences of 512 tokens."""
    rows = re.findall(r"^\| ((?:RTX|T4).*?), \d+ GB \| ([\d.]+) \| ([\d,]+) \| (\d+) min \|$", README, flags=re.M)
    assert len(rows) == 5
    for card, planned, speed, minutes in rows:
        assert train_qlora.main(["--plan", "--model_name", str(qwen_3b), "--card", card]) == 0
        plan = capsys.readouterr().out
        assert f"estimated, not measured: {speed} tokens/s" in plan
        total = float(re.search(r"^  total +([\d.]+)$", plan, flags=re.M)[1])
        assert f"{total:.2f}" == planned
        assert round(891 * 16 * 512 / int(speed.replace(",", "")) / 60) == int(minutes)


def test_the_adapter_of_the_guide_adds_up():
    """r (inputs + outputs) over q, k, v, o, gate, up and down of 36 layers."""
    wide, narrow, mlp = 2048, 256, 11008
    layer = 16 * (2 * (wide + wide) + 2 * (wide + narrow) + 3 * (wide + mlp))
    attention = 16 * (2 * (wide + wide) + 2 * (wide + narrow))
    for count in (layer, 36 * layer, 36 * attention):
        assert f"{count:,}" in README and f"{count:,}" in CHINESE


def test_speeds_are_those_of_the_measurements():
    _, table = README.split("## Speed and memory")
    found = re.findall(r"([\d,]+) tokens/s|(\d\.\d\d) GiB", table)
    measured = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d[\d,.]*\d", measured))
    assert len(found) > 10
    assert [pair for pair in found if not set(pair) - {""} <= numbers] == []


def test_the_experiments_are_those_that_were_measured():
    table = README.split("## Experiments")[1].split("##")[0]
    measured = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    found = re.findall(r"\d\.\d{4}|\d[\d,]{6,}", table)
    assert len(found) > 20 and [number for number in found if number not in measured] == []


def test_the_planned_column_of_the_measurements_is_the_plan(qwen_3b):
    """Without a limit, as the benchmark plans; a limit makes the chunk of logits smaller."""
    table = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8").split("## Memory")[1].split("##")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", table, flags=re.M)
    shape, config = model_shape(str(qwen_3b)), load_config(())
    assert len(rows) == 6
    for batch, layers, planned, measured in rows:
        plan = plan_memory(shape, config, int(batch), int(layers))
        assert f"{plan.reserved / GIB:.2f}" == planned and 0.98 <= float(planned) / float(measured) <= 1.08
    (held,) = re.findall(r"an 8 GiB limit plans ([\d.]+) GiB", table)
    assert f"{plan_memory(shape, config, 4, 0, limit=8 * GIB).reserved / GIB:.2f}" == held


def test_the_tables_of_large_models_are_those_that_the_plan_makes():
    """What `bench_memory.py --cards` prints; at 1 x 512 a 14B, an 8B and a 7B need no more GiB than issue 30 asks for."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "bench_memory.py", "--cards"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and [row for row in rows if f"\n{row}\n" not in measured] == []
    longest = re.findall(r"in ([\d.]+ GiB): ([\d,]+)", printed)
    assert len(longest) == 2 and all(re.search(rf"\b{n}( tokens)? in {gib}", measured) for gib, n in longest)
    (totals,) = (row.split(" | ") for row in rows if row.startswith("| total, GiB"))
    assert all(float(total) <= asked for total, asked in zip(totals[3:6], (9.8, 5.6, 5.9), strict=True))


def test_every_picture_is_drawn_and_shown(tmp_path):
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    for name, draw in pictures.PICTURES.items():
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    shown = set(re.findall(r"docs/pictures/(\w+)\.png", README))
    assert (
        shown
        == {*pictures.PICTURES, "training_curves", "compare"}
        == {p.stem for p in (ROOT / "docs/pictures").iterdir()}
    )


# ------------------------------------------------------------------------------------------------ set-up


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
    found = re.findall(r"--index-url ([^\s;]+)", README)
    assert found and all(re.fullmatch(r"https://download\.pytorch\.org/whl/(cpu|cu\d{3})", index) for index in found)

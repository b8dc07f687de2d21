"""Flags: dashes, those of the other script, and what an unknown one is told. Values and --help: tests/test_config.py."""

import pytest

from config import ConfigError
from tests.refusals import from_flags, problems
from toolkit.flags import SCRIPTS, build_parser, parse_arguments


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rnak", "8"], "--rnak: unknown flag; did you mean --rank?"),
        (["--lora.rnk=8"], "--lora.rnk: unknown flag; did you mean --lora.rank?"),
        (["--learning-rte", "1e-4"], "--learning-rte: unknown flag; did you mean --learning_rate?"),
        (["--lear", "1e-4"], "--lear: unknown flag"),  # no abbreviations: what is unique today may not be tomorrow
        (["8"], "unexpected argument: 8"),
    ],
)
def test_an_unknown_flag_names_the_nearest(argv, said):
    (problem,) = problems(from_flags, *argv)
    assert problem.startswith(said)


# What people type who come from other tools, papers or the shell.
USUAL = {
    "--lr": "--learning_rate",
    "--epochs": "--num_epochs",
    "--num-train-epochs": "--num_epochs",
    "--bs": "--batch_size",
    "--per_device_train_batch_size": "--batch_size",
    "--seq_len": "--max_length",
    "--max_seq_length": "--max_length",
    "--max-seq-length": "--max_length",
    "--r": "--rank",
    "--lora_r": "--rank",
    "--lora_alpha": "--alpha",
    "--lora-dropout": "--dropout",
    "--wd": "--weight_decay",  # by its initials
    "--gas": "--gradient_accumulation_steps",
    "--model": "--model_name",
    "--model_name_or_path": "--model_name",
    "--training.lr": "--learning_rate",
    "--LR": "--learning_rate",
}


@pytest.mark.parametrize("flag", USUAL)
def test_a_flag_by_the_name_that_others_give_it(flag):
    assert problems(from_flags, flag, "1") == (f"{flag}: unknown flag; did you mean {USUAL[flag]}?",)


@pytest.mark.parametrize(
    ("argv", "leaf", "value"),
    [
        (["--batch-size", "4"], "training.batch_size", 4),
        (["--batch-size=4"], "training.batch_size", 4),
        (["--training.batch-size", "4"], "training.batch_size", 4),
        (["--output-dir", "a-b"], "training.output_dir", "a-b"),
        (["--output-dir=--a-b=c-d"], "training.output_dir", "--a-b=c-d"),
        (["--model-name", "some-body/a-model"], "model.name", "some-body/a-model"),
        (["--system_prompt", "--max-length is a flag"], "generation.system_prompt", "--max-length is a flag"),
        (["--lora.use-dora", "true"], "lora.use_dora", True),
    ],
)
def test_dashes_are_underscores_in_flags_and_stay_in_values(argv, leaf, value):
    section, key = leaf.split(".")
    assert from_flags(*argv)[section][key] == value


def test_the_scripts_own_flags_take_dashes_too():
    parser = build_parser("test")
    parser.add_argument("--merge_base")
    parser.add_argument("--prompt")
    options, _ = parse_arguments(parser, ["--merge-base", "a-b", "--prompt=--merge-base"])
    assert (options.merge_base, options.prompt) == ("a-b", "--merge-base")


def test_a_script_refuses_the_flags_of_the_other():
    def inference(*argv):
        parser = build_parser("test", ("model", "generation"))
        parser.add_argument("--adapter")
        return parse_arguments(parser, argv)

    assert inference("--model_name", "a", "--temperature", "0")[1] == {"model.name": "a", "generation.temperature": "0"}
    assert problems(
        inference, "--rank", "99", "--lora.alpha=3", "--batch-size", "2", "--lr", "1", "--output_dir", "x"
    ) == (
        "--rank: belongs to train_qlora.py",
        "--lora.alpha: belongs to train_qlora.py",
        "--batch-size: belongs to train_qlora.py",
        "--lr: belongs to train_qlora.py, as --learning_rate",
        "--output_dir: belongs to train_qlora.py; here it is --adapter",
    )


def test_a_flag_without_its_value_is_one_problem():
    (problem,) = problems(from_flags, "--rank")
    assert "--rank" in problem


def test_a_flag_of_the_other_script_is_named_as_such():
    import inference_example
    import train_qlora

    scripts = {"train_qlora.py": train_qlora, "inference_example.py": inference_example}
    for script, flags in SCRIPTS.items():
        (other,) = set(scripts) - {script}
        for flag in flags:
            assert problems(scripts[other].parse, [f"--{flag}"]) == (f"--{flag}: belongs to {script}",)
            with pytest.raises(ConfigError) as caught:  # its own script has it, and finds something else wrong
                scripts[script].parse([f"--{flag}", "--nowhere"])
            assert not any(problem.startswith(f"--{flag}: ") for problem in caught.value.problems)


def test_unknown_flags_are_reported_together():
    assert [p.split(":")[0] for p in problems(from_flags, "--rnak", "8", "--alhpa", "1")] == ["--rnak", "--alhpa"]

"""What becomes of each family of models, through the scripts, against plain transformers and peft (tests/families.py)."""

import copy
import json

import pytest
import torch

from tests.families import (
    COLUMNS,
    EXCEPTIONS,
    LENGTH,
    MOST_USED,
    Outcome,
    examine,
    families,
    known_lines,
    read_results,
    rows_of_table,
    small_model,
)

# Faults that are known, of which there are none now: family: "kind column column, kind column ..."; kinds are numbered as in issue 27, and further:
# 10: `use_causal_attention` leaves out a mask that the model's own attention reads or extends (silent in doge);
# 11: peft does not load tensors of an adapter, whose modules then hold whatever was in memory, silently;
# 12: a model that plain code cannot train either ends in a traceback instead of a line.
# Whoever mends one deletes it here, and renews the row: python tests/families.py --table FAMILY. `--known` prints this list.
KNOWN: dict[str, str] = {}


def known_faults(family: str) -> dict[str, str]:
    """Return the kind of fault that is known of each column of a family."""
    parts = [part.split() for part in KNOWN.get(family, "").split(",") if part]
    return {column: kind for kind, *columns in parts for column in columns}


EACH = [pytest.param(name, marks=[] if name in MOST_USED else pytest.mark.long) for name in families()]


@pytest.mark.parametrize("family", EACH)
def test_family(family, tmp_path):
    """Every column is ok or refused in the right words, but for the faults that are known, each of which is still there."""
    found, known = examine(family, tmp_path), known_faults(family)
    assert "plain" not in found or EXCEPTIONS[family].impossible in found["plain"].detail, found["plain"].detail
    faults = {column: str(outcome) for column, outcome in found.items() if not outcome.right}
    new = {column: text for column, text in faults.items() if column not in known}
    assert not new, f"{family}: {new}"
    mended = known.keys() - faults.keys()
    assert not mended, f"mended, so delete it from KNOWN: {family} {', '.join(sorted(mended))}"
    if faults:
        pytest.xfail("; ".join(f"{column}, kind {known[column]}: {text}" for column, text in faults.items()))


def test_the_page_has_a_row_for_each_family_with_what_is_known():
    rows = rows_of_table()
    assert list(rows) == families()
    for family, row in rows.items():
        cells = dict(zip(COLUMNS, (cell.strip() for cell in row.split("|")[2:]), strict=False))
        bad = {column for column, cell in cells.items() if cell in ("wrong", "traceback")}
        assert bad <= set(known_faults(family)), f"{family}: {bad}"


def test_what_is_known_names_families_and_columns():
    assert set(KNOWN) | set(EXCEPTIONS) <= set(families())
    assert all(set(known_faults(family)) <= set(COLUMNS) for family in KNOWN)


def test_the_list_of_what_is_known_follows_from_results(tmp_path):
    file = tmp_path / "results.jsonl"
    bad, right = {"status": "wrong", "detail": "", "right": False}, {"status": "refused", "detail": "", "right": True}
    line = json.dumps({"family": "gpt2", "found": {"loss": bad, "merge": bad, "plan": right}})
    file.write_text(f'{line}\n{{"family": "llama", "fou')
    results = read_results(file)
    assert results == {"gpt2": {"loss": Outcome(**bad), "merge": Outcome(**bad), "plan": Outcome(**right)}}
    assert known_lines(results, lambda family: {"merge": "5"}) == ['    "gpt2": "0 loss, 5 merge",']


@pytest.mark.parametrize("family", MOST_USED)
def test_small_models_have_no_vector_that_could_be_forgotten(family):
    model = small_model(family)
    saved = model.state_dict()
    for name, tensor in saved.items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            assert torch.unique(tensor).numel() > 1, name


@pytest.mark.parametrize(
    "family, attribute, value",
    [
        ("mistral", "sliding_window", 1000),
        ("gemma3_text", "sliding_window", 1000),
        ("gpt_oss", "sliding_window", 1000),
        ("qwen2_window", "sliding_window", 1000),
        ("phi3", "sliding_window", 1000),
        ("starcoder2", "sliding_window", 1000),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("granite", "embedding_multiplier", 1.0),
        ("granite", "residual_multiplier", 1.0),
        ("granite", "attention_multiplier", 0.25),
        ("granite", "logits_scaling", 1.0),
    ],
)
def test_small_models_feel_what_could_be_forgotten(family, attribute, value):
    model = small_model(family)
    config = copy.deepcopy(model.config)
    assert getattr(config, attribute) != value
    setattr(config, attribute, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.arange(3, 3 + LENGTH)[None]
    with torch.no_grad():
        apart = (model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max()
    assert apart > 0.01

"""What becomes of each family of models, through the scripts, against plain transformers and peft (tests/families.py)."""

import pytest
import torch

from tests.families import COLUMNS, EXCEPTIONS, MOST_USED, examine, families, rows_of_table, small_model

# Faults that are known: family: "kind column column, kind column ..."; kinds are numbered as in issue 27. Whoever mends one
# deletes it here, and renews the row: python tests/families.py --table FAMILY.
KNOWN: dict[str, str] = {
    "mistral": "1 gradients dropout",
    "gemma": "1 gradients dropout",
    "gemma2": "8 loss gradients dropout answer batch merge",
    "gemma3": "2 loss gradients dropout plan",
    "phi3": "1 gradients dropout",
    "gpt2": "2 loss gradients dropout, 3 merge, 7 plan",
    "gpt_neox": "1 gradients dropout",
    "opt": "1 gradients, 6 dropout",
    "falcon": "2 loss gradients dropout",
    "starcoder2": "1 gradients dropout",
    "qwen3_moe": "3 dropout answer batch merge plan",
    "mixtral": "3 dropout answer batch merge plan",
    "gpt_oss": "8 loss gradients dropout answer batch merge",
    "granite": "1 gradients dropout",
}


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


@pytest.mark.parametrize("family", MOST_USED)
def test_small_models_have_no_vector_that_could_be_forgotten(family):
    model = small_model(family)
    saved = model.state_dict()
    for name, tensor in saved.items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            assert torch.unique(tensor).numel() > 1, name

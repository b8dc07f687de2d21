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

# Faults that are known: family: "kind column column, kind column ..."; kinds are numbered as in issue 27, and further:
# 10: `use_causal_attention` leaves out a mask that the model's own attention reads or extends (silent in doge);
# 11: peft does not load tensors of an adapter, whose modules then hold whatever was in memory, silently;
# 12: a model that plain code cannot train either ends in a traceback instead of a line.
# Whoever mends one deletes it here, and renews the row: python tests/families.py --table FAMILY. `--known` prints this list.
KNOWN: dict[str, str] = {
    "afmoe": "3 dropout answer batch merge plan",
    "apertus": "5 merge",
    "apertus1p5_text": "5 merge",
    "aria_text": "1 gradients dropout",
    "axk1": "1 gradients, 5 merge, 6 dropout",
    "axk2": "4 answer, 5 merge, 10 loss gradients dropout",
    "bailing_hybrid": "1 gradients, 4 answer, 5 merge, 6 dropout",
    "bart": "1 gradients dropout",
    "beam": "1 gradients, 3 dropout answer batch merge plan",
    "bert": "2 loss gradients dropout",
    "bert-generation": "2 loss gradients dropout",
    "big_bird": "8 loss gradients dropout answer batch merge",
    "bigbird_pegasus": "8 loss gradients dropout answer batch merge",
    "bitnet": "1 gradients dropout",
    "blt": "2 loss gradients dropout answer batch merge plan",
    "camembert": "2 loss gradients dropout, 5 merge",
    "codegen": "2 loss gradients dropout",
    "cohere2_moe": "1 gradients, 3 dropout answer batch merge plan",
    "cohere_compass_text": "1 gradients dropout",
    "cpmant": "8 loss gradients dropout answer batch merge",
    "ctrl": "2 loss gradients dropout",
    "data2vec-text": "2 loss gradients dropout",
    "dbrx": "2 loss gradients dropout",
    "deepseek_v32": "3 dropout answer batch merge plan, 10 loss gradients",
    "dots1": "1 gradients, 3 dropout answer batch merge plan",
    "dots3_note": "2 loss gradients dropout answer batch plan, 5 merge",
    "dots3_note_text": "2 loss gradients dropout answer batch plan, 5 merge",
    "electra": "2 loss gradients dropout",
    "ernie": "2 loss gradients dropout",
    "ernie4_5_moe": "3 dropout answer batch merge plan",
    "exaone_moe": "3 dropout answer batch merge plan",
    "falcon_mamba": "7 plan, 8 loss gradients dropout answer batch merge",
    "flex_olmo": "1 gradients, 3 dropout answer batch merge plan",
    "flint": "8 loss gradients dropout answer batch merge",
    "fuyu": "2 loss gradients dropout plan",
    "gemma3n_text": "12 loss",
    "gemma4_unified": "2 loss gradients dropout answer batch",
    "gemma4_unified_assistant": "2 loss",
    "gemma4_unified_text": "2 loss gradients dropout answer batch, 5 merge",
    "git": "2 plan, 8 loss gradients dropout answer batch merge",
    "glm4_moe_lite": "3 dropout answer batch merge plan",
    "glm_moe_dsa": "3 dropout answer batch merge plan, 10 loss gradients",
    "got_ocr2": "2 plan, 8 loss gradients dropout answer batch merge",
    "gpt-sw3": "2 loss gradients dropout, 3 merge, 7 plan",
    "gpt_bigcode": "2 loss gradients dropout",
    "gpt_neo": "8 loss gradients dropout answer batch merge",
    "gpt_neox_japanese": "8 loss gradients dropout answer batch merge",
    "granite_swa": "8 loss gradients dropout answer batch merge",
    "granitemoe_swa": "8 loss gradients dropout answer batch merge",
    "granitemoehybrid": "4 answer",
    "hrm_text": "2 loss gradients dropout",
    "hunyuan_v1_dense": "1 gradients dropout",
    "hunyuan_v1_moe": "3 dropout answer batch merge plan",
    "hy_v3": "1 gradients, 5 merge, 6 dropout",
    "hy_v4": "8 loss gradients dropout answer batch merge",
    "hyperclovax": "1 gradients dropout",
    "inkling2_loop_text": "8 loss gradients dropout answer batch merge",
    "inkling2_text": "8 loss gradients dropout answer batch merge",
    "inkling_text": "1 gradients dropout, 4 answer, 5 merge",
    "internlm3": "1 gradients dropout",
    "jamba": "4 answer",
    "jetmoe": "6 dropout",
    "kimi_linear": "4 answer, 5 merge, 6 dropout",
    "kolibri1": "5 merge",
    "laguna": "11 answer batch merge",
    "lara_mini": "1 gradients, 4 answer, 6 dropout",
    "lfm2_moe": "4 answer, 5 merge",
    "lfm3": "4 answer",
    "longcat_flash": "12 loss",
    "mamba2": "7 plan, 8 loss gradients dropout answer batch merge",
    "megatron-bert": "8 loss gradients dropout answer batch merge",
    "mellum": "3 dropout answer batch merge plan",
    "mimo_v2_flash": "8 loss gradients dropout answer batch merge",
    "minicpm3": "1 gradients, 6 dropout",
    "minimax": "3 dropout answer batch merge plan",
    "minimax_m2": "3 dropout answer batch merge plan",
    "minimax_m3_vl_text": "1 gradients, 5 merge, 6 dropout",
    "ministral": "1 gradients dropout",
    "mllama": "2 loss gradients dropout merge",
    "modernbert-decoder": "2 loss gradients dropout",
    "moshi": "1 gradients dropout, 4 batch",
    "moss_transcribe_diarize": "2 loss gradients dropout plan",
    "mvp": "8 loss gradients dropout answer batch merge",
    "nemotron": "1 gradients dropout",
    "olmo": "1 gradients dropout",
    "olmo_hybrid": "1 gradients dropout, 4 answer",
    "openai-gpt": "7 plan, 8 loss gradients dropout answer batch merge",
    "phi4_multimodal": "2 loss gradients dropout plan",
    "plbart": "1 gradients dropout",
    "prophetnet": "8 loss gradients dropout answer batch merge",
    "qwen2_moe": "6 dropout",
    "qwen3_5": "1 gradients dropout, 4 answer",
    "qwen3_5_moe": "4 answer, 6 dropout",
    "qwen3_5_moe_text": "1 gradients, 4 answer, 6 dropout",
    "qwen4_exp": "4 answer, 10 loss gradients dropout",
    "qwen4_exp_text": "4 answer, 10 loss gradients dropout",
    "recurrent_gemma": "1 gradients dropout",
    "rembert": "8 loss gradients dropout answer batch merge",
    "roberta": "2 loss gradients dropout",
    "roberta-prelayernorm": "2 loss gradients dropout",
    "roc_bert": "2 loss gradients dropout",
    "roformer": "8 loss gradients dropout answer batch merge",
    "rwkv": "7 plan, 8 loss gradients dropout merge",
    "sarvam_mla": "3 dropout answer batch merge plan",
    "sarvam_moe": "5 merge",
    "solar_open": "3 dropout answer batch merge plan",
    "stablelm": "1 gradients dropout",
    "trocr": "8 loss gradients dropout answer batch merge",
    "vaultgemma": "8 loss gradients dropout answer batch merge",
    "whisper": "1 gradients dropout",
    "xglm": "8 loss gradients dropout answer batch merge",
    "xlm": "8 loss gradients dropout answer batch merge",
    "xlm-roberta": "2 loss gradients dropout, 5 merge",
    "xlm-roberta-xl": "2 loss gradients dropout",
    "xlnet": "8 loss gradients dropout answer batch merge",
    "xlstm": "7 plan, 8 loss gradients dropout answer batch merge",
    "xmod": "2 loss gradients dropout",
    "youtu": "1 gradients, 6 dropout",
    "zamba": "4 answer",
    "zamba2": "4 answer",
    "zaya": "1 gradients dropout, 4 answer",
    "glm4_moe_attention": "1 gradients dropout, 5 merge",
    "deepseek_v3_attention": "1 gradients dropout, 5 merge",
    "falcon_alibi": "2 loss gradients dropout",
    "falcon_new": "2 loss gradients dropout",
    "qwen2_window": "1 gradients dropout",
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

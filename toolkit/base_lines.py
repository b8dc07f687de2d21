"""The log lines about a loaded base: what of it is unusual in training."""

import bitsandbytes as bnb
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from config import Config, ConfigError
from fast_path.dropout import own_dropout_line
from fast_path.experts import expert_lines
from fast_path.families import decoder_layers, head_width, known_positions, of, rope_parameters
from fast_path.nf4 import runs_on
from quantization_utils import count_parameters, weight_count
from toolkit.expert_plan import experts_each


def beyond_positions(max_length: int, positions: int | None) -> list[str]:
    """Return a list with a line if blocks are longer than the positions that a model supports, else []."""
    if not positions or max_length <= positions:
        return []
    more = f"{max_length:,} tokens are more than the {positions:,} positions that the model supports"
    return [f"warning: data.max_length: {more}"]


def check_length(max_length: int, config: PretrainedConfig) -> list[str]:
    """Return beyond_positions; raise ConfigError if the model's positions are a table, which has no more rows.

    Rotary embeddings also work beyond the positions, and packed samples may all be shorter than a block: then a line
    is enough.
    """
    positions = known_positions(config)
    if positions and max_length > positions and not rope_parameters(config):
        raise ConfigError(f"data.max_length: expected at most the model's {positions:,} positions, got {max_length:,}")
    return beyond_positions(max_length, positions)


def base_lines(config: Config, model: PreTrainedModel) -> list[str]:
    """Return the log lines about a loaded base: what of it is unusual in training. Raises ConfigError, as check_length."""
    lines = check_length(config.data.max_length, model.config)
    layers, wanted = len(decoder_layers(model)), config.training.gradient_checkpointing
    if not isinstance(wanted, bool | str) and wanted > layers:
        more = f"{wanted} layers are more than the {layers} that the model has: all are checkpointed"
        lines.append(f"warning: training.gradient_checkpointing: {more}")
    attention = model.config._attn_implementation
    capped = runs_on(model.device) and of(decoder_layers(model)[0]).score_cap  # training runs capped_attention.py
    if config.model.attn_implementation == "auto" and attention != "sdpa" and head_width(model.config) and not capped:
        name = type(model).__name__
        lines.append(f"attention: {attention}, since {name} has no sdpa; it stores the scores of all pairs of tokens")
    lines += own_dropout_line(model) + expert_lines(model, experts_each(model.config) > 0)
    if config.quantization.experts == "cpu" and model.device.type == "cpu":
        lines.append("quantization.experts: cpu changes nothing without a GPU, since all weights are in main memory")
    return lines + (unpacked_line(model) if config.quantization.load_in_4bit else [])


def unpacked_line(model: nn.Module) -> list[str]:
    """Return a line if a hundredth of the weights or more stays in 16 bit besides embedding and head, else [].

    bitsandbytes packs linear layers alone, not classes derived from nn.Linear; of the experts of a mixture those are
    packed whose layout the toolkit knows (fast_path/experts.py).
    """
    left: dict[str, int] = {}
    apart = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1 and not isinstance(parameter, bnb.nn.Params4bit) and id(parameter) not in apart:
                left[type(module).__name__] = left.get(type(module).__name__, 0) + parameter.numel()
    total, packed = (
        count_parameters(model)[1],
        sum(weight_count(p) for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)),
    )
    named = ", ".join(f"{count:,} of {name}" for name, count in left.items() if count >= total / 100)
    return (
        [f"in 4 bit: {packed:,} of {total:,} weights; in 16 bit besides embedding and head: {named}"] if named else []
    )

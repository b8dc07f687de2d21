"""Trained rows of the embedding (lora.train_tokens) without copies of the embedding.

peft copies the whole embedding with its trained rows in each forward pass, and makes a gradient of that size. Its layers
and names stay; only what they compute is done otherwise, with the same numbers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from config import ConfigError


class TokenRows(NamedTuple):
    """Rows of a weight that are trained: their values, [rows, width], and their numbers, int64 [rows]."""

    values: torch.Tensor
    numbers: torch.Tensor


def trained_rows(layer: TrainableTokensLayer) -> TokenRows | None:
    """Return the rows that act in a layer of peft; None while adapters are off or the rows are merged into the weight."""
    names = [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)
    if not names:
        return None
    values = layer.trainable_tokens_delta[names[0]]
    return TokenRows(values, torch.tensor(layer.token_indices[names[0]], device=values.device))


def look_up(layer: TrainableTokensLayer, ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of tokens, [batch, length, width]: of the trained rows and, for all other tokens, the base's.

    ids: [batch, length].
    """
    found, rows = layer.base_layer(ids), trained_rows(layer)
    if rows is None:
        return found
    order = rows.numbers.argsort()
    place = torch.searchsorted(rows.numbers[order], ids).clamp_max(len(order) - 1)
    own = F.embedding(order[place], rows.values).to(layer.base_layer.weight.dtype)
    if (scale := layer._get_embed_scale()) is not None:  # Gemma's base layer multiplies by it too
        own = own * scale.to(own.dtype)
    trained = rows.numbers[order][place] == ids
    return torch.where(trained[..., None], own, found)


def use_token_rows(model: nn.Module) -> None:
    """Let the embedding of a model with lora.train_tokens look its trained rows up; raise ConfigError for a biased head."""
    for module in model.modules():
        if not isinstance(module, TrainableTokensWrapper):
            continue
        layer = module.token_adapter
        if isinstance(layer.base_layer, nn.Embedding):
            if layer.base_layer.padding_idx not in {i for ids in layer.token_indices.values() for i in ids}:
                layer.forward = look_up.__get__(layer)
        elif layer.base_layer.bias is not None:  # peft would leave it out
            raise ConfigError(
                "lora.train_tokens: the head shares the rows of the embedding and has a bias, which peft drops"
            )

"""Products of a model's head, for any size of the vocabulary.

cuBLAS multiplies 16-bit matrices at full speed only if their sizes are multiples of 8. A vocabulary often is not: it has one
token more than the pretrained model's, or 49,159 as Granite's. Such products took five to eight times as long on an H200
(docs/measurements.md, "Constants in the code"). So the last few tokens, fewer than 8, have a product of their own.
"""

import torch
import torch.nn.functional as F

MULTIPLE = 8  # numbers of 16 bits: 16 bytes


def padded(vocabulary: int) -> int:
    """Return the numbers from one row of logits to the next, so that each row begins at whole 16 bytes."""
    return -(-vocabulary // MULTIPLE) * MULTIPLE


def _rest(vocabulary: int) -> int:
    """Return how many of the last tokens have a product of their own."""
    return vocabulary % MULTIPLE if vocabulary > MULTIPLE else 0


def head_product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    """Write rows @ weight.T + bias to `logits` and return it.

    rows: [rows, width]; weight: [vocabulary, width]; logits: [rows, vocabulary], a part of [rows, padded(vocabulary)].
    """
    rest = _rest(len(weight))
    whole = len(weight) - rest
    if bias is None:
        torch.mm(rows, weight[:whole].t(), out=logits[:, :whole])
    else:
        torch.addmm(bias[:whole], rows, weight[:whole].t(), out=logits[:, :whole])
    if rest:  # a few tokens are computed twice, so that there are eight
        last = F.linear(rows, weight[-MULTIPLE:], None if bias is None else bias[-MULTIPLE:])
        logits[:, whole:] = last[:, -rest:]
    return logits


def head_gradient(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return gradient @ weight, [rows, width]: what `head_product` read gets from the gradient of its logits."""
    rest = _rest(len(weight))
    if not rest:
        return gradient @ weight
    whole = len(weight) - rest
    last = gradient[:, whole:] @ weight[whole:]
    return torch.addmm(last, gradient[:, :whole], weight[:whole])

"""What makes training fast without changing what is learned: dropout masks without state, attention without a mask tensor,
and cross entropy over a frozen head that never holds the logits whole.
"""

import zlib

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# ------------------------------------------------------------------------------------------------ stateless dropout


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit integers, in place (lowbias32 of C. Wellons, "Prospecting for Hash Functions", 2018).

    x: int32, any shape; products wrap. The logical shifts are arithmetic ones with the sign bits masked away.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975  # 0x846CA68B as a signed number
    x ^= (x >> 16) & 0xFFFF
    return x


def int32(number: int) -> int:
    """Return the signed number with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


class DropoutClock:
    """Which sequences of which optimizer step the model is seeing, as device tensors that a captured graph reads anew.

    step: int32 scalar. sequences: int32 [batch], each row's number within the step's window over all micro-batches and
    processes, so that another micro-batch shape, a recompute or a resumed run meets the same masks with no RNG state.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int32, device=device)
        self.sequences = torch.zeros(1, dtype=torch.int32, device=device)
        self._last: tuple | None = None

    def set(self, step: int, sequences: torch.Tensor) -> None:
        """Name the optimizer step and the rows of the micro-batch about to run."""
        self.step.fill_(step)
        if self.sequences.shape == sequences.shape:
            self.sequences.copy_(sequences)
        else:
            self.sequences = sequences.to(self.step.device, torch.int32)
        self._last = None

    def row_keys(self, salt: int, length: int) -> torch.Tensor:
        """Return a 32-bit key for each position, int32 [batch, length], of the modules that share `salt`."""
        key = mix(self.step ^ int32(self.seed * 0x9E3779B1 ^ salt))
        key = mix(key ^ self.sequences)
        position = torch.arange(length, dtype=torch.int32, device=key.device)
        return mix(key[:, None] ^ mix(position)[None])

    def keep(self, salt: int, length: int, features: int, p: float) -> torch.Tensor:
        """Return which inputs survive, bool [batch, length, features]; the modules that read one x ask in turn for one mask."""
        asked = (salt, length, features, p)
        if self._last is None or self._last[0] != asked:
            feature = torch.arange(features, dtype=torch.int32, device=self.step.device)
            bits = mix(self.row_keys(salt, length)[..., None] ^ (feature * int32(0x9E3779B1)))
            self._last = (asked, ((bits >> 8) & 0xFFFFFF) >= drop_threshold(p))
        return self._last[1]


def drop_threshold(p: float) -> int:
    """Return how many of the 2**24 hash values drop."""
    return round(p * 2**24)


class StatelessDropout(nn.Module):
    """Stands in for peft's nn.Dropout on an adapter's input while training; identity in eval mode. x: [batch, length, features]."""

    def __init__(self, p: float, clock: DropoutClock, salt: int):
        super().__init__()
        self.p, self.clock, self.salt = p, clock, salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = self.clock.keep(self.salt, x.shape[-2], x.shape[-1], self.p)
        return torch.where(keep, x, 0) * (1 / (1 - self.p))


# Modules that read the same x share a mask, so that one pass over x can serve all of them.
READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def use_stateless_dropout(model: nn.Module, p: float, clock: DropoutClock) -> int:
    """Replace the dropout of every adapter of a peft model and return how many were replaced."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and p > 0:
            parent, _, leaf = name.rpartition(".")
            salt = zlib.crc32(f"{parent}.{READERS.get(leaf, leaf)}".encode())
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = StatelessDropout(p, clock, salt)
                count += 1
    return count


# ------------------------------------------------------------------------------------------------ attention without a mask

CAUSAL = "sdpa_causal"


def _no_mask(*, kv_length: int, local_size: int | None = None, **kwargs) -> torch.Tensor | None:
    """Return no mask, so that SDPA takes its is_causal path; a real one where the length exceeds a sliding window."""
    if local_size is None or kv_length <= local_size:
        return None
    return sdpa_mask(kv_length=kv_length, local_size=local_size, **kwargs)


def use_causal_attention(model: nn.Module) -> bool:
    """Train without mask tensors: blocks are full and padding is on the right, so causality alone is exact.

    transformers builds a 4-D mask where it cannot look at the data (in a captured graph); this keeps the fast path of SDPA.
    Returns whether the model was switched: only one that runs `sdpa` is.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    AttentionMaskInterface.register(CAUSAL, _no_mask)
    model.set_attn_implementation(CAUSAL)
    return True


# ------------------------------------------------------------------------------------------------ cross entropy, frozen head


def chunk_rows(vocabulary: int) -> int:
    """Return how many positions' logits to hold at once: 256 MiB in fp32."""
    return max(16, 2**26 // vocabulary)


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows, targets = hidden[start : start + chunk], labels[start : start + chunk]
            logits = F.linear(rows.to(weight.dtype), weight, bias).float()  # [chunk, vocabulary]
            kept = (targets != -100).float()[:, None]
            index = targets.clamp_min(0)[:, None]
            log_sum = torch.logsumexp(logits, -1, keepdim=True)
            loss += ((log_sum - logits.gather(1, index)) * kept).sum()
            if gradient is not None:  # softmax - one-hot, built in the logits' own memory
                logits.sub_(log_sum).exp_().scatter_add_(1, index, -torch.ones_like(log_sum)).mul_(kept)
                gradient[start : start + chunk] = (logits.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the summed cross entropy, fp32, of `hidden @ weight.T + bias` against `labels` without holding all logits.

    hidden: [positions, width]; weight: [vocabulary, width], frozen; labels: [positions], -100 where nothing is supervised.
    The gradient of `hidden` is finished in the forward, chunk by chunk (the idea of Liger-Kernel's fused linear cross entropy);
    `weight` and `bias` get none, so an adapter on the head needs another loss.
    """
    return _FrozenHeadCrossEntropy.apply(hidden, weight, bias, labels, chunk or chunk_rows(len(weight)))


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label of each position's next token, [batch, length]; the last position has none (-100)."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)

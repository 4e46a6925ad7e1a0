"""The EAGLE-3 draft head. State-dict names are the interface to SGLang (arXiv 2503.01840; SGLang models/llama_eagle3.py).

Legend: n rows, H hidden size, A width of what fc reads (n_aux * H, or the rank of a projection), D draft vocabulary, h heads,
kv key/value heads, d head dim.

The head works on flat rows (no padding). Embeddings come from outside, so that the frozen table is no part of the
optimiser or the checkpoints, and the rotary tables stay in fp32 whatever dtype the module is cast to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .batch import DraftBatch
from .loss import RowTerms, VocabularyHead
from .settings import DraftSettings


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis; half precision is normed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """y = x / rms(x) * weight with its gradient by hand: half the passes over memory of the composed operation."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN001
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
        inverse = (square / x.shape[-1] + eps).rsqrt()  # [n, 1]
        normed = x * inverse  # [n, H] in the wide dtype
        ctx.save_for_backward(normed, inverse, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN001
        normed, inverse, weight = ctx.saved_tensors
        along = dy * normed  # [n, H]
        dweight = along.flatten(0, -2).sum(0)
        mean = (along @ weight.to(along.dtype) / normed.shape[-1])[..., None]  # [n, 1]
        dx = (dy * weight).to(normed.dtype).addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx.to(dy.dtype), dweight.to(weight.dtype), None


class Rotary:
    """The target's own rotary embedding, as a table over positions. No module: never cast, never saved."""

    def __init__(self, settings: DraftSettings):
        self._embedding = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=settings.hidden_size,
                num_attention_heads=settings.num_attention_heads,
                head_dim=settings.head_dim,
                max_position_embeddings=settings.max_position_embeddings,
                rope_parameters=settings.rope_parameters,
            )
        )
        self._cos = self._sin = torch.empty(0)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [n, heads, d] to positions [n]."""
        self._grow(int(positions.max()) + 1 if len(positions) else 0, x)
        cos, sin = self._cos[positions, None], self._sin[positions, None]  # [n, 1, d]
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    def _grow(self, length: int, like: Tensor) -> None:
        """Tables of at least `length` positions in x's dtype and on its device: computed in fp32, then cast."""
        if length > len(self._cos) or self._cos.dtype != like.dtype or self._cos.device != like.device:
            positions = torch.arange(max(length, 2 * len(self._cos)), device=like.device)
            cos, sin = self._embedding.to(like.device)(torch.empty(0, device=like.device), positions[None])  # [1, P, d]
            self._cos, self._sin = cos[0].to(like.dtype), sin[0].to(like.dtype)


class Attention(nn.Module):
    """The four projections; the attention itself is draft/attention.py."""

    def __init__(self, settings: DraftSettings):
        super().__init__()
        width, head_dim = settings.hidden_size, settings.head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(2 * width, settings.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(2 * width, settings.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(2 * width, settings.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(settings.num_attention_heads * head_dim, width, bias=False)


class MLP(nn.Module):
    def __init__(self, settings: DraftSettings):
        super().__init__()
        self.gate_proj = nn.Linear(settings.hidden_size, settings.intermediate_size, bias=False)
        self.up_proj = nn.Linear(settings.hidden_size, settings.intermediate_size, bias=False)
        self.down_proj = nn.Linear(settings.intermediate_size, settings.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The draft's one decoder layer, in the three pieces that training and serving share."""

    def __init__(self, settings: DraftSettings):
        super().__init__()
        norm = lambda: RMSNorm(settings.hidden_size, settings.rms_norm_eps)  # noqa: E731
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = norm(), norm(), norm()
        self.self_attn = Attention(settings)
        self.mlp = MLP(settings)
        self._rotary = Rotary(settings)

    def mix(self, normed: Tensor, g: Tensor) -> Tensor:
        """[n, 2H]: embeddings that input_layernorm has normed FIRST, then the normed feature or recurrent state."""
        return torch.cat((normed, self.hidden_norm(g)), dim=-1)

    def query(self, u: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [n, h, d] of mixed rows u [n, 2H]."""
        return self._rotary(self.self_attn.q_proj(u).unflatten(-1, (-1, self.self_attn.head_dim)), positions)

    def key_value(self, u: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [n, kv, d] of mixed rows u [n, 2H]."""
        attention = self.self_attn
        key = self._rotary(attention.k_proj(u).unflatten(-1, (-1, attention.head_dim)), positions)
        return key, attention.v_proj(u).unflatten(-1, (-1, attention.head_dim))

    def finish(self, g: Tensor, attended: Tensor) -> Tensor:
        """The next recurrent state [n, H] (pre-norm); the residual is the un-normed g. attended [n, h, d]."""
        h = g + self.self_attn.o_proj(attended.flatten(-2))
        return h + self.mlp(self.post_attention_layernorm(h))


class DraftHead(nn.Module):
    """fc, one layer, norm and the head over the draft vocabulary."""

    def __init__(self, settings: DraftSettings):
        super().__init__()
        self.settings = settings
        if settings.owns_embedding:
            self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        if settings.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(settings.target_width, settings.rms_norm_eps) for _ in settings.layers)
        self.fc = nn.Linear(settings.aux_width, settings.hidden_size, bias=False)
        self.midlayer = Layer(settings)
        self.norm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
        self.lm_head = VocabularyHead(settings.hidden_size, settings.draft_vocab_size, bias=False)

    def features(self, aux: Tensor) -> Tensor:
        """g [n, H] of captured states (or their projection) [n, A], before the first step."""
        return self.fc(self.normed(aux))

    def normed(self, aux: Tensor) -> Tensor:
        """What fc reads of captured states [n, A]."""
        if not self.settings.fc_norm:
            return aux
        chunks = aux.split(self.settings.target_width, dim=-1)
        return torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)

    def embedded(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Embeddings [n, H] of tokens [n]: rows of the target's frozen table [V, H], or of a narrower draft's own."""
        return self.embed_tokens(tokens) if self.settings.owns_embedding else table[tokens]

    def outputs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Of a step's state [n, H] what lm_head reads, and the g that recurs."""
        normed = self.norm(state)
        return normed, normed if self.settings.norm_output else state

    def forward(self, batch: DraftBatch, embed: Tensor, terms: RowTerms) -> tuple[Tensor, Tensor, Tensor]:
        """The training unroll's loss (a scalar), and per step its mean cross-entropy and acceptance [K], detached."""
        from .unroll import unrolled_states

        states = torch.cat(unrolled_states(self, batch, embed, len(batch.steps)))
        loss = self.lm_head(states, terms)
        return loss, terms.entropy, terms.alpha


def new_head(
    settings: DraftSettings,
    seed: int,
    *,
    lm_head: Tensor | None = None,
    norm: Tensor | None = None,
    fc_norm: Tensor | None = None,
    embed: Tensor | None = None,
) -> DraftHead:
    """A head with seeded random weights (normal, 0.02) but lm_head [D, H], norm [H], fc_norm [A] and embed [V, H] where given."""
    head = DraftHead(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
        if lm_head is not None:
            head.lm_head.weight.copy_(lm_head)
        if embed is not None:
            head.embed_tokens.weight.copy_(embed)
        if norm is not None:
            head.norm.weight.copy_(norm)
        if fc_norm is not None:
            for module, weight in zip(head.fc_norm, fc_norm.split(settings.target_width), strict=True):
                module.weight.copy_(weight)
    return head

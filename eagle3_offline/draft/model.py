"""The EAGLE-3 draft head. State-dict names are the interface to SGLang (arXiv 2503.01840; SGLang models/llama_eagle3.py).

Legend: n rows, H hidden size, A width of what fc reads (n_aux * H, or the rank of a projection), D draft vocabulary, h heads,
kv key/value heads, d head dim.

The head works on flat rows (no padding). Embeddings come from outside, so that the frozen table is no part of the
optimiser or the checkpoints, and the rotary tables stay in fp32 whatever dtype the module is cast to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .batch import DraftBatch
from .fused import wide
from .loss import RowTerms, VocabularyHead
from .products import Linear, filled, linear, summed
from .settings import DraftSettings


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
        cos, sin = (table.index_select(0, positions)[:, None] for table in (self._cos, self._sin))  # [n, 1, d]
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    def _grow(self, length: int, like: Tensor) -> None:
        """Tables of at least `length` positions in x's dtype and on its device: computed in fp32, then cast.

        The first half of the sines is negative: (low, high) turns into (low cos - high sin, high cos + low sin).
        """
        if length > len(self._cos) or self._cos.dtype != like.dtype or self._cos.device != like.device:
            positions = torch.arange(max(length, 2 * len(self._cos)), device=like.device)
            cos, sin = self._embedding.to(like.device)(torch.empty(0, device=like.device), positions[None])  # [1, P, d]
            low, high = sin[0].chunk(2, dim=-1)
            self._cos, self._sin = cos[0].to(like.dtype), torch.cat((-low, high), dim=-1).to(like.dtype)


class Projection(Linear):
    """A projection that is used in halves. Without an argument its call gives a copy of the weight, which ZeRO-3 gathers for calls only."""

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.weight.clone() if x is None else super().forward(x)


class Attention(nn.Module):
    """The four projections; the attention itself is draft/attention.py."""

    def __init__(self, settings: DraftSettings):
        super().__init__()
        width, head_dim = settings.hidden_size, settings.head_dim
        self.head_dim = head_dim
        self.q_proj = Projection(2 * width, settings.num_attention_heads * head_dim)
        self.k_proj = Projection(2 * width, settings.num_key_value_heads * head_dim)
        self.v_proj = Projection(2 * width, settings.num_key_value_heads * head_dim)
        self.o_proj = Linear(settings.num_attention_heads * head_dim, width)


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight, made in fp32 or wider. Keeps x as it is for the backward pass, where autograd would keep it twice in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN001
        values = x.to(wide(x), copy=True)
        inverse = (values.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return values.mul_(inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:  # noqa: ANN001
        x, weight, inverse = ctx.saved_tensors
        normed, gradient = (y.to(inverse.dtype, copy=True) for y in (x, gradient))  # products of two dtypes widen one anew each time
        product = gradient * normed.mul_(inverse)
        of_weight = product.sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:  # of embeddings and captured states
            return None, of_weight, None
        weight = weight.to(inverse.dtype)
        of_normed = gradient.mul_(weight)
        of_x = of_normed.addcmul_(normed, (product @ weight)[:, None], value=-1 / x.shape[-1]).mul_(inverse)
        return of_x.to(x.dtype), of_weight, None


class RMSNorm(nn.RMSNorm):
    """torch's, which is one kernel on a GPU, but on a CPU a chain of operations."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_cuda else _Norm.apply(x, self.weight, self.eps)


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up. Keeps these two alone for the backward pass, where autograd would keep silu(gate) too."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class MLP(nn.Module):
    def __init__(self, settings: DraftSettings):
        super().__init__()
        self.gate_proj = Linear(settings.hidden_size, settings.intermediate_size)
        self.up_proj = Linear(settings.hidden_size, settings.intermediate_size)
        self.down_proj = Linear(settings.intermediate_size, settings.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        rows = filled(x)  # here, or each product would keep filled rows of its own
        return self.down_proj(_GatedSilu.apply(self.gate_proj(rows), self.up_proj(rows)))[: len(x)]


class Layer(nn.Module):
    """The draft's one decoder layer, in the pieces that training and serving share."""

    def __init__(self, settings: DraftSettings):
        super().__init__()
        norm = lambda: RMSNorm(settings.hidden_size, eps=settings.rms_norm_eps)  # noqa: E731
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = norm(), norm(), norm()
        self.self_attn = Attention(settings)
        self.mlp = MLP(settings)
        self.rotary = Rotary(settings)
        self._head_counts = settings.num_attention_heads, settings.num_key_value_heads

    def halves(self) -> tuple[Tensor, Tensor]:
        """q_proj, k_proj and v_proj as one, [(h + 2 kv) d, H]: of the embedding, which is the FIRST half of what they read, and of g.

        The embedding of a token is read at several steps, but projected once.
        """
        attention = self.self_attn
        projections = torch.cat([projection() for projection in (attention.q_proj, attention.k_proj, attention.v_proj)])
        of_embedding, of_state = projections.chunk(2, dim=1)
        return of_embedding, summed(of_state)

    def project(self, embedded: Tensor, of_embedding: Tensor) -> Tensor:
        """The embeddings' [n, H] share in queries, keys and values: [n, (h + 2 kv) d]."""
        return linear(self.input_layernorm(embedded), of_embedding)

    def query_key_value(self, projected: Tensor, g: Tensor, of_state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [n, h, d] and keys, and values [n, kv, d], of rows with the embeddings' share `projected` and the feature or
        recurrent state g [n, H]."""
        heads, (queries, kv) = self._heads(projected, g, of_state), self._head_counts
        rotating, values = heads.split((queries + kv, kv), dim=1)
        return *self.rotary(rotating, positions).split((queries, kv), dim=1), values

    def query(self, projected: Tensor, g: Tensor, of_state: Tensor, positions: Tensor) -> Tensor:
        """The first of these alone."""
        queries = slice(self._head_counts[0] * self.self_attn.head_dim)
        return self.rotary(self._heads(projected[:, queries], g, of_state[queries]), positions)

    def key_value(self, projected: Tensor, g: Tensor, of_state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The other two alone."""
        others = slice(self._head_counts[0] * self.self_attn.head_dim, None)
        keys, values = self._heads(projected[:, others], g, of_state[others]).chunk(2, dim=1)
        return self.rotary(keys, positions), values

    def _heads(self, projected: Tensor, g: Tensor, of_state: Tensor) -> Tensor:
        """[n, heads, d]"""
        return (projected + linear(self.hidden_norm(g), of_state)).unflatten(-1, (-1, self.self_attn.head_dim))

    def finish(self, g: Tensor, attended: Tensor) -> Tensor:
        """The next recurrent state [n, H] (pre-norm); the residual is the un-normed g. attended [n, h, d]."""
        h = g + self.self_attn.o_proj(attended.flatten(-2))
        return h + self.mlp(self.post_attention_layernorm(h))


class DraftHead(nn.Module):
    """fc, one layer, norm and the head over the draft vocabulary."""

    def __init__(self, settings: DraftSettings):
        super().__init__()
        self.settings = settings
        self.attention = "auto"  # backend of draft/attention.py
        self.checkpoint_activations = False  # keep only each step's inputs for the backward pass, which makes the rest again
        if settings.owns_embedding:
            self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        if settings.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(settings.target_width, eps=settings.rms_norm_eps) for _ in settings.layers)
        self.fc = Linear(settings.aux_width, settings.hidden_size)
        self.midlayer = Layer(settings)
        self.norm = RMSNorm(settings.hidden_size, eps=settings.rms_norm_eps)
        self.lm_head = VocabularyHead(settings.hidden_size, settings.draft_vocab_size)

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
    layer: Mapping[str, Tensor] | None = None,
) -> DraftHead:
    """A head with seeded random weights (normal, 0.02) but lm_head [D, H], norm [H], fc_norm [A] and embed [V, H] where given.

    layer: a decoder layer of the target by names, to start from.
    """
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
        if layer is not None:
            _start_layer(head.midlayer, layer)
    return head


def _start_layer(midlayer: Layer, given: Mapping[str, Tensor]) -> None:
    """The target's weights W; of the two halves that q, k and v read the embedding's gets 0.5 W and the state's W, each normed alike."""
    for name, weight in given.items():
        parameter = midlayer.get_parameter(name)
        halved = parameter.shape[-1] == 2 * weight.shape[-1]
        parameter.copy_(torch.cat((0.5 * weight, weight), dim=-1) if halved else weight)
    midlayer.hidden_norm.weight.copy_(given["input_layernorm.weight"])

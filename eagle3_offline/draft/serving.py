"""The draft as a server runs it: step by step, with a key/value cache, one conversation. Legend as draft/model.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attend, no_own, with_own
from .model import DraftHead


class ChainDrafter:
    """Drafts chains of tokens. Keys of drafted positions live for one chain only; those of true features stay."""

    def __init__(self, head: DraftHead, embed: Tensor, target_ids: Tensor):
        """embed [V, H] is the target's table; target_ids [D] maps draft ids to the target's. All on one device."""
        self.head, self.embed, self.target_ids = head, embed, target_ids
        settings = head.settings
        with torch.no_grad():
            self._of_embedding, self._of_state = head.midlayer.halves()
        empty = torch.zeros(0, settings.num_key_value_heads, settings.head_dim, dtype=head.fc.weight.dtype, device=embed.device)
        self.keys, self.values = empty, empty
        self._newest: tuple[Tensor, Tensor] | None = None  # [1, H] what lm_head reads of the newest row, and its recurrent state

    @torch.no_grad()
    def extend(self, aux: Tensor, tokens: Tensor) -> None:
        """Take in true features: row p pairs aux[p] [m, A] of verified tokens with the tokens [m] that follow them."""
        positions = torch.arange(len(self.keys), len(self.keys) + len(aux), device=aux.device)
        g = self.head.features(aux.to(self.head.fc.weight.dtype))
        layer, projected = self.head.midlayer, self._projected(tokens)
        key, value = layer.key_value(projected, g, self._of_state, positions)
        self.keys, self.values = torch.cat((self.keys, key)), torch.cat((self.values, value))
        query = layer.query(projected[-1:], g[-1:], self._of_state, positions[-1:])
        own = no_own(self.keys, 1)
        attended = attend(query, positions[-1:], self.keys, self.values, own, own)
        self._newest = self.head.outputs(layer.finish(g[-1:], attended))

    @torch.no_grad()
    def chain_logits(self, follow: list[int] | None, length: int) -> list[Tensor]:
        """Logits [D] of `length` drafted positions after the newest row. `follow`: tokens to read instead of the own drafts."""
        layer, row = self.head.midlayer, len(self.keys) - 1
        (state, g), logits = self._newest, []
        own_keys = own_values = no_own(self.keys, 1)
        for step in range(length):
            if step:
                token = follow[step - 1] if follow is not None else int(self.target_ids[logits[-1].argmax()])
                token, position = torch.tensor([token], device=g.device), torch.tensor([row + step], device=g.device)
                query, key, value = layer.query_key_value(self._projected(token), g, self._of_state, position)
                own_keys, own_values = with_own(own_keys, key), with_own(own_values, value)
                attended = attend(query, position - step, self.keys, self.values, own_keys, own_values)
                state, g = self.head.outputs(layer.finish(g, attended))
            logits.append(self.head.lm_head(state)[0])
        return logits

    def _projected(self, tokens: Tensor) -> Tensor:
        """The share of tokens [m] in their rows' queries, keys and values."""
        return self.head.midlayer.project(self.head.embedded(tokens, self.embed), self._of_embedding)

    def draft(self, length: int) -> list[int]:
        """The next `length` tokens that the draft proposes, as target ids."""
        return [int(self.target_ids[logits.argmax()]) for logits in self.chain_logits(None, length)]

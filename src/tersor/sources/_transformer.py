"""Networks of the transformers library, with forward's parameters and its one output written out.

Exporters read the names of inputs off forward's signature, and runtimes return tensors, not the
library's records.
"""

from typing import Any

from torch import Tensor, nn

from tersor.sources._pooling import Pooling, pool


class ImageNet(nn.Module):
    """Takes pixels: (batch, channels, height, width), as the image processor leaves them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits, or the last hidden state of a network without a head."""
        return _first(self.model(pixel_values=pixel_values, return_dict=False))


class TextNet(nn.Module):
    """Takes tokens: (batch, sequence)."""

    def __init__(
        self,
        model: nn.Module,
        *,
        fixed: dict[str, Any] | None = None,
        pooling: Pooling = "none",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.fixed = fixed or {}
        self.pooling: Pooling = pooling
        self.normalize = normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits; of a network without a head, vectors of the tokens or of the text."""
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=False, **self.fixed
        )
        return pool(_first(found), attention_mask, self.pooling, self.normalize)


class PairNet(TextNet):
    """Takes tokens, and which of two texts each belongs to."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return what TextNet does."""
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            return_dict=False,
            **self.fixed,
        )
        return pool(_first(found), attention_mask, self.pooling, self.normalize)


def _first(found: Any) -> Tensor:
    first: Tensor = found if isinstance(found, Tensor) else found[0]
    return first

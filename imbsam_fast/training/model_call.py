"""How a model is called with a batch's inputs, and where its logits are in what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..validation import check_bool


class ModelCall:
    """`model(inputs)`, and the logits of what it returns.

    Args:
        model: any module.
        unpack: call `model(**inputs)` with a mapping and `model(*inputs)` with a sequence.
        logits: the entry of the outputs that is the logits: a key of a mapping, an attribute, or
            the place in a tuple. None: the outputs are.
    """

    def __init__(self, model: nn.Module, unpack: bool, logits: str | int | None) -> None:
        if logits is not None and (isinstance(logits, bool) or not isinstance(logits, (str, int))):
            raise ValueError(f"logits is {logits!r}, expected the name or the place of an output")
        self.model = model
        self.unpack = check_bool("unpack", unpack)
        self.logits = logits

    def __call__(self, inputs: Any) -> Any:
        """The logits of a batch."""
        if self.unpack:
            self._check(inputs)
            is_mapping = isinstance(inputs, Mapping)
            outputs = self.model(**inputs) if is_mapping else self.model(*inputs)
        else:
            outputs = self.model(inputs)
        return outputs if self.logits is None else self._entry(outputs)

    def _check(self, inputs: Any) -> None:
        if not isinstance(inputs, (Mapping, tuple, list)):
            raise ValueError(
                f"inputs is {type(inputs).__name__}, expected with unpack=True a mapping from "
                "argument to value, a tuple or a list"
            )

    def _entry(self, outputs: Any) -> Any:
        try:
            if isinstance(self.logits, str) and not isinstance(outputs, Mapping):
                return getattr(outputs, self.logits)
            return outputs[self.logits]
        except (AttributeError, KeyError, IndexError, TypeError):
            names = [*outputs] if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(
                f"logits is {self.logits!r}, expected an entry of what the model returned: {names}"
            ) from None

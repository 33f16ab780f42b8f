"""Shape checking with one error format.

Every record of `rlt2i.types` names the axes of its tensors once, in a specification such as ``"B T+1 C H W"``. Letters
bind to the first size seen, later fields must agree, ``T+1`` means what it says, and ``1|h`` accepts an axis that is
either broadcast or resolved.
"""

from __future__ import annotations

from torch import Tensor


class Axes:
    """Names the sizes of one record's axes and checks each tensor against them."""

    def __init__(self, record: str, **sizes: int) -> None:
        self.record = record
        self.sizes = dict(sizes)

    def check(self, field: str, tensor: Tensor, spec: str) -> None:
        """Bind or compare the axes of one field.

        Raises:
            ValueError: naming the record, the field, the shape found and the shape expected.
        """
        axes = spec.split()
        if tensor.ndim != len(axes) or not all(self._fits(a, n) for a, n in zip(axes, tensor.shape, strict=True)):
            known = ", ".join(f"{k}={v}" for k, v in self.sizes.items()) or "nothing bound yet"
            raise ValueError(
                f"{self.record}.{field}: got shape {list(tensor.shape)}, expected [{', '.join(axes)}] with {known}."
            )

    def _fits(self, axis: str, size: int) -> bool:
        if axis == "...":
            return True
        if "|" in axis:
            return any(self._fits(option, size) for option in axis.split("|"))
        if axis.isdigit():
            return size == int(axis)
        name, _, offset = axis.partition("+")
        return self.sizes.setdefault(name, size - int(offset or 0)) == size - int(offset or 0)

"""ClassSplit: from class counts to the two weights of every class (docs/design.md section 2)."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set, ValuesView

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .ops.arguments import is_transformed
from .validation import check_bool, check_number, check_weights, check_whole_number

Counts = Sequence[int] | Mapping[int, int] | Tensor


class ClassSplit(nn.Module):
    """The class weights `plain` (loss at theta) and `sharp` (loss whose sharpness is minimised).

    The weights are the method: plain 1, sharp 0 is SGD; plain 0, sharp 1 is SAM; 1 for the
    classes above a threshold and 1 for the rest is ImbSAM. A class with sharp > 0 is a *tail*
    class. It is a module so that it moves with `.to()` and has a `state_dict`; a criterion
    that holds it works with logits on any device whether it was moved or not. Weights may be
    replaced or changed in place between steps; what torch does not count as a write (`.data`,
    NumPy) is not seen.

    Args:
        plain: float (K,), finite and not negative, one entry a class. (1,) means the same
            weight for any number of classes.
        sharp: the same.
        counts: int (K,), training images per class, where they are known.

    Wherever counts are taken they are integers in the order of the classes, or a mapping from
    class to count, such as a Counter of the labels; classes that it lacks have no image.
    """

    plain: Tensor
    sharp: Tensor
    counts: Tensor | None

    def __init__(self, plain: Tensor, sharp: Tensor, counts: Counts | None = None) -> None:
        super().__init__()
        for name, weights in (("plain", plain), ("sharp", sharp)):
            check_weights(name, weights)
        if plain.shape != sharp.shape:
            raise ValueError(
                f"plain has {len(plain)} classes and sharp {len(sharp)}, expected the same number"
            )
        counts = None if counts is None else _class_counts(counts, len(plain))
        self.register_buffer("plain", plain.detach().double().clone())
        self.register_buffer("sharp", sharp.detach().double().clone())
        self.register_buffer("counts", counts)
        # Converted weights, each with what it was made from and the version of that.
        self._cache: dict[tuple, tuple[Tensor, int, Tensor]] = {}

    @classmethod
    def from_counts(
        cls,
        counts: Counts,
        eta: float = 100,
        inclusive: bool = True,
        num_classes: int | None = None,
    ) -> ClassSplit:
        """ImbSAM: a class is tail if it has at most `eta` images (paper, Eq. 15).

        Warns where that leaves no tail class (the steps are those of SGD) or no head class (those
        of SAM); eta 0 and infinity say so themselves.

        Args:
            counts: (K,) training images per class, or a mapping from class to images.
            eta: the threshold of the class split.
            inclusive: False makes a class of exactly `eta` images head, as the authors'
                released code does.
            num_classes: K, where the mapping may lack the last classes.
        """
        split = cls._split_at(_class_counts(counts, num_classes), eta, inclusive)
        split._warn_of_one_part(eta)
        return split

    @classmethod
    def _split_at(cls, counts: Tensor, eta: float, inclusive: bool) -> ClassSplit:
        check_number("eta", eta, "a number >= 0", lambda x: x >= 0)
        check_bool("inclusive", inclusive)
        tail = counts <= eta if inclusive else counts < eta
        return cls((~tail).double(), tail.double(), counts)

    def _warn_of_one_part(self, eta: float) -> None:
        """Called by what the user called."""
        tail = self.sharp > 0
        counts = self.counts
        if counts is None or not 0 < eta < float("inf") or (tail.any() and not tail.all()):
            return
        which, size, part, method = (
            ("largest", counts.max(), "head", "SAM")
            if tail.any()
            else ("smallest", counts.min(), "tail", "SGD")
        )
        warnings.warn(
            f"no class is {part}: eta is {eta}, the {which} class has {int(size)} images; every "
            f"step will be one of {method}",
            stacklevel=3,
        )

    @classmethod
    def from_targets(
        cls,
        targets: Counts,
        num_classes: int | None = None,
        eta: float = 100,
        inclusive: bool = True,
    ) -> ClassSplit:
        """`from_counts` with the class counts of the training labels `targets`, int (n,).

        Give `num_classes` where the last classes may have no training image. Labels that are
        counted already, a mapping from class to count, are taken as such.
        """
        if isinstance(targets, Mapping):
            counts = _class_counts(targets, num_classes, "targets")
        else:
            counts = cls._counted(targets, num_classes)
        split = cls._split_at(counts, eta, inclusive)
        split._warn_of_one_part(eta)
        return split

    @staticmethod
    def _counted(targets: Counts, num_classes: int | None) -> Tensor:
        labels = _integers(targets, "targets")
        if num_classes is not None:
            check_whole_number("num_classes", num_classes, "an integer >= 1", 1)
        if num_classes is not None and len(labels) and int(labels.max()) >= num_classes:
            raise ValueError(
                f"targets holds label {int(labels.max())}, expected labels below num_classes, "
                f"which is {num_classes}"
            )
        return torch.bincount(labels, minlength=num_classes or 0)

    @classmethod
    def all_tail(cls) -> ClassSplit:
        """SAM, for any number of classes: every class is tail."""
        return cls(torch.zeros(1, device="cpu"), torch.ones(1, device="cpu"))

    @classmethod
    def none(cls) -> ClassSplit:
        """SGD, for any number of classes: no class is tail."""
        return cls(torch.ones(1, device="cpu"), torch.zeros(1, device="cpu"))

    @classmethod
    def focal(
        cls, counts: Counts, gamma: float, lam: float, num_classes: int | None = None
    ) -> ClassSplit:
        """Focal-SAM (ICML 2025): sharp = lam (1 - pi_k)^gamma and plain = 1 - sharp.

        pi_k is the share of class k among the training images; gamma >= 0, 0 <= lam <= 1.
        `counts` and `num_classes` are those of `from_counts`.
        """
        counts = _class_counts(counts, num_classes)
        check_number("gamma", gamma, "a finite number >= 0", lambda x: 0 <= x < float("inf"))
        check_number("lam", lam, "a number between 0 and 1", lambda x: 0 <= x <= 1)
        share = counts.double() / _positive_total(counts)
        sharp = lam * (1 - share) ** gamma
        return cls(1 - sharp, sharp, counts)

    @property
    def num_classes(self) -> int | None:
        """K, or None where the split holds for any number of classes."""
        # Not len(), which takes a tensor ten times as long: this is asked in every pass.
        k = self.plain.shape[0]
        return None if k == 1 and self.counts is None else k

    @property
    def tail_fraction(self) -> float:
        """The share f of the training rows that belong to tail classes."""
        tail = self.sharp > 0
        if self.counts is None:
            if tail.all() or not tail.any():
                return float(tail[0])
            raise ValueError("tail_fraction needs the class counts, and counts is None")
        return int(self.counts[tail].sum()) / _positive_total(self.counts)

    def weights(
        self, num_classes: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """plain and sharp as (num_classes,) on `device` in `dtype`."""
        if self.num_classes not in (None, num_classes):
            raise ValueError(
                f"the split has {self.num_classes} classes, expected {num_classes} as in the logits"
            )
        plain = self._cached("plain", device, dtype, num_classes)
        return plain, self._cached("sharp", device, dtype, num_classes)

    def plain_mask(self, targets: Tensor) -> Tensor:
        """bool, shaped like `targets`: the rows whose class has plain > 0."""
        return self._mask("plain", targets)

    def tail_mask(self, targets: Tensor) -> Tensor:
        """bool, shaped like `targets`: the rows of tail classes.

        `targets` holds integer labels, and the mask is computed on their device. A label
        outside 0 .. K-1 (an ignored row) is not tail.
        """
        return self._mask("sharp", targets)

    def _mask(self, name: str, targets: Tensor) -> Tensor:
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets is {type(targets).__name__}, expected integer labels")
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"targets is {targets.dtype}, expected integer labels")
        k = self.num_classes
        positive = self._cached(name, targets.device, torch.bool, k or 1)
        # Behind the classes the table answers for all labels above them and, at -1, for those
        # below 0. Where there is any number of classes, class 0 answers for them.
        return positive.take(targets.long().clamp(-1, 0 if k is None else k))

    def _cached(
        self, name: str, device: torch.device, dtype: torch.dtype, num_classes: int
    ) -> Tensor:
        """A weight vector converted once per device, dtype (bool: > 0) and number of classes."""
        weights: Tensor = self._buffers[name]  # type: ignore[assignment]
        # The weights may be changed or replaced. A compiled graph sees that by itself, and what a
        # transform of torch.func or a dispatch mode makes must not outlive it.
        if torch.compiler.is_compiling() or is_transformed() or is_in_torch_dispatch_mode():
            return _converted(weights, device, dtype, num_classes)
        key = (name, device, dtype, num_classes)
        version = 0 if weights.is_inference() else weights._version
        made = self._cache.get(key)
        if made is None or made[0] is not weights or made[1] != version:
            with torch.inference_mode(False):  # what validation caches must serve training too
                converted = _converted(weights, device, dtype, num_classes)
            self._cache[key] = made = weights, version, converted
        return made[2]

    def _apply(self, fn, recurse=True):
        # Moves like any module, but a cast of the model (`.half()`) must not round the weights.
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._cache.clear()

    def extra_repr(self) -> str:
        """Numbers of classes and of tail classes, for print(split)."""
        tail = int((self.sharp > 0).sum())
        classes = "any number of" if self.num_classes is None else str(self.num_classes)
        known = "" if self.counts is None else f", tail_fraction={self.tail_fraction:.3f}"
        return f"{classes} classes, {tail} tail{known}"


def _converted(
    weights: Tensor, device: torch.device, dtype: torch.dtype, num_classes: int
) -> Tensor:
    converted = weights.expand(num_classes).to(device, dtype).contiguous()
    # A mask also answers for labels on either side of the classes.
    return nn.functional.pad(converted, (0, 2)) if dtype == torch.bool else converted


# What has no order, one of its own, or bytes in place of numbers.
_NOT_COUNTS = (Set, Mapping, ValuesView, str, bytes, bytearray, memoryview)


def _positive_total(counts: Tensor) -> int:
    total = int(counts.sum())
    if total == 0:
        raise ValueError("counts holds no image, expected at least one")
    return total


def _class_counts(counts: Counts, num_classes: int | None, name: str = "counts") -> Tensor:
    """`counts` by class as an int64 CPU tensor (K,); a mapping may lack classes."""
    if num_classes is not None:
        check_whole_number("num_classes", num_classes, "an integer >= 1", 1)
    # A Series of pandas is one too: that of value_counts() is ordered by its values.
    is_mapping = all(callable(getattr(counts, method, None)) for method in ("keys", "items"))
    if is_mapping:
        return _by_class(counts.items(), num_classes, name)  # type: ignore[union-attr]
    values = _integers(counts, name)
    if num_classes not in (None, len(values)):
        raise ValueError(f"{name} has {len(values)} classes, expected {num_classes}")
    return values


def _by_class(items: Iterable[tuple[object, object]], num_classes: int | None, name: str) -> Tensor:
    pairs = [*items]
    classes = _integers([k for k, _ in pairs], f"{name}' keys").tolist()
    counts = _integers([n for _, n in pairs], f"{name}' values").tolist()
    k = max(classes) + 1 if num_classes is None else num_classes
    if max(classes) >= k:
        raise ValueError(f"{name} has class {max(classes)}, expected classes below {k}")
    if len(set(classes)) != len(classes):  # keys that are tensors differ, whatever they hold
        twice = next(c for c in classes if classes.count(c) > 1)
        raise ValueError(f"{name} has class {twice} twice, expected integers as keys")
    by_class = [0] * k
    for class_, count in zip(classes, counts):
        by_class[class_] = count
    return torch.tensor(by_class, dtype=torch.int64, device="cpu")


def _integers(values_: object, name: str) -> Tensor:
    """An int64 CPU tensor (n,) of values >= 0, from a tensor or from what has an order."""
    if isinstance(values_, _NOT_COUNTS):
        raise TypeError(
            f"{name} is {type(values_).__name__}, expected integers in the order of the classes, "
            "or a mapping from class to count"
        )
    if isinstance(values_, Tensor):
        if values_.is_meta:
            raise ValueError(f"{name} is on meta, expected a tensor with values")
        values = values_.detach().cpu().clone()  # the caller's tensor stays the caller's
    else:
        try:
            numbers = [operator.index(c) for c in values_]  # type: ignore[attr-defined]
            values = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:  # torch: beyond int64
            raise ValueError(f"{name} is {values_!r}, expected integers") from error
    whole = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.dim() != 1 or not whole:
        raise ValueError(f"{name} is {values.dtype} {tuple(values.shape)}, expected integers (K,)")
    if len(values) == 0:
        raise ValueError(f"{name} is empty, expected at least one entry")
    if int(values.min()) < 0:
        raise ValueError(f"{name} holds {int(values.min())}, expected integers >= 0")
    return values.long()

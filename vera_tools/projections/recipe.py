"""A recipe says, bit for bit, how a pair of projections was made.

Two facts about PyTorch make the set of recipes small. Its CPU generator is MT19937, seeded with the low 32 bits of the
key. And its uniform kernel is compiled in one of two ways: the affine map ``x * (to - from) + from`` is either one
fused multiply-add (one rounding) or a multiply and an add (two). Everything else is which dtype the draw happened in
and which dtype the values went through afterwards.

A recipe's name records every choice that changes a bit, the keys apart::

    mt19937-f32-fused                drawn in float32 with a fused multiply-add: PEFT on Linux with AVX2 or on aarch64
    mt19937-f32-separate             with a multiply and an add: PEFT on Windows, on Intel Macs, on Linux without AVX2
    mt19937-f32-fused-via-bf16       then cast to the bfloat16 base's dtype, as PEFT does
    mt19937-bf16-scalar-fused        drawn in bfloat16 by torch <= 2.11
    mt19937-bf16-opmath-fused        drawn in bfloat16 by torch >= 2.12
    mt19937-f32-fused-split          B from a generator of its own, seeded with prng_key_B
    mt19937-f32-fused-bfirst         B drawn before A
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from vera_tools.dtypes import FLOATS, HALVES, LONG, SHORT
from vera_tools.errors import FormatError, UsageError
from vera_tools.projections.key import check_key

Rounding = Literal["fused", "separate"]
HalfSampling = Literal["scalar", "opmath"]

_NAME = re.compile(
    r"mt19937-(?P<drawn>f32|f64|bf16|f16)(?:-(?P<half>scalar|opmath))?-(?P<rounding>fused|separate)"
    r"(?:-via-(?P<via>bf16|f16))?(?P<split>-split)?(?P<bfirst>-bfirst)?"
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a pair is drawn, whatever the key. The defaults are PEFT's on a machine with fused multiply-add.

    Attributes:
        drawn_dtype: torch's default dtype when the pair was drawn.
        half_sampling: For half types only: "scalar" (torch <= 2.11) or "opmath" (torch >= 2.12).
        rounding: How the kernel's affine map rounds.
        rounded_through: The half dtype the values were cast to afterwards, or None.
        split: B comes from a generator of its own; in PEFT, A and B come from one.
        b_first: B was drawn before A; PEFT draws A first.

    Raises:
        UsageError: a combination that no generator has.
    """

    drawn_dtype: str = "float32"
    half_sampling: HalfSampling | None = None
    rounding: Rounding = "fused"
    rounded_through: str | None = None
    split: bool = False
    b_first: bool = False

    def __post_init__(self) -> None:
        _check_choice("drawn_dtype", self.drawn_dtype, FLOATS)
        _check_choice("rounding", self.rounding, ("fused", "separate"))
        _check_choice("rounded_through", self.rounded_through, (None, *HALVES))
        if self.drawn_dtype in HALVES:
            _check_choice("half_sampling", self.half_sampling, ("scalar", "opmath"))
        elif self.half_sampling is not None:
            raise UsageError(
                "half_sampling goes with a half drawn_dtype only",
                found=f"{self.half_sampling} with {self.drawn_dtype}",
            )
        if self.rounded_through == self.drawn_dtype:
            object.__setattr__(self, "rounded_through", None)

    @property
    def name(self) -> str:
        """The stable name, which records every choice but the keys."""
        parts = ["mt19937", SHORT[self.drawn_dtype]]
        if self.half_sampling:
            parts.append(self.half_sampling)
        parts.append(self.rounding)
        if self.rounded_through:
            parts.append(f"via-{SHORT[self.rounded_through]}")
        if self.split:
            parts.append("split")
        if self.b_first:
            parts.append("bfirst")
        return "-".join(parts)

    @property
    def is_peft_order(self) -> bool:
        """Whether A then B come from one generator, as in PEFT."""
        return not (self.split or self.b_first)

    @staticmethod
    def named(name: str) -> Method:
        """The method with this name.

        Raises:
            UsageError: no such name.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise UsageError(
                "not a recipe's name",
                expected="for example mt19937-f32-fused or mt19937-f32-fused-via-bf16",
                found=name,
            )
        return Method(
            drawn_dtype=LONG[match["drawn"]],
            half_sampling=match["half"],  # type: ignore[arg-type]
            rounding=match["rounding"],  # type: ignore[arg-type]
            rounded_through=LONG[match["via"]] if match["via"] else None,
            split=bool(match["split"]),
            b_first=bool(match["bfirst"]),
        )

    def with_key(self, prng_key: int, prng_key_B: int | None = None) -> Recipe:
        """The recipe that draws from these keys.

        Raises:
            UsageError: a key that torch refuses, or one too many or too few.
        """
        if self.split != (prng_key_B is not None):
            raise UsageError("prng_key_B goes with the names that end in -split, and with those only", found=self.name)
        choices = {field.name: getattr(self, field.name) for field in dataclasses.fields(Method)}
        return Recipe(**choices, prng_key=prng_key, prng_key_B=prng_key_B)


@dataclass(frozen=True, kw_only=True)
class Recipe(Method):
    """How vera_A and vera_B came to be: a method, and the keys that its generators were seeded with.

    Attributes:
        prng_key: What the generator was seeded with (see `projections.key`).
        prng_key_B: The key of B's own generator, or None where A and B come from one (PEFT); `split` follows from it.

    Raises:
        UsageError: a key that torch refuses, or a combination that no generator has.
    """

    prng_key: int
    prng_key_B: int | None = None

    def __post_init__(self) -> None:
        check_key(self.prng_key)
        if self.prng_key_B is not None:
            check_key(self.prng_key_B)
        object.__setattr__(self, "split", self.prng_key_B is not None)
        super().__post_init__()

    @property
    def method(self) -> Method:
        """The recipe without its keys."""
        return Method(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Method)})

    @classmethod
    def parse(cls, name: str, *, prng_key: int, prng_key_B: int | None = None) -> Recipe:
        """The recipe with this name and these keys.

        Raises:
            UsageError: no such name, or a key too many or too few for it.
        """
        return Method.named(name).with_key(prng_key, prng_key_B)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it stands in reports and manifests."""
        return {
            "name": self.name,
            "generator": "mt19937",
            "prng_key": self.prng_key,
            "prng_key_B": self.prng_key_B,
            "drawn_dtype": self.drawn_dtype,
            "half_sampling": self.half_sampling,
            "rounding": self.rounding,
            "rounded_through": self.rounded_through,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str | None = None) -> Recipe:
        """The recipe that `to_dict` wrote.

        Raises:
            FormatError: a key is missing, or the name and the other keys contradict each other.
        """
        try:
            recipe = cls.parse(data["name"], prng_key=data["prng_key"], prng_key_B=data.get("prng_key_B"))
        except (KeyError, TypeError, UsageError) as error:
            raise FormatError(f"not a recipe: {error}", where=where) from error
        wrong = [key for key, value in recipe.to_dict().items() if data.get(key) != value]
        if wrong:
            raise FormatError(
                f"the recipe's {wrong[0]} contradicts its name",
                where=where,
                expected=str(recipe.to_dict()[wrong[0]]),
                found=str(data.get(wrong[0])),
            )
        return recipe

    def replace(self, **changes: Any) -> Recipe:
        """This recipe with some fields changed."""
        return dataclasses.replace(self, **changes)


def candidates(prng_key: int, *, prng_key_B: int | None = None, b_first: bool = False) -> tuple[Recipe, ...]:
    """Every stream known for these keys, in canonical order.

    Drawn in float32 before float64 before the half types, fused before separate, not rounded before rounded: where
    several give the same bits, the first one is the answer.
    """
    samplings: dict[str, tuple[HalfSampling | None, ...]] = dict.fromkeys(FLOATS, (None,))
    samplings.update(dict.fromkeys(HALVES, ("opmath", "scalar")))
    return tuple(
        Recipe(
            prng_key=prng_key,
            prng_key_B=prng_key_B,
            drawn_dtype=drawn,
            half_sampling=sampling,
            rounding=rounding,
            rounded_through=through,
            b_first=b_first,
        )
        for drawn in FLOATS
        for sampling in samplings[drawn]
        for through in (None, *HALVES)
        for rounding in ("fused", "separate")
        if through != drawn
    )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} has an unknown value", expected=" or ".join(map(str, choices)), found=repr(value))

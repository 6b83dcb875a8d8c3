"""What a package is compared with: its bundle in torch, as trained and as the recipe changed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from msgspec import UNSET

from calora_export import adapters as rows
from calora_export import composing, joint_basis, routers
from calora_export.adapters import Adapter
from calora_export.bundle import Bundle
from calora_export.jobs import Answer
from calora_export.model import Rows, SlotModel
from calora_export.package import Package
from calora_export.router_text import RouterText
from calora_export.weights import Weights

CHECKED = 64  # adapters, of more
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The bundle in torch: `source` as trained, `target` with the changes that the recipe made, if it made any.

    adapters: those that are checked; held: those that the recipe changed, as the package has them; int8: rows are
    rounded to what its files hold.
    """

    bundle: Bundle
    source: SlotModel
    target: SlotModel | None
    adapters: Mapping[str, Adapter]
    held: Mapping[str, Adapter]
    int8: bool
    router: routers.Router | None
    text: RouterText | None

    def models(self) -> dict[str, SlotModel]:
        return {"source": self.source} | ({"target": self.target} if self.target is not None else {})

    def mix(self, mix: Mapping[str, float], against: str = "source") -> Rows:
        known = self.adapters if against == "source" else {**self.adapters, **self.held}
        parts = [(known.get(i) or rows.load_adapter(self.bundle, i), gate) for i, gate in mix.items()]
        if against == "target" and self.int8:
            parts = [(rows.in_int8(adapter), gate) for adapter, gate in parts]
        return Rows.of(rows.mix(parts)) if parts else Rows.none()

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the bundle's router."""
        assert self.bundle.manifest.router is not None
        return self.bundle.manifest.router.classes

    def gates(self, text: str) -> np.ndarray:
        """What the bundle's router says of a text, by class."""
        assert self.router is not None and self.text is not None
        with torch.no_grad():
            return self.router(torch.tensor([list(self.text.ids(text))])).numpy()


def of(package: Package, bundle: Bundle) -> Reference:
    context = package.manifest.model.context
    settings = package.manifest.settings
    source = composing.compose(bundle, bundle.weight, context=context)
    target = None
    columns = settings.joint_basis
    int8 = settings.adapters == "int8"
    if package.manifest.represented or settings.activations != "float" or int8 or columns is not UNSET:
        weights = Weights(bundle, settings)
        target = composing.compose(bundle, weights, context=context, activations=settings.activations)
    known = {spec.id for spec in bundle.manifest.adapters}
    shipped = [entry.id for entry in package.manifest.adapters if entry.id in known]
    adapters = {identifier: rows.load_adapter(bundle, identifier) for identifier in spaced(shipped, CHECKED)}
    held = {}
    if columns is not UNSET:
        joint = joint_basis.compress(bundle, columns)
        held = {identifier: joint.rows(rows.opened(bundle, identifier)) for identifier in adapters}
    router = routers.load(bundle) if package.manifest.router else None
    spec = bundle.manifest.router
    text = RouterText(spec, bundle.path / "router" / "tokenizer.json") if spec else None
    return Reference(bundle, source, target, adapters, held, int8, router, text)


def spaced(items: Sequence[T], most: int) -> list[T]:
    """All of them, or `most` that are evenly spaced, the first and, if it is not the only one, the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


def as_on(answer: Answer, reference: Reference, package: Package, bundle: Bundle) -> Reference:
    """The reference with the rounding of this device's kernels, where that is another than the recipe's."""
    settings, rounding = package.manifest.settings, answer.rounding
    if rounding in (None, settings.activations) or settings.activations == "float":
        return reference
    weights, context = Weights(bundle, settings), package.manifest.model.context
    return replace(reference, target=composing.compose(bundle, weights, context=context, activations=rounding))

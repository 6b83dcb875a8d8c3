"""What an adapter has beside rows, as the files and the graphs of every target hold it.

Scales are 1 and what weighs experts is 0 in an adapter without them; the last expert has no rows in any. `always` and
`select` say which rows have a gate of their own and which are an expert's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import UNSET

from calora_export.adapters import Adapter
from calora_export.errors import UnsupportedError, mismatch
from calora_export.package import Slots

NEVER = -1e4  # softmax makes exactly 0 of it: an expert that an adapter does not have
EXTRAS, SELECT = "extras", "select"

Arrays = Mapping[str, np.ndarray]


def fixed(slots: Slots) -> dict[str, tuple[int, ...]]:
    """Name → shape of what does not grow with the rank, in the order of the graph's inputs."""
    shapes: dict[str, tuple[int, ...]] = {}
    linears = slots.linears()
    if slots.scaled is not UNSET:
        shapes |= {f"{site}.before": (linears[site][1],) for site in slots.scaled}
        shapes |= {f"{site}.after": (linears[site][0],) for site in slots.scaled}
    if (routed := slots.routed) is not UNSET:
        shapes |= {f"{scope}.router": (routed.experts, routed.features) for scope in routed.scopes}
        shapes |= {f"{scope}.router_bias": (2, routed.experts) for scope in routed.scopes}
    return shapes


def shapes(slots: Slots, rank: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of all of them, in the order of the graph's inputs."""
    select = {} if slots.routed is UNSET else {SELECT: (slots.routed.experts, rank)}
    return fixed(slots) | select


def arrays(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    """fp32, by the names of `fixed`, and `select` [E, R] where tokens weigh experts; UnsupportedError for an adapter
    that has what the graph has no inputs for."""
    _require_inputs(adapter, slots)
    made = {name: _none(name, shape) for name, shape in fixed(slots).items()}
    for site, pair in adapter.scales.items():
        for part, scale in zip(("before", "after"), pair, strict=True):
            made[f"{site}.{part}"] = np.asarray(scale, np.float32)
    if slots.routed is not UNSET and adapter.routers:
        for scope in slots.routed.scopes:
            bias, router = made[f"{scope}.router_bias"], adapter.routers.get(scope)
            if router is None:  # all is for the last expert, who is nobody
                bias[0, :-1] = NEVER
                continue
            count = len(router.weight)
            np.copyto(made[f"{scope}.router"][:count], router.weight)
            bias[:, :count] = router.bias
            bias[0, count:] = NEVER
    if slots.routed is not UNSET:
        chosen = np.arange(slots.routed.experts)[:, None] == adapter.experts_of_rows()
        made[SELECT] = chosen.astype(np.float32)
    return made


def _require_inputs(adapter: Adapter, slots: Slots) -> None:
    """They were made at export, for the adapters that there were."""
    routed, hint = slots.routed, "export again from a bundle with such an adapter"
    scaled = set() if slots.scaled is UNSET else set(slots.scaled)
    if more := sorted(adapter.scales.keys() - scaled):
        raise UnsupportedError(mismatch(adapter.id, more[0], "a layer that this package scales", "another", hint))
    scopes, experts = (set(), 0) if routed is UNSET else (set(routed.scopes), routed.experts - 1)
    if more := sorted(adapter.routers.keys() - scopes):
        raise UnsupportedError(mismatch(adapter.id, more[0], "a module that this package reads", "another", hint))
    if (most := max((len(router.weight) for router in adapter.routers.values()), default=0)) > experts:
        raise UnsupportedError(mismatch(adapter.id, "experts", f"at most {experts} in this package", most, hint))


def _none(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, float(name.endswith((".before", ".after"))), np.float32)


# ── for graphs that take them as two inputs ───────────────────────────────────────────────────────────────────────────


def flat_shapes(slots: Slots, rank: int) -> dict[str, tuple[int, ...]]:
    """`extras`, all of `fixed` one after the other, and `select`; neither where a graph has no such."""
    found = shapes(slots, rank)
    select = {SELECT: found.pop(SELECT)} if SELECT in found else {}
    return ({EXTRAS: (sum(map(math.prod, found.values())),)} if found else {}) | select


def flat(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    """fp32, by the names of `flat_shapes`."""
    made = arrays(adapter, slots)
    select = {SELECT: made.pop(SELECT)} if SELECT in made else {}
    return ({EXTRAS: np.concatenate([array.ravel() for array in made.values()])} if made else {}) | select


def gated(extras: Arrays, gate: float) -> Arrays:
    """The experts' rows of one adapter of a mix, by its gate."""
    return {name: array * array.dtype.type(gate) if name == SELECT else array for name, array in extras.items()}


def joined(parts: Sequence[Arrays], slots: Slots) -> dict[str, np.ndarray]:
    """Those of a mix, of which at most one adapter has more than nothing."""
    if not parts or EXTRAS not in parts[0]:
        return {}
    none = np.concatenate([_none(name, shape).ravel() for name, shape in fixed(slots).items()])
    own = [part[EXTRAS] for part in parts if not np.array_equal(part[EXTRAS], none.astype(part[EXTRAS].dtype))]
    made = {EXTRAS: own[0] if own else none.astype(parts[0][EXTRAS].dtype)}
    return made | ({SELECT: np.concatenate([part[SELECT] for part in parts], axis=1)} if SELECT in parts[0] else {})


# ── for graphs that take each as an input of its own ──────────────────────────────────────────────────────────────────


def blended(parts: Sequence[Arrays], slots: Slots) -> dict[str, np.ndarray]:
    """Those of a mix, of which at most one adapter has more than nothing."""
    made: dict[str, np.ndarray] = {}
    for name, shape in fixed(slots).items():
        none = _none(name, shape)
        own = [part[name] for part in parts if not np.array_equal(part[name], none)]
        made[name] = own[0] if own else none
    if slots.routed is not UNSET:
        none = np.zeros((slots.routed.experts, 0), np.float32)
        made[SELECT] = np.concatenate([none, *(part[SELECT] for part in parts)], axis=1)
    return made


def always(select: np.ndarray) -> np.ndarray:
    """fp32 [R]: 1 on rows that are no expert's."""
    return 1 - select.astype(np.float32).sum(0)

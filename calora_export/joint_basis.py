"""Plain LoRAs compressed into one basis per layer: Compress then Serve (arXiv 2407.00066), JD-Full.

    min over U, V, Σ_i of   Σ_i ‖s_i B_i A_i − U Σ_i Vᵀ‖²        U [out, c], V [in, c], Σ_i [c, c]

Solved by alternation: with V fixed, U is the leading eigenvectors of Σ_i ΔW_i V Vᵀ ΔW_iᵀ; then V the same way. It is
exact where the ranks of all adapters together are at most c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calora_export import adapters
from calora_export.adapters import Adapter, Opened
from calora_export.bundle import Bundle
from calora_export.errors import RecipeError, mismatch
from calora_export.factors import Factored, Layout, Site
from calora_export.sites import natural_key

FILE = "shared/joint.safetensors"
ROUNDS = 4  # what more of them gain is far below what the compression costs

Pair = tuple[np.ndarray, np.ndarray]  # down [r, in], up [out, r], the scale in it


@dataclass(frozen=True)
class Joint:
    """basis: <site>.down [c, in] and <site>.up [out, c]; adapters by id; errors: ‖ΔW − U Σ Vᵀ‖ / ‖ΔW‖ over all sites;
    ranks: as trained; kept: adapters whose rows are not linear, and stay as they are."""

    basis: Mapping[str, np.ndarray]
    adapters: Mapping[str, Factored]
    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    kept: tuple[str, ...]

    def rows(self, adapter: Opened) -> Adapter:
        """An adapter as the package will hold it."""
        if adapter.id in self.kept:
            return adapter.rows()
        return self.adapters[adapter.id].rows(self.basis, adapter.fingerprint)


def compress(bundle: Bundle, columns: int) -> Joint:
    """All linear adapters of a bundle in a basis of at most `columns` per site; RecipeError when there are none."""
    opened = [adapters.opened(bundle, spec.id) for spec in bundle.manifest.adapters]
    linear = [a for a in opened if all((b.role, b.act) == ("lora", "identity") for b in a.branches)]
    if not linear:
        found = f"{len(opened)} adapters with more than LoRA, such as recovery" if opened else "no adapter"
        hint = "leave joint_basis out of the recipe"
        raise RecipeError(mismatch("recipe", "joint_basis", "plain LoRAs in the bundle", found, hint))
    sites = sorted({branch.site for adapter in linear for branch in adapter.branches}, key=natural_key)
    basis: dict[str, np.ndarray] = {}
    cores: dict[str, dict[str, np.ndarray]] = {adapter.id: {} for adapter in linear}
    lost, whole = dict.fromkeys(cores, 0.0), dict.fromkeys(cores, 0.0)
    for site in sites:
        pairs = {adapter.id: pair for adapter in linear if (pair := _pair(adapter, site)) is not None}
        up, down = _solve(list(pairs.values()), columns)
        basis[f"{site}.down"], basis[f"{site}.up"] = down.astype(np.float32), up.astype(np.float32)
        for identifier, (a, b) in pairs.items():
            core = (up.T @ b) @ (a @ down.T)
            cores[identifier][site] = core.astype(np.float32)
            size = float(((b.T @ b) * (a @ a.T)).sum())
            whole[identifier] += size
            lost[identifier] += max(size - float((core**2).sum()), 0.0)  # U and V are orthonormal
    made = {identifier: _factored(identifier, found) for identifier, found in cores.items()}
    errors = {i: float(np.sqrt(lost[i] / whole[i])) if whole[i] else 0.0 for i in cores}
    ranks = {adapter.id: adapter.rank for adapter in linear}
    return Joint(basis, made, errors, ranks, tuple(adapter.id for adapter in opened if adapter.id not in ranks))


def _factored(identifier: str, cores: Mapping[str, np.ndarray]) -> Factored:
    sites = {site: Site(f"{site}.down", f"{site}.up", f"{site}.core") for site in cores}
    return Factored(identifier, Layout(sites, FILE), {f"{site}.core": core for site, core in cores.items()})


def _pair(adapter: Opened, site: str) -> Pair | None:
    """fp64, all branches at the site side by side."""
    own = [branch for branch in adapter.branches if branch.site == site]
    found = [(*adapter.matrices(branch), branch.scale) for branch in own]
    if not found:
        return None
    downs, ups = [down for down, _, _ in found], [up.astype(np.float64) * scale for _, up, scale in found]
    return np.concatenate(downs).astype(np.float64), np.concatenate(ups, axis=1)


def _solve(pairs: Sequence[Pair], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """U [out, c] and Vᵀ [c, in], fp64, with orthonormal columns and rows."""
    most = min(sum(len(down) for down, _ in pairs), len(pairs[0][1]), pairs[0][0].shape[1], columns)
    right = _leading([down.T @ _root(up.T @ up) for down, up in pairs], most)
    left = right
    for _ in range(ROUNDS):
        left = _leading([up @ (down @ right) for down, up in pairs], most)
        right = _leading([down.T @ (up.T @ left) for down, up in pairs], most)
    return left, right.T


def _root(gram: np.ndarray) -> np.ndarray:
    """R with R Rᵀ = gram."""
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(values.clip(min=0))


def _leading(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The leading left singular vectors of the parts side by side, each with its largest entry positive."""
    side = np.concatenate(parts, axis=1)
    if side.shape[1] < side.shape[0]:
        vectors = np.linalg.svd(side, full_matrices=False)[0][:, :count]
    else:
        vectors = np.linalg.eigh(side @ side.T)[1][:, ::-1][:, :count]
    largest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    return vectors * np.where(largest < 0, -1.0, 1.0)

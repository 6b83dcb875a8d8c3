"""What `list` shows; nothing here imports a back end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from calora_export import formats, profiles, recipe, targets
from calora_export.devices import adb, apple, browser, ssh

Row = dict[str, str]


def entries(what: str) -> list[Row]:
    """Rows of one list, the same keys in each."""
    return _LISTS[what]()


def _targets() -> list[Row]:
    known = recipe.catalogue()
    return [
        {"target": name, "recipes": ", ".join(key for key, value in known.items() if value.target == name)}
        for name in targets.names()
    ]


def _recipes() -> list[Row]:
    return [
        {"recipe": name, "target": value.target, "description": value.description}
        for name, value in recipe.catalogue().items()
    ]


def _devices() -> list[Row]:
    """Profiles, then what is connected or configured now."""
    known = [
        {
            "device": name,
            "kind": value.kind,
            "soc": value.soc or "–",
            "os": " ".join(filter(None, (value.os, value.os_floor))) or "–",
            "memory": _memory(value),
            "targets": ", ".join(value.targets),
            "state": "profile",
        }
        for name, value in profiles.catalogue().items()
    ]
    return known + [dict.fromkeys(known[0], "–") | row for row in _present()]


def _present() -> list[Row]:
    phones = [
        {"device": f"adb:{serial}", "kind": "adb", "state": "connected" if state == adb.READY else _problem(state)}
        for serial, state in adb.connected().items()
    ]
    hosts = [{"device": f"ssh:{host}", "kind": "ssh", "state": "in ~/.ssh/config"} for host in ssh.configured()]
    apples = [{"device": f"apple:{it.udid}", "kind": "apple", "state": _unverified(it)} for it in apple.connected()]
    return [*phones, *apples, *hosts, {"device": "browser", "kind": "browser", "state": browser.state()}]


def _unverified(phone: apple.Phone) -> str:
    return f"{phone.state} (unverified: {apple.UNVERIFIED})"


def _problem(state: str) -> str:
    return f"{state}: {adb.advice(state)}"


def _memory(profile: profiles.Profile) -> str:
    """What an app may use of what is built in, as far as it is known."""
    if profile.ram_mb is None:
        return f"{profile.memory_mb} MB" if profile.memory_mb else "–"
    return f"{profile.memory_mb or '?'} of {profile.ram_mb} MB"


def _adapters() -> list[Row]:
    return [
        {"adapter": "lora", "formula": "scale · B(A x)", "source": "PEFT; what import reduces to it"},
        {"adapter": "recovery", "formula": "scale · a2(gelu(a1 x))", "source": "CA-LoRA, arXiv 2307.07705"},
    ]


def _routers() -> list[Row]:
    policies = "top_p, top_k, threshold, all"
    rows = (
        ("classifier", "mlp, encoder", policies, "DLP-LoRA, arXiv 2410.01497"),
        ("retrieval", "encoder", policies, "LoraRetriever, arXiv 2402.09997"),
        ("task_id", "table", "the task's own gates", "MTL-LoRA, arXiv 2410.09437"),
        ("static", "table", "fixed gates", "a mixture that does not change"),
    )
    return [dict(zip(("router", "forms", "selection", "source"), row, strict=True)) for row in rows]


def _formats() -> list[Row]:
    """What each target's recipes make of each scheme. Recipes that make the same share a row, and so do all schemes of
    a recipe that holds every one exactly in one form.
    """
    cells = formats.matrix()
    forms: dict[str, set[tuple[str, str]]] = {}
    for cell in cells:
        forms.setdefault(cell.recipe, set()).add((cell.outcome, cell.held_as))
    whole = {name for name, found in forms.items() if len(found) == 1 and found <= {("exact", "fp32")}}
    alike: dict[formats.Cell, list[str]] = {}
    for cell in cells:
        scheme = "every scheme" if cell.recipe in whole else cell.scheme
        names = alike.setdefault(msgspec.structs.replace(cell, scheme=scheme, recipe=""), [])
        names.extend({cell.recipe}.difference(names))
    return [
        {
            "stored as": cell.scheme,
            "target": cell.target,
            "recipes": ", ".join(names),
            "outcome": cell.outcome,
            "held as": cell.held_as,
            "keeps, or instead": cell.note,
        }
        for cell, names in alike.items()
    ]


_LISTS: Mapping[str, Callable[[], list[Row]]] = {
    "targets": _targets,
    "recipes": _recipes,
    "devices": _devices,
    "adapters": _adapters,
    "routers": _routers,
    "formats": _formats,
}

"""The JSON schema of a settings file, for editors: completion, types and help texts while a YAML file is written.

The rule: it accepts whatever the program accepts of a single setting, since it is made from the same fields; what several
settings contradict is said by the program alone. Nothing is required (flags may give it), hyphens may stand for
underscores, and lists may be written as text with commas. Other tools' names (aliases.py) are marked as such.
"""

from __future__ import annotations

from typing import Any

from lopt_edge.config.aliases import ALIASES
from lopt_edge.config.panels import in_panels
from lopt_edge.config.settings import Config

TITLE = "Settings of lopt-edge finetune, plan, resume and compare"


def schema() -> dict[str, Any]:
    """The schema, its properties in the order of `finetune --help`."""
    made = Config.model_json_schema()
    properties: dict[str, Any] = {}
    for panel, names in in_panels():
        for name in names:
            properties[name] = _property(made["properties"][name], panel)
    spelled = {name.replace("_", "-"): value for name, value in properties.items() if "_" in name}
    others = {alias: {**properties[name], "description": f"the same as {name}"} for alias, name in ALIASES.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        "type": "object",
        "properties": properties,
        "patternProperties": {f"^{name}$": value for name, value in {**spelled, **others}.items()},
        "additionalProperties": False,
        **({"$defs": made["$defs"]} if "$defs" in made else {}),
    }


def _property(field: dict[str, Any], panel: str) -> dict[str, Any]:
    """A field's schema with text beside a list (commas), and without null and pydantic's title."""
    found = {key: value for key, value in field.items() if key != "title"}
    kinds = [kind for kind in found.pop("anyOf", [found]) if kind.get("type") != "null"]
    for kind in kinds:
        if kind.get("type") == "array":
            kinds = [*kinds, {"type": "string"}, kind["items"]]
            break
    if found.get("default", "") is None:
        del found["default"]
    if len(kinds) > 1:
        for key in ("type", "items", "enum", "minItems"):
            found.pop(key, None)
        found["anyOf"] = [{key: kind[key] for key in kind if key not in ("description", "default")} for kind in kinds]
    else:
        found.update(kinds[0])
    return {"description": f"{found.pop('description', '')} [{panel}]", **found}

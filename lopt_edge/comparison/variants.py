"""What is compared: `e2e,lopt:k=4,lopt:lr_local=0.1x` as variants, and a variant as the settings of a run.

A variant is METHOD[:key=value...]; its keys are settings of `Config`, so a method that comes later needs nothing here.
Commas stand between variants, so a list inside one is written with `+` (boundary_layers=3+5, reach=0.1:all+1:half).
`lr_local=0.1x` is a tenth of the run's learning rate, whichever that is.

The rules: what would make the comparison another one (data, seeds, tokens, budgets: `SHARED`) cannot be set for a single
variant; a setting that has no effect there is a mistake, because the row would carry a name that is not true; and two
variants that come to the same settings are one. Nothing is judged here that `load_config` judges.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lopt_edge.config.load import load_config
from lopt_edge.config.rules import no_effect_warnings
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.methods import owners_of

SHORT = {"k": "num_segments", "r": "lora_r"}
SHORT_OF = {name: short for short, name in SHORT.items()}
SHARED = frozenset({
    "method", "model", "revision", "data", "data_format", "chat_template", "output", "max_seq_len", "max_steps", "epochs",
    "seed", "eval_data", "eval_fraction", "eval_every", "keep_best", "retention_data", "sample_prompt", "init_adapter",
    "cache_dir", "page_dir", "device", "device_memory", "host_memory", "disk_memory", "pinned_memory", "resume", "force",
    "memory_report", "dry_run", "ignore_columns", "think", "escape_special_tokens", "system", "overwrite",
    "columns", "track", "tokenizer", "objective",
})  # fmt: skip
NOT_HERE = {  # settings of the config file that a comparison cannot follow, and why
    "dry_run": "nothing would be compared",
    "overwrite": "what is there already is kept, and not run again",
    "resume": "each run is taken up where it stands anyway",
    "boundary_cache": "runs would share what the first one computed",
    "keep_best": "with test data the adapter would be chosen by them",
}
FACTORS = ("lr_local", "lr_head")  # 0.1x: a tenth of the run's learning rate
SCHEDULE = "reach"  # its value has colons and commas of its own
LONGEST_SLUG = 80


@dataclass(frozen=True)
class Variant:
    """A method and the settings in which it differs, as text, in one order however they were written."""

    method: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The variant as it is written, with the short names of settings."""
        return ":".join([self.method, *(f"{SHORT_OF.get(key, key)}={value}" for key, value in self.settings)])

    @property
    def slug(self) -> str:
        """The name of its folder, made from the variant alone."""
        plain = self.name.replace(":", "_")
        slug = re.sub(r"[^A-Za-z0-9=+._-]", "-", plain)[:LONGEST_SLUG].lstrip(".")
        return slug if slug == plain else f"{slug}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    @property
    def own_lr(self) -> float | None:
        """The learning rate that it states itself; None if it states none."""
        return next((float(value) for key, value in self.settings if key == "lr"), None)

    def overrides(self, lr: float) -> dict[str, Any]:
        """The settings over those of the config file. Raises ValueError for a factor that is no number."""
        found: dict[str, Any] = {"method": self.method, "lr": lr, **dict(self.settings)}
        for name in FACTORS:
            if isinstance(rate := found.get(name), str) and rate.endswith("x"):
                found[name] = float(f"{float(rate[:-1]) * float(found['lr']):.12g}")  # 0.1x of 3e-4 is 3e-5
        return {key: _listed(key, value) for key, value in found.items()}


def _listed(key: str, value: Any) -> Any:
    """The value with commas for `+` in a list, and in a text by layer (weights=disk+0-5=resident)."""
    field = Config.model_fields.get(key)
    takes_list = field is not None and (field.annotation is str or "tuple" in str(field.annotation) or key == SCHEDULE)
    return value.replace("+", ",") if takes_list and key != "method" and isinstance(value, str) else value


def parse_variants(text: str, flag: str) -> tuple[list[Variant], list[InputError]]:
    """The variants of a flag's text, and what is wrong with its form."""
    found: list[Variant] = []
    errors: list[InputError] = []
    for part in text.split(","):
        try:
            variant = _parse(part.strip(), flag)
        except InputError as error:
            errors += error.errors if isinstance(error, InputErrors) else [error]
        else:
            if variant in found:
                errors.append(InputError("is given twice", where=f"{flag} {variant.name}", fix="keep one"))
            found.append(variant)
    return found, errors


def _parse(text: str, flag: str) -> Variant:
    method, *rest = (piece.strip() for piece in text.split(":"))
    if not method:
        raise InputError("names an empty variant", where=flag, fix="write e.g. e2e,lopt:k=4,frozen")
    if "=" in method or method.isdigit():
        raise InputError(
            f"{method!r} is no method",
            where=f"{flag} {text}",
            fix="commas stand between variants: write a list with + (boundary_layers=3+5)",
        )
    settings: dict[str, str] = {}
    for piece in rest:
        if SCHEDULE in settings and "=" not in piece:
            settings[SCHEDULE] += f":{piece}"
            continue
        key, equals, value = (word.strip() for word in piece.partition("="))
        name = SHORT.get(key, key.replace("-", "_"))
        if not equals or not key or not value:
            raise InputError(f"{piece!r} is no key=value", where=f"{flag} {text}", fix="write e.g. lopt:k=4:r=8")
        if name in settings:
            raise InputError(f"{name} is given twice", where=f"{flag} {text}", fix="keep one")
        settings[name] = value
    return Variant(method, tuple(sorted(settings.items(), key=lambda item: SHORT_OF.get(item[0], item[0]))))


def resolve(variant: Variant, lr: float, *, base: Config, common: dict[str, Any]) -> Config:
    """The settings of one of the variant's runs: those of `base`, its own, and `common`.

    Options of another method in `base` are for the variants of that method, and left out here. Raises InputErrors that
    name the variant.
    """
    where = f"--methods {variant.name}"
    try:
        own = variant.overrides(lr)
    except ValueError:
        raise InputErrors(
            [InputError("is no number or factor", where=f"{where}: lr, lr_local or lr_head", fix="write e.g. 1e-4 or 0.1x")]
        ) from None
    try:
        given = base.model_dump(mode="json", exclude_unset=True)
        shared = {key: value for key, value in given.items() if variant.method in (owners_of(key) or (variant.method,))}
        return load_config(None, {**shared, **own, **common})
    except InputError as error:
        faults = error.errors if isinstance(error, InputErrors) else (error,)
        named = [InputError(one.what, where=f"{where}: {one.where.lstrip('-')}", fix=one.fix) for one in faults]
        raise InputErrors(named) from None


def check_variants(variants: Sequence[Variant], base: Config, *, lrs: Sequence[float], tuned: bool) -> list[InputError]:
    """The errors of all variants, beside the config file's settings `base`. `lrs`: the grid, or the config's own."""
    errors: list[InputError] = []
    seen: list[tuple[Variant, Config]] = []
    for variant in variants:
        where = f"--methods {variant.name}"
        faults = list(_unequal(variant, where, tuned=tuned))
        if not faults:
            try:
                configs = [resolve(variant, lr, base=base, common={}) for lr in lrs]
            except InputErrors as error:
                faults = list(error.errors)
            else:
                faults = list(_untrue(variant, configs[0], base, where))
                same = [other for other, config in seen if _effective(config) == _effective(configs[0])]
                faults += [
                    InputError(f"comes to the same settings as {same[0].name}", where=where, fix="keep one")
                    for _ in same[:1]
                ]
                seen.append((variant, configs[0]))
        errors += faults
    return errors


def _effective(config: Config) -> dict[str, Any]:
    """The settings, each default replaced by what it comes to."""
    return {**config.model_dump(), "lr_local": config.local_lr, "lr_head": config.head_lr}


def _unequal(variant: Variant, where: str, *, tuned: bool) -> Iterator[InputError]:
    for key, _ in variant.settings:
        if key in SHARED:
            yield InputError(f"{key} is shared by all variants", where=where, fix="set it in the config file")
    if tuned and "lr" in dict(variant.settings):
        yield InputError("states an lr, and --lr-grid tunes it", where=where, fix="leave one of them out")


def _untrue(variant: Variant, config: Config, base: Config, where: str) -> Iterator[InputError]:
    if config.batch_size * config.grad_accum != base.batch_size * base.grad_accum:
        yield InputError(
            f"takes {config.batch_size * config.grad_accum} sequences a step, the config "
            f"{base.batch_size * base.grad_accum}",
            where=where,
            fix="keep batch_size x grad_accum, so that all see the same tokens",
        )
    for warning in no_effect_warnings(config):
        if any(warning.startswith(f"{key} has no effect") for key, _ in variant.settings):
            yield InputError(warning, where=where, fix="leave it out")

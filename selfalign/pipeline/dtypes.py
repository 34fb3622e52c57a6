"""Resolution of dtype=auto. The configuration keeps "auto"; the inputs of stages have the dtype of this machine."""

from dataclasses import replace
from typing import Any

from selfalign.config.experiment import ExperimentConfig
from selfalign.models.checkpoint import fastest_dtype

WRITES = {"engine.dtype"}
"""Settings of what writes token by token; the others are of what reads whole texts."""


def resolve_dtypes(config: ExperimentConfig) -> ExperimentConfig:
    """Return the configuration with every dtype=auto resolved, because the dtype changes results and thus keys."""
    found = auto_dtypes(config)
    train = config.train
    train = replace(
        train, sft=_resolved("train.sft", train.sft, found), align=_resolved("train.align", train.align, found)
    )
    return replace(config, engine=_resolved("engine", config.engine, found), train=train)


def auto_dtypes(config: ExperimentConfig) -> dict[str, str]:
    """Return {key: dtype on this machine} of all settings with dtype=auto."""
    return {key: fastest_dtype(writing=key in WRITES)[0] for key in _auto_settings(config)}


def dtypes_text(resolved: dict[str, str]) -> str:
    """Return a line about what dtype=auto means on this machine, and why."""
    means = ", ".join(f"{key}={dtype}" for key, dtype in resolved.items())
    return f"dtype=auto means {means}, because {fastest_dtype(writing=False)[1]}"


def _auto_settings(config: ExperimentConfig) -> list[str]:
    """Return the keys of the settings that are auto. The scoring dtype is, unless it follows a dtype that is set."""
    components = {"engine": config.engine, "train.sft": config.train.sft, "train.align": config.train.align}
    auto = {key: settings for key, settings in components.items() if getattr(settings, "dtype", "") == "auto"}
    return [
        f"{key}.{name}"
        for key, settings in auto.items()
        for name in ("dtype", "scoring_dtype")
        if getattr(settings, name, "") == "auto"
    ]


def _resolved(key: str, settings: Any, found: dict[str, str]) -> Any:
    own = {name: found[f"{key}.{name}"] for name in ("dtype", "scoring_dtype") if f"{key}.{name}" in found}
    return replace(settings, **own) if own else settings

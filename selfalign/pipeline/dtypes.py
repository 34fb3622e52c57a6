"""dtype=auto, which stays in the configuration and is resolved for this machine where stages get their inputs."""

from dataclasses import replace
from typing import Any

from selfalign.config.experiment import ExperimentConfig
from selfalign.models.checkpoint import resolve_dtype


def resolve_dtypes(config: ExperimentConfig) -> ExperimentConfig:
    """Return the configuration with every dtype=auto resolved, because the dtype changes results and so the keys."""
    train = replace(config.train, sft=_resolved(config.train.sft), align=_resolved(config.train.align))
    return replace(config, engine=_resolved(config.engine), train=train)


def auto_dtypes(config: ExperimentConfig) -> dict[str, str]:
    """Return {setting: dtype on this machine} of all that are auto."""
    settings = {"engine": config.engine, "train.sft": config.train.sft, "train.align": config.train.align}
    return {f"{key}.dtype": resolve_dtype("auto") for key, one in settings.items() if _is_auto(one)}


def _resolved(settings: Any) -> Any:
    return replace(settings, dtype=resolve_dtype("auto")) if _is_auto(settings) else settings


def _is_auto(settings: Any) -> bool:
    return getattr(settings, "dtype", "") == "auto"

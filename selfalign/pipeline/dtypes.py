"""Resolution of dtype=auto. The configuration keeps "auto"; the inputs of stages have the dtype of this machine."""

from dataclasses import replace
from typing import Any

from selfalign.config.experiment import ExperimentConfig
from selfalign.models.checkpoint import resolve_dtype


def resolve_dtypes(config: ExperimentConfig) -> ExperimentConfig:
    """Return the configuration with every dtype=auto resolved, because the dtype changes results and thus keys."""
    train = replace(config.train, sft=_resolved(config.train.sft), align=_resolved(config.train.align))
    return replace(config, engine=_resolved(config.engine), train=train)


def auto_dtypes(config: ExperimentConfig) -> dict[str, str]:
    """Return {key: dtype on this machine} of all settings with dtype=auto."""
    components = {"engine": config.engine, "train.sft": config.train.sft, "train.align": config.train.align}
    return {f"{key}.dtype": resolve_dtype("auto") for key, settings in components.items() if _is_auto(settings)}


def _resolved(settings: Any) -> Any:
    return replace(settings, dtype=resolve_dtype("auto")) if _is_auto(settings) else settings


def _is_auto(settings: Any) -> bool:
    return getattr(settings, "dtype", "") == "auto"

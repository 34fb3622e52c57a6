"""dtype=auto is another on another machine: the folder of a run is the same, the keys of what it makes are not."""

import json
from pathlib import Path

import pytest
from builders import composed, run

from selfalign.core.files import read_json
from selfalign.engines.transformers import Transformers
from selfalign.launch.experiment import RESOLVED
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.pipeline.dtypes import auto_dtypes, dtypes_text, resolve_dtypes
from selfalign.runs.folder import run_folder
from selfalign.store.key import key_of


def machine(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """From now on this is a machine whose faster dtype is this one."""
    for module in ("models.checkpoint", "pipeline.dtypes"):
        monkeypatch.setattr(f"selfalign.{module}.fastest_dtype", lambda *, writing: (dtype, "it is so"))


@pytest.mark.parametrize(
    "engine",
    [
        ["engine=transformers"],
        ["engine=vllm"],
        ["engine=server", "engine.command='serve {weights} --port {port} --dtype {dtype}'"],
    ],
    ids=["transformers", "vllm", "server"],
)
def test_folder_is_the_same_on_every_machine_and_the_keys_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: list[str]
) -> None:
    folders, keys, texts = set(), set(), set()
    for dtype in ("float32", "bfloat16"):
        machine(monkeypatch, dtype)
        config, text, _ = composed("model=tiny", "engine.dtype=auto", *engine)
        here = resolve_dtypes(config)
        folders.add(run_folder(tmp_path, config.name, config, fresh=False))
        texts.add(text)
        inputs = (here.engine, here.train.sft, here.train.align, here.train.align.logprob_settings("float32"))
        keys |= {key_of("stage", {"settings": settings}) for settings in inputs}
        assert {here.engine.dtype, here.train.sft.dtype, here.train.align.dtype} == {dtype}
        assert set(auto_dtypes(config).values()) == {dtype}
        assert auto_dtypes(here) == {}
    assert (len(folders), len(texts), len(keys)) == (1, 1, 2 * 4)


def test_dtype_that_is_set_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "bfloat16")
    told = ["engine.dtype=float32", "train.sft.dtype=float32", "train.align.dtype=float32"]
    config, *_ = composed("model=tiny", *told)
    assert resolve_dtypes(config) == config
    assert auto_dtypes(config) == {}


AMX = {"amx_tile": True, "avx512_bf16": True}


@pytest.mark.parametrize(
    ("has", "writes", "reads", "reason"),
    [
        (AMX, "bfloat16", "bfloat16", "the CPU has AMX"),
        ({"avx512_bf16": True}, "float32", "bfloat16", "the CPU has AVX-512 BF16 and no AMX"),
        ({"avx2": True}, "float32", "float32", "the CPU has no instructions for bfloat16"),
    ],
    ids=["amx", "avx512_bf16", "neither"],
)
def test_auto_is_what_the_processor_is_faster_in_to_write_and_to_read(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], writes: str, reads: str, reason: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has)
    config, *_ = composed("model=tiny")
    found = auto_dtypes(config)
    assert found == {
        "engine.dtype": writes,
        "engine.scoring_dtype": reads,
        "train.sft.dtype": reads,
        "train.align.dtype": reads,
    }
    assert dtypes_text(found).endswith(f"because {reason}")
    here = resolve_dtypes(config).engine
    assert (here.dtype, here.scoring_dtype) == (writes, reads)


@pytest.mark.parametrize(
    ("given", "writes", "reads"),
    [
        ({}, "float32", "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"dtype": "float32"}, "float32", "float32"),
        ({"scoring_dtype": "float32"}, "float32", "float32"),
        ({"dtype": "bfloat16", "scoring_dtype": "float32"}, "bfloat16", "float32"),
    ],
    ids=["auto", "bfloat16", "float32", "scores in float32", "both"],
)
def test_engine_scores_in_the_dtype_that_it_writes_in_if_that_is_set(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], writes: str, reads: str, tiny_policy: PolicyCheckpoint
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    told = [f"engine.{name}={dtype}" for name, dtype in given.items()]
    for engine in (Transformers(**given), resolve_dtypes(composed("model=tiny", *told)[0]).engine):
        assert str(engine.load(tiny_policy).policy.model.dtype) == f"torch.{writes}"
        assert str(engine.load_scorer(tiny_policy, 100).policy.model.dtype) == f"torch.{reads}"


def test_run_goes_on_in_its_folder_on_another_machine_and_makes_anew_what_depends_on_the_dtype(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [{"id": f"p{n}", "prompt": f"Name {n} birds.", "chosen": "Wrens.", "rejected": "Stones."} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs), encoding="utf-8")
    overrides = [
        "model=tiny", "tracker=none", "evaluate=none", "iterations=1", "data=pairs",
        f"data.path={tmp_path}/pairs.jsonl",
        "data.seed_data.demonstrations=''", "data.seed_data.ranked=''",
    ]  # fmt: skip

    def keys_after(dtype: str) -> dict[str, str]:
        machine(monkeypatch, dtype)
        caplog.clear()
        caplog.set_level("INFO", logger="selfalign.launch.experiment")
        folder = run(tmp_path / "outputs", *overrides)
        auto = ("engine.dtype", "engine.scoring_dtype", "train.sft.dtype", "train.align.dtype")
        assert read_json(folder / RESOLVED) == dict.fromkeys(auto, dtype)
        assert f"dtype=auto means engine.dtype={dtype}, engine.scoring_dtype={dtype}, train.sft" in caplog.text
        assert "because it is so" in caplog.text
        inputs = [read_json(path)["inputs"] for path in sorted((tmp_path / "outputs/store").glob("*/*/manifest.json"))]
        assert "auto" not in json.dumps(inputs).split('"')
        assert "dtype: auto" in (folder / "config.yaml").read_text(encoding="utf-8")
        return {stage["label"]: stage["key"] for stage in read_json(folder / "summary.json")["stages"]}

    class KilledError(BaseException):
        """The machine goes down."""

    def align(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("selfalign.pipeline.loop.align", align)
        with pytest.raises(KilledError):
            keys_after("float32")
    assert "engine.dtype=auto was" not in caplog.text
    there = keys_after("bfloat16")
    for key in ("engine", "train.sft", "train.align"):
        assert f"{key}.dtype=auto was float32 on the machine where this run was before, and is bfloat16 on this" in (
            caplog.text
        )
    assert "Set train.align.dtype=float32 to reuse" in caplog.text
    here = keys_after("float32")
    assert "train.align.dtype=auto was bfloat16" in caplog.text
    assert [path.name for path in (tmp_path / "outputs").glob("selfalign-*")] == [folder_name(tmp_path, overrides)]
    same = {label for label, key in here.items() if there[label] == key}
    assert {"M0", "seeds", "iteration_1/pairs"} <= same
    assert {"iteration_1/reference", "M2"} <= set(here) - same


def folder_name(tmp_path: Path, overrides: list[str]) -> str:
    config, *_ = composed(*overrides)
    return run_folder(tmp_path, config.name, config, fresh=False)[0].name

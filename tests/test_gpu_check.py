"""The check for a GPU, rehearsed on a CPU at tiny sizes, and the experiment that it measures with."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import warm
from builders import ROOT

sys.path += [str(ROOT / "experiments" / folder) for folder in ("gpu", "speed")]

import check
import preference_step

from selfalign.models.batches import SharedPrompt, pack, pad

IN_THE_GATE = ["machine", "gpu tests", "flex attention", "smoke loop", "dpo", "trl_best", "sr_dpo_after"]
"""The others are the same code with other settings; the nightly target runs them too."""


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts the parts as forks."""
    names = {name: getattr(subprocess, name) for name in ("PIPE", "TimeoutExpired")}
    monkeypatch.setattr(check, "subprocess", SimpleNamespace(Popen=warm.Command, run=warm.run, **names))
    monkeypatch.setattr(preference_step, "subprocess", SimpleNamespace(run=warm.run))


def test_rehearsal_has_the_figures_of_every_part(forked: None, tmp_path: Path) -> None:
    check.check(tmp_path, IN_THE_GATE, 300, rehearse=True)
    result = json.loads((tmp_path / "check.json").read_text())
    parts = result["parts"]
    assert list(parts) == IN_THE_GATE
    log = (tmp_path / "check.log").read_text()
    assert {part["status"] for part in parts.values()} <= {"ok", "skipped"}, log
    assert "skipped" in parts["gpu tests"]["result"] or "passed" in parts["gpu tests"]["result"]
    assert parts["smoke loop"]["model"] == "M2"
    for name in ("dpo", "trl_best", "sr_dpo_after"):
        profile = parts[name]["profile"]
        assert sum(profile["shares"].values()) == pytest.approx(1)
        assert profile["shares"]["attention"] > 0.01
        assert profile["shares"]["matrix products"] > 0.01
        assert len(parts[name]["seconds_of_steps"]) == 2  # Of three steps the last is profiled.
        assert parts[name]["peak_gb"] > 0
    dpo, peer = parts["dpo"], parts["trl_best"]
    assert dpo["parameters"] == peer["parameters"]
    seconds = dpo["seconds_of_steps"][1]
    operations = 6 * dpo["parameters"] * dpo["tokens"]["real"] / seconds
    assert dpo["mfu_measured"] == pytest.approx(operations / parts["machine"]["rates"]["measured"])
    assert dpo["tokens_per_second_as_trl"] == pytest.approx(dpo["tokens"]["as_trl"] / seconds)
    assert result["ratios"][check.TRL_FULL] == pytest.approx(peer["step_seconds"] / dpo["step_seconds"])
    text = (tmp_path / "check.md").read_text()
    assert "Rehearsal" in text
    assert all(f"| {name} | " in text for name in IN_THE_GATE)


@pytest.mark.nightly
def test_whole_rehearsal_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "experiments/gpu/check.py", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert list(parts) == [part.name for part in check.parts(tmp_path, rehearse=True)]
    assert {part["status"] for part in parts.values()} <= {"ok", "skipped"}


@pytest.mark.parametrize(
    ("program", "limit", "needs", "status", "problem"),
    [
        ("print('{}'); raise SystemExit('out of memory')", 60, "", "failed", "out of memory"),
        ("print('half a line'); import os; os.abort()", 60, "", "failed", "half a line"),
        ("print('no figures')", 60, "", "failed", "its output has no figures"),
        ("import time; time.sleep(60)", 1, "", "failed", "stopped after 1 s"),
        ("", 60, "no_such_package", "skipped", "no_such_package is not installed"),
        ("", 0, "", "skipped", "time of the whole check is used up"),
        ("print('{\"found\": 7}')", 60, "", "ok", ""),
    ],
)
def test_part_that_fails_is_told_in_words(
    tmp_path: Path, program: str, limit: int, needs: str, status: str, problem: str
) -> None:
    part = check.Part(name="part", command=["-c", program], limit=limit, read=check.last_json, needs=needs)
    figures = check.run_part(part, limit, tmp_path / "log")
    assert figures["status"] == status
    assert problem in figures.get("problem", "")
    assert figures.get("found") == (7 if status == "ok" else None)


def test_failed_part_does_not_stop_the_next_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs = {"breaks": "raise SystemExit('broken')", "works": "print('{}')"}
    parts = [
        check.Part(name=name, command=["-c", program], limit=60, read=check.last_json)
        for name, program in programs.items()
    ]
    monkeypatch.setattr(check, "parts", lambda work, rehearse: parts)
    result = check.check(tmp_path, [], 60, rehearse=False)
    assert [figures["status"] for figures in result["parts"].values()] == ["failed", "ok"]
    assert "| breaks | failed | 0 | broken |" in (tmp_path / "check.md").read_text()


def steps_of(seconds: float, **more: Any) -> dict[str, Any]:
    profile = {"shares": {"attention": 0.1, "other": 0.9}, "busy": 0.9}
    return {
        **{"status": "ok", "shape": "llama_1b", "step_seconds": seconds, "profile": profile, "peak_gb": 30.0},
        **{"real_tokens_per_second": 1.0, "tokens_per_second_as_trl": 1.0},
        **more,
    }


def test_aims_are_read_off_the_figures() -> None:
    parts = {
        "dpo": steps_of(1.0, mfu_sheet=0.41),
        "trl_best": steps_of(1.4, peak_gb=60.0),
        "sr_dpo": steps_of(1.3),
        "sr_dpo_after": steps_of(1.3),
    }
    result = {"parts": parts, "ratios": check.ratios(parts)}
    reached = {row[0]: row[2:] for row in (check.aim_row(aim, result) for aim in check.AIMS)}
    assert reached == {
        "dpo: MFU of the data sheet's rate, real tokens": ["0.410", "yes"],
        "dpo, bfloat16 weights: MFU of the data sheet's rate, real tokens": ["not measured", ""],
        check.TRL_FULL: ["1.400", "no"],
        check.TRL_LORA: ["not measured", ""],
        f"{check.TRL_FULL}: peak memory of ours": ["0.500", "yes"],
        "Sr-DPO against our own DPO (time)": ["1.300", "yes"],
        "Sr-DPO with p after the prompt against our own DPO (time)": ["1.300", "no"],
    }


def test_step_with_an_adapter_needs_four_operations_a_weight() -> None:
    steps = check.step_parts(rehearse=True)
    measured = {"seconds_of_steps": [9.0, 2.0, 4.0, 3.0], "parameters": 1000}
    full, lora = (steps[name].figures(measured, {"sheet": 1e9}) for name in ("dpo", "dpo_lora"))
    assert full["step_seconds"] == 3
    assert full["mfu_sheet"] == pytest.approx(6 * 1000 * full["tokens"]["real"] / 3 / 1e9)
    assert lora["mfu_sheet"] == pytest.approx(full["mfu_sheet"] * 4 / 6)


def test_tokens_are_counted_as_batches_have_them() -> None:
    rows = preference_step.draw_pairs(5, 1024, 0)
    groups = [
        SharedPrompt(
            id=str(number),
            prompt=row["prompt_ids"],
            responses=[row["chosen_ids"], row["rejected_ids"]],
            num_context_tokens=[0, 0],
        )
        for number, row in enumerate(rows)
    ]
    padded = pad(groups).inputs["attention_mask"]
    counted = preference_step.count_tokens(rows)
    assert counted["as_trl"] == padded.sum()
    assert counted["padded"] == padded.numel()
    # A batch also shares what two responses happen to begin with.
    assert 0 <= counted["real"] - pack(groups).inputs["input_ids"].numel() <= 5


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_tem_fused_flex_attention_backward_3", "attention"),
        (
            "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel",
            "attention",
        ),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor", "optimiser"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu", "other"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda", "other"),
        ("aten::mul", "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel: str, kind: str) -> None:
    assert preference_step.kind_of(kernel) == kind


def test_experiment_compares_variants(forked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    sizes = ["--shape", "tiny", "--pairs", "2", "--steps", "2", "--rounds", "1"]
    told = ["preference_step.py", *sizes, "--variants", "dpo", "sr_dpo", "--growth", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", told)
    preference_step.main()
    result = json.loads(out.read_text())
    seconds = {name: row["seconds"] for name, row in result["variants"].items()}
    assert result["ratios"] == {"Sr-DPO against our own DPO (time)": seconds["sr_dpo"] / seconds["dpo"]}
    assert result["share_of_matrix_rate"] > 0
    assert result["growth"]["seconds_8x_over_1x"] > 0

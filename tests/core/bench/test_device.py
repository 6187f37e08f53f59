"""The report of a device, on a CPU with small networks; the figures themselves are not tested."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from star_core.bench import device as bench
from star_core.bench.device import GIB, SMALL, measure, table
from star_core.cli import main

CHECKS = ["parity", "slices", "plan", "out of memory", "offloading", "VAE", "job"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "cpu.md"
    assert main(["bench", "--device", "cpu", "--report", str(path)]) == 0
    return path.read_text(), json.loads(path.with_suffix(".json").read_text())


def test_the_table_and_the_json_beside_it_have_every_check(report):
    text, figures = report
    assert list(dict.fromkeys(each["check"] for each in figures["results"])) == CHECKS
    assert not [each["error"] for each in figures["results"] if each["error"]]
    lines = text.splitlines()
    assert lines[0].startswith("CPU (cpu), torch ") and len(lines) == 4 + len(figures["results"])
    assert all(line.count("|") == 4 for line in lines[2:])


def rows(report, check: str) -> dict[str, dict]:
    return {r["case"]: r["figures"] for r in report[1]["results"] if r["check"] == check}


def test_a_cpu_equals_itself_and_coarser_types_are_further_away(report):
    errors = {case: each["relative error"] for case, each in rows(report, "parity").items()}
    for name in ("tiny", "random"):
        f32, f16, bf16 = (errors[f"{name}, {t}"] for t in ("float32", "float16", "bfloat16"))
        assert f32 < 1e-6 < f16 < bf16 < 0.1
    vae = rows(report, "VAE")
    assert all(each["finite"] for each in vae.values())
    assert 0 == vae["decode, float32"]["relative error"] < vae["decode, bfloat16"]["relative error"]


def test_measured_bytes_are_those_predicted(report):
    for figures in rows(report, "plan").values():
        assert figures["GiB measured"] == pytest.approx(figures["GiB predicted"], rel=0.15)


def test_a_forced_error_is_survived(report):
    (figures,) = rows(report, "out of memory").values()
    assert "smaller slices" in figures["changes"] and figures["relative error"] < 1e-6


def test_a_job_has_all_its_frames(report):
    (figures,) = rows(report, "job").values()
    assert (figures["frames"], figures["finite"]) == (SMALL.job, True)


def test_a_check_that_fails_is_a_row_and_the_others_go_on(monkeypatch):
    def fails(device, sizes):
        yield bench.Result(check="fails", case="first", figures={"seconds": 1.5})
        raise RuntimeError("no kernel image\nis available")

    def works(device, sizes):
        yield bench.Result(check="works", case="", figures={"finite": True})

    monkeypatch.setattr(bench, "CHECKS", (fails, works))
    report = measure(torch.device("cpu"))
    errors = [each["error"] for each in report["results"]]
    assert errors == [None, "RuntimeError: no kernel image is available", None]
    assert table(report).splitlines()[-2:] == [
        "| fails |  | RuntimeError: no kernel image is available |",
        "| works |  | finite True |",
    ]


def test_a_case_that_fails_is_a_row_and_the_other_cases_go_on(monkeypatch):
    def capped(device, cap):
        if cap == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return nullcontext()

    monkeypatch.setattr(bench, "_capped", capped)
    first, second = bench.plans(torch.device("cpu"), replace(SMALL, caps=(1, GIB)))
    assert first.error == "OutOfMemoryError: CUDA out of memory" and not first.figures
    assert second.error is None and second.figures["GiB measured"]

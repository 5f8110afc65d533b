"""``fastmeta doctor`` and the front of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastmeta
from fastmeta.cli import doctor
from fastmeta.cli.main import COMMANDS, main
from fastmeta.core import environment, native, rates


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(words)
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "doctor", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["machine"]["cores"] >= 1
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert bool(report["gpu"]["devices"]) == torch.cuda.is_available()
    assert bool(report["gpu"]["reason"]) != torch.cuda.is_available()
    assert report["cuda"]["available"] == (native.cuda_extension() is not None)
    assert bool(report["cuda"]["reason"]) != report["cuda"]["available"]
    assert [b["name"] for b in report["backends"]["inner_update"]] == ["native", "triton", "reference"]
    assert set(report["native"]["compiled"]) >= ({"plain"} if native.extension() else set())


def test_text_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "doctor")
    report = doctor.gather()
    assert status == 0
    for words in (
        *(version or "not installed" for version in report["versions"].values()),
        report["machine"]["processor"],
        f"{report['machine']['cores']} cores",
        report["gpu"]["reason"],
        report["cuda"]["reason"],
        *(backend["reason"] for table in report["backends"].values() for backend in table),
    ):
        assert words in out


def test_a_missing_extension_is_shown_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler was found"))
    _, out, _ = call(capsys, "doctor")
    assert out.count("missing: no compiler was found") == 3  # the build, and both updates' rows
    assert "no native kernels" in environment.machine_line()


def test_cuda_kernels_without_a_device_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SimpleNamespace(devices=lambda: (0, "no CUDA-capable device is detected"))
    monkeypatch.setattr(native, "_import", lambda name, record: (module, ""))
    monkeypatch.setattr(native, "_load_cuda", native._load_cuda.__wrapped__)
    assert native.cuda_extension() is None
    _, out, _ = call(capsys, "doctor")
    assert "CUDA kernels" in out
    assert "missing: no CUDA-capable device is detected" in out


def fresh(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


DOCTOR = "from fastmeta.cli.main import main; main(['doctor'])"


def test_loads_nothing_heavy() -> None:
    heavy = ["matplotlib", "sklearn", "scipy", "triton", "torch._dynamo", "fastmeta.cli.train", "fastmeta.engine"]
    code = f"import atexit, sys; atexit.register(lambda: print([m for m in {heavy} if m in sys.modules])); {DOCTOR}"
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("plain", "instruction set plain"),
        ("v9", "missing: FASTMETA_ISA: instruction set must be one of plain, v3, v4, got 'v9'"),
    ],
)
def test_instruction_set_of_the_environment(extension: object, wanted: str, message: str) -> None:
    done = fresh(DOCTOR, FASTMETA_ISA=wanted)
    assert done.returncode == 0
    assert message in done.stdout


def test_an_instruction_set_that_cannot_be_raises_when_used(extension: object) -> None:
    done = fresh("import fastmeta, torch; fastmeta.inner_update(torch.ones(2), torch.ones(2), 0.1)", FASTMETA_ISA="v9")
    assert "RuntimeError: FASTMETA_ISA: instruction set must be one of" in done.stderr


def test_machine_line() -> None:
    line = environment.machine_line()
    assert f"torch {torch.__version__}" in line
    assert environment.processor() in line


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    _, out, err = call(capsys, *words)
    for name, command in COMMANDS.items():
        assert name in out + err
        assert command.help[:30] in out + err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = call(capsys, name, "--help")
    assert status == 0
    assert f"fastmeta {name}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[1].strip() == f"fastmeta {fastmeta.__version__}"


def test_errors_end_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("cannot read checkpoint: it is truncated")

    monkeypatch.setattr(doctor, "doctor", broken)
    assert call(capsys, "doctor") == (1, "", "fastmeta: error: cannot read checkpoint: it is truncated\n")
    monkeypatch.setenv("FASTMETA_DEBUG", "1")
    with pytest.raises(OSError, match="truncated"):
        main(["doctor"])


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "trian")
    assert status == 2
    assert "trian" in err


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "Path", lambda _: tmp_path / "absent")
    environment.processor.cache_clear()
    assert environment.processor()
    environment.processor.cache_clear()


def test_calibration_is_measured_kept_and_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "new"))
    assert not rates.known().measured
    status, out, _ = call(capsys, "doctor", "--calibrate")
    assert status == 0
    assert str(tmp_path / "new" / "rates.json") in out
    found = rates.known()
    assert found.measured
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bytes < 1e13
    assert 1e-7 < found.call_s < 1e-2
    assert 1e8 < found.near < 1e13
    assert 1e8 < found.native < 1e14
    assert found.cache <= found.last * 64
    assert json.loads(call(capsys, "doctor", "--json")[1])["rates"]["flops"] == found.flops
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # another number of threads is another machine
    try:
        assert not rates.known().measured
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"%s": {}}',
        '{"%s": {"flops": -1, "native": 1, "bytes": 1, "near": 1, "cache": 1, "last": 1, "call_s": 1}}',
    ],
)
def test_rates_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    rates.file().write_text(content.replace("%s", rates._machine()))
    with pytest.warns(UserWarning, match="calibrate"):
        assert rates.known() == rates.Rates()

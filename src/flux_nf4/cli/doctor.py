"""`flux-nf4 doctor`: this machine and a model, looked over, each finding with its remedy."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux_nf4.cli.console import print_data, print_json, printable, styled
from flux_nf4.cli.findings import Finding, Severity, counted
from flux_nf4.cli.options import argument
from flux_nf4.cli.paths import model_path
from flux_nf4.cli.settings import Settings, read_options
from flux_nf4.cli.verb import Verb, debug_option, json_option
from flux_nf4.errors import InputError
from flux_nf4.memory.host import measure_host

if TYPE_CHECKING:
    from collections.abc import Iterator

_STYLES: dict[Severity, str] = {
    "ok": "green",
    "note": "cyan",
    "warning": "yellow",
    "problem": "bold red",
}
_COLUMN = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """The options of `doctor`."""

    model: str | None = argument("MODEL", help="a checkpoint to look at too [the one in use]")
    json: bool = json_option()
    debug: bool = debug_option()


def run(options: DoctorOptions) -> int:
    """Print what is found; 1 where any of it is a problem, else 0."""
    findings = []
    for finding in _examine(options.model):
        findings.append(finding)
        if not options.json:  # each as it is found: importing PyTorch takes its time
            _print(finding)
    num_problems = sum(finding.severity == "problem" for finding in findings)
    if options.json:
        shown = [dataclasses.asdict(finding) for finding in findings]
        print_json({"problems": num_problems, "findings": shown}, indent=2)
    else:
        verdict = counted(num_problems, "problem") if num_problems else "no problems"
        print_data(f"\n{styled(verdict, _STYLES['problem' if num_problems else 'ok'])}")
    return 1 if num_problems else 0


def _examine(model: str | None) -> Iterator[Finding]:
    from flux_nf4.cli import machine

    yield from machine.python_findings()
    host = measure_host()
    yield machine.memory_finding(host.free, host.total)
    yield from machine.package_findings()
    yield machine.disk_finding(Path("outputs"), "images")
    settings, findings = _read_settings()
    yield from findings
    if importlib.util.find_spec("torch") is None:
        return  # said already: it is one of the packages
    yield from _examine_torch()
    from flux_nf4.cli.model_checks import model_findings

    yield from model_findings(model_path(model or settings.model))


def _read_settings() -> tuple[Settings, list[Finding]]:
    try:
        return read_options(Settings, {}), []
    except InputError as error:
        remedy = error.hint or "correct it"
        finding = Finding(severity="problem", topic="settings", text=error.message, remedy=remedy)
        return Settings(), [finding]


def _examine_torch() -> Iterator[Finding]:
    import torch

    from flux_nf4.cli import accelerators, machine

    yield machine.processor_finding(torch.cpu.get_capabilities())
    yield from accelerators.torch_findings(
        accelerators.inspect_torch(), accelerators.nvidia_driver()
    )


def _print(finding: Finding) -> None:
    label = styled(f"{finding.severity:<{_COLUMN}}", _STYLES[finding.severity])
    print_data(f"{label}{printable(finding.text)}")
    if finding.remedy:
        print_data(f"{'':{_COLUMN}}-> {printable(finding.remedy)}")


VERB = Verb(
    name="doctor",
    summary="Look over this machine and a model, and say what to do.",
    options=DoctorOptions,
    run=run,
    examples=("", "flux1-dev-bnb-nf4-v2.safetensors"),
    note="Exit code 0: no problem found. 1: at least one.",
)

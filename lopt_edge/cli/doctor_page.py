"""`lopt-edge doctor`: checks the machine, proves its device and measures it if asked, and shows all in words or as JSON.

The rule: everything shown comes from the report, the proofs or the profile (lopt_edge/doctor). A machine that is not sound
is neither proved nor measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def doctor_page(out: Console, *, as_json: bool, measure: bool, prove: bool) -> bool:
    """Show what the check found; returns whether the machine is sound, and its device proved if that was asked."""
    from lopt_edge.doctor.check_machine import check_machine, render

    report, proved = check_machine(), True
    found = report.as_dict()
    if not as_json:
        out.print(render(report))
    if prove and report.sound and report.choice is not None:
        proved, found["proofs"] = _prove(report.choice.device, None if as_json else out)
        n_passed = sum(proof["passed"] for proof in found["proofs"])
        found["verdict"] = {
            "device": report.choice.device,
            "proved": n_passed,
            "of": len(found["proofs"]),
            "passed": proved,
        }
    if measure and report.sound and report.choice is not None:
        found["profile"] = _measure(report.choice.device, None if as_json else out)
    if as_json:
        print(json.dumps(found, indent=2))
    return report.sound and proved


def _prove(device: str, out: Console | None) -> tuple[bool, list[dict[str, Any]]]:
    """Run the proofs, each shown on `out` as it ends; returns whether all passed, and them as JSON values."""
    import torch

    from lopt_edge.doctor.prove import prove

    proofs = []
    for proof in prove(torch.device(device)):
        proofs.append(proof)
        if out is not None:
            what = proof.fault or (f"error {proof.error:.1e} of {proof.bound:.0e}" if proof.bound else "")
            text = Text("proved  " if proof.passed else "FAILED  ", style="green" if proof.passed else "bold red")
            out.print(text.append(f"{proof.name}  {what}  {proof.seconds:.1f} s", style="default"))
    passed = sum(proof.passed for proof in proofs)
    if out is not None:
        fix = "" if passed == len(proofs) else "; please report it with the output of lopt-edge doctor --prove --json"
        out.print(f"{passed} of {len(proofs)} proved on {device}{fix}", markup=False)
    return passed == len(proofs), [{**asdict(proof), "passed": proof.passed} for proof in proofs]


def _measure(device: str, out: Console | None) -> dict[str, Any]:
    """Measure and store this machine's profile, and show it on `out`; returns it as JSON values."""
    from lopt_edge.doctor.measure import measure_profile
    from lopt_edge.plan.facts.profile import profile_path, save_profile

    profile, path = measure_profile(device), profile_path()
    save_profile(profile, path)
    if out is not None:
        table = Table.grid(padding=(0, 2))
        for name, text in (*profile.described(), ("source", profile.source)):
            table.add_row(Text(name, style="bold"), Text(text))
        out.print(table)
        out.print(f"profile: {path}", markup=False)
    return {**profile.as_dict(), "path": str(path)}

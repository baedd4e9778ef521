"""`lopt-edge doctor`: checks the machine, measures it if asked, and shows both, in words or as JSON.

The rule: everything shown comes from the report or the profile (lopt_edge/doctor). A machine that is not sound is not
measured.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def doctor_page(out: Console, *, as_json: bool, measure: bool) -> bool:
    """Show what the check found; returns whether the machine is sound."""
    from lopt_edge.doctor.check_machine import check_machine, render

    report = check_machine()
    found = report.as_dict()
    if not as_json:
        out.print(render(report))
    if measure and report.sound and report.choice is not None:
        found["profile"] = _measure(report.choice.device, None if as_json else out)
    if as_json:
        print(json.dumps(found, indent=2))
    return report.sound


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

"""A prediction as a picture: bytes over the ops of a step, for `lopt-edge plan --timeline` and a run's report."""

from __future__ import annotations

from lopt_edge.pictures.step_bytes import OpRow, draw_timeline
from lopt_edge.plan.costs.predict import Prediction


def predicted_picture(prediction: Prediction, *, title: str, budget_bytes: int | None) -> str:
    """The predicted timeline of a step as SVG."""
    beside_tensors = prediction.library_bytes + prediction.kept_bytes
    rows = [
        OpRow(
            row.op.text(),
            {"library": beside_tensors, **row.held},
            prediction.op_bytes(row),
            None,
            host_bytes=row.host_bytes,
            disk_bytes=row.disk_bytes,
        )
        for row in prediction.timeline.rows
    ]
    return draw_timeline(rows, title=title, budget_bytes=budget_bytes)

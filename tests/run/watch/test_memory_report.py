"""The memory report: what the meter counts by category, and the files, number for number those of meter and prediction."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lopt_edge.errors import RunError
from lopt_edge.plan.costs.predict import Prediction, predict
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import Sizes
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.watch.memory_report import MemoryMeter, held_tensors, write_report
from tests.laws.bench import Bench, make_bench, random_batch
from tests.plan.plans import make_knobs

RATES = {0: 1e-3, 1: 1e-3}
KNOBS = make_knobs(4, weights="disk", saved_inputs="disk", states="disk")


@pytest.fixture
def bench(four_bit, tmp_path) -> Bench:
    """Two segments, everything on disk, after its first step."""
    found = make_bench(four_bit("llama"), knobs=KNOBS, page_dir=tmp_path)
    found.executor.run(found.plan, [random_batch((60, 40))], step=1, learning_rates=RATES)
    yield found
    found.executor.mover.close()


def watched(bench: Bench) -> tuple[MemoryMeter, Batch]:
    meter, batch = MemoryMeter(bench.executor), random_batch((60, 40))
    with meter.watching([batch]):
        bench.executor.run(bench.plan, [batch], step=2, learning_rates=RATES)
    return meter, batch


def predicted(bench: Bench, batch: Batch) -> Prediction:
    shape = LayerShape(bench.model.facts, 4, 4, bench.model.facts.linear_names)
    return predict(bench.plan, Sizes(shape, KNOBS, vocabulary_itemsize=4), [batch.size], library_bytes=5 << 20)


def test_a_row_an_op_with_what_is_held_by_category(bench):
    meter, _ = watched(bench)
    assert [row.text for row in meter.rows] == [op.text() for op in bench.plan.ops]
    assert not bench.executor.observers, "the meter let go"
    held = {category: 0 for category, _ in held_tensors(bench.executor)}
    assert {"weights", "adapters", "gradients", "head", "workspace"} <= set(held)
    for row in meter.rows:
        assert row.peak_bytes >= sum(row.held.values()) > 0, row.text
        assert row.rss_bytes > row.peak_bytes
    assert {row.held["weights"] for row in meter.rows} == {meter.rows[0].held["weights"]}, "the ring is always there"
    states = [row.held.get("optimizer", 0) for row in meter.rows]
    assert states[0] == 0 < max(states), "they come for their update"
    saved = {row.text: row.held.get("saved inputs", 0) for row in meter.rows}
    assert saved["BACKWARD 0 mb=0"] > 0
    assert saved["STEP layer 0"] == 0


def test_a_storage_counts_once_however_many_hold_it(bench):
    stores = list(held_tensors(bench.executor))
    meter, _ = watched(bench)
    flat = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in stores}
    assert meter.rows[0].held["adapters"] in flat.values(), "one block"
    assert sum(meter.rows[0].held.values()) < sum(tensor.untyped_storage().nbytes() for _, tensor in stores)


def test_watching_again_begins_anew(bench):
    meter, batch = watched(bench)
    first = [row.peak_bytes for row in meter.rows]
    with meter.watching([batch]):
        bench.executor.run(bench.plan, [batch], step=3, learning_rates=RATES)
    assert [row.peak_bytes for row in meter.rows] == first


@pytest.mark.parametrize("name", ["memory", "memory.json", "deep/er/memory"])
def test_the_files_hold_the_numbers_of_prediction_and_meter(bench, tmp_path, name):
    meter, batch = watched(bench)
    prediction = predicted(bench, batch)
    paths = write_report(
        str(tmp_path / name), prediction, meter, title="a <run>", budget_bytes=64 << 20, plan_hash=bench.plan.hash()
    )
    base = tmp_path / name.removesuffix(".json")
    assert paths == (base.with_name("memory.json"), base.with_name("memory.svg"))
    report = json.loads(paths[0].read_text())
    assert report["plan_hash"] == bench.plan.hash()
    assert report["library_bytes"] == 5 << 20
    assert report["slack_bytes"] == prediction.slack_bytes
    assert report["predicted"] == {
        "tensor_peak_bytes": prediction.timeline.peak_bytes,
        "op": prediction.timeline.peak_row.op.text(),
        "device_bytes": prediction.device_bytes,
    }
    top = max(meter.rows, key=lambda row: row.peak_bytes)
    assert (report["measured"]["tensor_peak_bytes"], report["measured"]["op"]) == (top.peak_bytes, top.text)
    assert len(report["ops"]) == len(bench.plan.ops)
    for found, row, measured in zip(report["ops"], prediction.timeline.rows, meter.rows, strict=True):
        assert found["op"] == row.op.text() == measured.text
        assert found["predicted"] == {
            "held": row.held,
            "peak_bytes": row.peak_bytes,
            "host_bytes": row.host_bytes,
            "disk_bytes": row.disk_bytes,
        }
        assert found["measured"] == {
            "held": measured.held,
            "peak_bytes": measured.peak_bytes,
            "rss_bytes": measured.rss_bytes,
        }
    text = paths[1].read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "a &lt;run&gt;" in text


def test_a_report_that_cannot_be_written_is_told(bench, tmp_path):
    meter, batch = watched(bench)
    (tmp_path / "taken.json").mkdir()
    with pytest.raises((RunError, OSError)) as caught:
        write_report(str(tmp_path / "taken"), predicted(bench, batch), meter, title="", budget_bytes=None, plan_hash="")
    assert isinstance(caught.value, RunError)
    assert Path(tmp_path / "taken.json").is_dir()

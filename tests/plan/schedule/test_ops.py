"""A plan's text is its whole content (law 9): it round-trips, its hash is pinned, and anything else is refused by line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Keep, Op, Plan, PlanTextError, parse_plan
from lopt_edge.plan.schedule.segments import LOSSES, MOST_LAYERS, Segment
from tests.plan.plans import make_segments

PLACEMENT = (("embed", "disk"), *((f"layer {i}", "resident") for i in range(4)), ("head", "disk"))
SMALL = make_segments("lopt", n_layers=4, num_segments=2)
PLAN = step_plan("lopt", SMALL, n_micro_batches=2, placement=PLACEMENT)

NUMBER = st.integers(0, 999_999)
WORD = st.text("abcXYZ019_", min_size=1, max_size=8)
LAYERS = st.lists(st.integers(0, 5000), max_size=5, unique=True).map(tuple)
SEGMENTS = st.builds(Segment, NUMBER, NUMBER, NUMBER, st.sampled_from(LOSSES), LAYERS, LAYERS)
OPS = st.builds(
    lambda **fields: Op(**fields),  # a named tuple's other fields would be drawn, too
    kind=st.sampled_from(Kind),
    target=st.integers(-1, 999_999),
    micro_batch=st.integers(-1, 999_999),
    pass_index=st.integers(0, 999),
    adapters=st.just("train") | WORD,
    item=st.sampled_from(["", "input", "pages", "states", "gradients", "boundary", "teacher"]),
    unit=st.sampled_from(["", "layer", "aux"]),
    tier=st.sampled_from(["", "device", "host", "disk"]),
) | st.tuples(st.just(Kind.FORWARD), NUMBER, NUMBER, st.sampled_from(Keep)).map(lambda fields: Op(*fields))
PLANS = st.builds(
    Plan,
    method=st.text("abz09_-", min_size=1, max_size=8),
    n_layers=st.integers(0, MOST_LAYERS),
    n_micro_batches=NUMBER,
    segments=st.lists(SEGMENTS, max_size=4).map(tuple),
    placement=st.lists(st.tuples(WORD | NUMBER.map(lambda i: f"layer {i}"), WORD), max_size=4).map(tuple),
    ops=st.lists(OPS, max_size=12).map(tuple),
    ring=NUMBER,
    tile=NUMBER,
    kind=st.just("") | st.text("abz09_-", min_size=1, max_size=8),
)


@settings(deadline=None)
@given(PLANS)
def test_any_plan_comes_back_from_its_text(plan):
    assert parse_plan(plan.text()) == plan
    assert parse_plan(plan.text()).hash() == plan.hash()


@given(
    method=st.sampled_from(["lopt", "e2e", "frozen"]), n_layers=st.integers(1, 9), k=st.integers(1, 9), n=st.integers(1, 4)
)
def test_the_plans_of_all_methods_come_back(method, n_layers, k, n):
    segments = make_segments(method, n_layers=n_layers, num_segments=min(k, n_layers))
    plan = step_plan(method, segments, n_micro_batches=n)
    assert parse_plan(plan.text()) == plan


def test_the_text_of_a_small_plan():
    plan = step_plan(
        "frozen",
        make_segments("frozen", n_layers=3, num_segments=3, boundary_layers=[1]),
        n_micro_batches=1,
        placement=(("embed", "disk"), ("layer 0", "resident")),
    )
    assert plan.text() == (
        "plan 4 method=frozen layers=3 micro_batches=1 ring=0 tile=1024\n"
        "segment 0 layers=0-0 loss=none\n"
        "segment 1 layers=1-2 loss=task\n"
        "unit embed disk\n"
        "unit layer 0 resident\n"
        "EMBED mb=0\n"
        "FORWARD 0 mb=0 keep=none\n"
        "FORWARD 1 mb=0 keep=input\n"
        "FORWARD 2 mb=0 keep=graph\n"
        "LOSS 1 mb=0\n"
        "BACKWARD 2 mb=0\n"
        "BACKWARD 1 mb=0\n"
        "STEP layer 1\n"
        "STEP layer 2\n"
    )


def test_the_text_of_every_movement():
    ops = (
        Op(Kind.FETCH, 3, unit="layer"), Op(Kind.WAIT, 3, unit="layer"), Op(Kind.EVICT, 3, unit="layer"),
        Op(Kind.SPILL, 3, 0, tier="disk"), Op(Kind.WAIT, 3, 0, item="input"), Op(Kind.RESTORE, 3, 0),
        Op(Kind.EVICT, 3, 0, item="input"), Op(Kind.PAGE_OUT, 3, 0, tier="host"), Op(Kind.WAIT, 3, 0, item="pages"),
        Op(Kind.PAGE_IN, 3, 0), Op(Kind.LOAD, 3, item="states", unit="layer"),
        Op(Kind.STORE, 3, item="states", unit="layer", tier="disk"), Op(Kind.WAIT, 3, item="states", unit="layer"),
        Op(Kind.STORE, 0, item="gradients", unit="aux", tier="host"),
    )  # fmt: skip
    plan = replace(PLAN, ops=ops, ring=2, tile=256)
    assert plan.text().splitlines()[0] == "plan 4 method=lopt layers=4 micro_batches=2 ring=2 tile=256"
    assert plan.text().splitlines()[9:] == [
        "FETCH layer 3",
        "WAIT layer 3",
        "EVICT layer 3",
        "SPILL 3 mb=0 to=disk",
        "WAIT input 3 mb=0",
        "RESTORE 3 mb=0",
        "EVICT input 3 mb=0",
        "PAGE_OUT 3 mb=0 to=host",
        "WAIT pages 3 mb=0",
        "PAGE_IN 3 mb=0",
        "LOAD states layer 3",
        "STORE states layer 3 to=disk",
        "WAIT states layer 3",
        "STORE gradients aux 0 to=host",
    ]
    assert parse_plan(plan.text()) == plan


def test_the_sequential_order_of_lopt():
    """Each segment ends before the next begins; all STEPs come last."""
    ops = [op.text() for op in step_plan("lopt", SMALL, n_micro_batches=1).ops]
    assert ops == [
        "EMBED mb=0",
        "FORWARD 0 mb=0 keep=input",
        "FORWARD 1 mb=0 keep=graph",
        "LOSS 0 mb=0",
        "BACKWARD 1 mb=0",
        "BACKWARD 0 mb=0",
        "FORWARD 2 mb=0 keep=input",
        "FORWARD 3 mb=0 keep=graph",
        "LOSS 1 mb=0",
        "BACKWARD 3 mb=0",
        "BACKWARD 2 mb=0",
        "STEP layer 0",
        "STEP layer 1",
        "STEP aux 0",
        "STEP layer 2",
        "STEP layer 3",
    ]


def test_the_hash_is_pinned():
    """A checkpoint names it: a change of the text form is a change of version."""
    assert PLAN.hash() == "dfcb5ac59c7f78ad"
    changed = replace(PLAN, ops=(*PLAN.ops[:-1], PLAN.ops[-1]._replace(target=0)))
    assert changed.hash() != PLAN.hash()


def test_an_error_shows_the_ops_around_it():
    shown = PLAN.around(5, reach=2).splitlines()
    assert [line[0] for line in shown] == [" ", " ", ">", " ", " "]
    assert shown[2].split() == [">", "5", *PLAN.ops[5].text().split()]
    assert PLAN.around(0).splitlines()[0].startswith(">     0  EMBED")
    assert PLAN.around(len(PLAN.ops) - 1).splitlines()[-1].startswith(">")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, "plan 2 method=lopt layers=4 micro_batches=1 ring=0"),
        (1, "plan 3 method=lopt layers=4 micro_batches=1 ring=0 tile=1024"),
        (1, "plan 4 method=lopt layers=4 micro_batches=1 ring=0"),
        (1, "plan 4 method=lopt layers=10001 micro_batches=1 ring=0 tile=1024"),
        (1, ""),
        (2, "segment 0 layers=0-1 loss=guess"),
        (7, "unit layer"),
        (14, "FORWARD 0 mb=0 keep=everything"),
        (14, "FORWARD zero"),
        (14, "JUMP 3"),
        (14, ""),
        (14, "forward 0 mb=0 keep=none"),
        (14, "BACKWARD 9999999 mb=0"),
        (14, "STEP layer 0 # why not"),
        (14, "STEP head 0"),
        (14, "SPILL 0 mb=0 to=cloud"),
        (14, "WAIT inputs 0 mb=0"),
        (14, "LOAD layer states 3"),
        (14, "FETCH layers 3"),
    ],
)
def test_the_faulty_line_is_named(line, text):
    lines = PLAN.text().splitlines()
    lines[line - 1] = text
    with pytest.raises(PlanTextError, match=f"line {line}:"):
        parse_plan("\n".join(lines))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_damaged_text_is_a_plan_or_a_plan_text_error(data):
    text = list(PLAN.text())
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, len(text) - 1))
        text[position] = data.draw(st.text(max_size=3))
    try:
        plan = parse_plan("".join(text))
    except PlanTextError as error:
        assert "line " in str(error)
        return
    assert parse_plan(plan.text()) == plan


@given(st.text())
def test_any_text(text):
    with pytest.raises(PlanTextError, match="line 1"):
        parse_plan(text)

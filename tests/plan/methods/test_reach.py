"""Schedules of reach: what a text means, which kinds of step it gives, what closes when, and what is refused."""

from __future__ import annotations

import pytest

from lopt_edge.config.rules import method_errors, no_effect_warnings
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError
from lopt_edge.plan.methods import reach
from lopt_edge.plan.methods.course import kept_while_read
from lopt_edge.plan.search.run_plan import summary
from lopt_edge.planning.worst_case import plan_run
from tests.plan.plans import make_course

DEPTH = 6


def made(**settings) -> Config:
    return Config(model="m", data="d", output="o", **settings)


def kinds(n_steps: int, **options) -> str:
    course = make_course("lopt", n_layers=DEPTH, **options)
    return " ".join(course.kind(step, n_steps).name for step in range(1, n_steps + 1))


def test_the_phases_are_those_of_the_text():
    assert kinds(8, open_until=0.25) == "open open" + " closed" * 6
    assert kinds(8, open_until=0.25, local_every=2) == "open open" + " local rest" * 3
    assert kinds(10, reach="0.1:all,0.5:2/3,1:half") == "open" + " last-4" * 4 + " last-3" * 5
    assert kinds(6, reach="0.5:half,1:all") == "last-3 last-3 last-3 open open open", "it may grow, too"
    assert kinds(10, reach="0.8:all..2,1:2") == "open open last-5 last-5 last-4 last-3 last-3 last-2 last-2 last-2"
    assert kinds(3, reach="1:half") == "  ", "one kind of step: frozen"
    auto = make_course("lopt", n_layers=DEPTH, reach="auto")
    assert kinds(6, reach="auto") == kinds(6, reach="0.5:all,1:half") and auto.closes_itself
    assert [auto.kind(step, 6, ended=(2,)).name for step in (2, 3, 6)] == ["open", "last-3", "last-3"]


def test_segments_say_what_rests_and_what_never_trains():
    course = make_course("lopt", n_layers=DEPTH, reach="0.5:5,1:2")
    first, second = ([(s.first, s.last, s.loss) for s in kind.segments] for kind in course.kinds)
    assert first == [(0, 0, "none"), (1, 5, "task")]
    assert second == [(0, 0, "none"), (1, 3, "rest"), (4, 5, "task")]
    assert course.adapted == (1, 2, 3, 4, 5)


def test_what_trains_no_more_is_closed_and_nothing_else():
    def closed(text: str) -> list[int]:
        return [kind.closed for kind in make_course("lopt", n_layers=DEPTH, reach=text).kinds]

    assert closed("0.3:all,0.6:4,1:2") == [0, 2, 4]
    assert closed("0.5:half,1:all") == [0, 0]
    assert closed("0.3:all,0.6:2,1:4") == [0, 2, 2], "layers 2 and 3 come again"
    assert [kind.closed for kind in make_course("lopt", n_layers=DEPTH, open_until=0.5).kinds] == [0, 3]
    assert all(not kind.closed for kind in make_course("lopt", n_layers=DEPTH, open_until=0.5, local_every=1).kinds)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not UNTIL:DEPTH"),
        ("0.5:all", "from above 0 to 1"),
        ("0.5:all,0.5:half,1:half", "must rise"),
        ("0:all,1:half", "from above 0"),
        ("1:0", "is 0 of the model's 6"),
        ("1:7", "is 7 of the model's 6"),
        ("1:4/3", "is 8 of the model's 6"),
        ("1:all...half", "is not UNTIL:DEPTH"),
        (",".join(f"{i / 100}:all" for i in range(1, 101)), "must rise"),
    ],
)
def test_what_is_no_schedule_is_refused(text, what):
    with pytest.raises(InputError, match=what):
        reach.course(text, DEPTH, method="lopt", keeps=True)


def test_two_schedules_at_once_are_refused():
    def wrong(**settings) -> set[str]:
        return {problem.setting for problem in method_errors(made(method="lopt", **settings))}

    assert wrong(reach="1:half", open_until=0.5, open_every=3, num_segments=4, boundary_layers=(3,), local_every=1) == {
        "open_until", "open_every", "num_segments", "boundary_layers", "local_every"
    }  # fmt: skip
    assert wrong(open_until=0.5, open_every=2, boundary="auto") == {"open_every", "boundary"}
    assert wrong(open_until=0.5, pipeline=2) == {"open_until"}
    assert wrong(open_until=0.5, boundary_cache="x", lora_dropout=0.1) == {"boundary_cache"}
    assert wrong(reach="nonsense") == {"reach"} and wrong(open_until=0.5, num_segments=1) == {"open_until"}
    assert wrong(reach="1:half", choose_segments=True) == {"choose_segments"}
    assert wrong(open_until=0.5, num_segments=3, local_every=1) == wrong(open_until=0.5, boundary_cache="x") == set()
    assert made(open_until=0.5).method == made(reach="1:half").method == "lopt"


def test_a_closed_boundary_has_no_local_loss_unless_asked_for():
    assert "local_loss has no effect" in no_effect_warnings(made(open_until=0.5, local_loss="next-token"))[0]
    assert not no_effect_warnings(made(open_until=0.5, local_loss="reconstruct", local_every=1, lr_head=0.1))
    assert "lr_head has no effect" in no_effect_warnings(made(local_loss="next-token", lr_head=0.1))[0]
    assert "closed_cache has no effect" in no_effect_warnings(made(method="lopt", closed_cache=False))[0]


def test_a_plan_says_what_each_kind_of_step_takes():
    found = plan_run("qwen2.5-0.5b", open_until=0.25, epochs=2, grad_accum=1, max_seq_len=256, device_memory="8GB")
    opened, filled, read = found.kinds
    assert [(kind.name, kind.share) for kind in found.kinds] == [
        ("open", 0.25), ("closed-fill", 0.5), ("closed-read", 0.25)
    ]  # fmt: skip
    assert found.peak_bytes["device"] == opened.device_bytes > filled.device_bytes >= read.device_bytes
    assert read.step_seconds < filled.step_seconds < 0.8 * opened.step_seconds
    mean = sum(kind.share * kind.step_seconds for kind in found.kinds)
    assert abs(found.step_seconds / mean - 1) < 0.01 and any("closed-read (25% of" in line for line in summary(found))


def test_a_boundary_is_kept_where_a_later_epoch_reads_it():
    def names(epochs: float, **options) -> list[str]:
        course = make_course("lopt", n_layers=DEPTH, **options)
        return [kind.name for kind in kept_while_read(course, epochs=epochs).kinds]

    assert names(1, open_until=0.25) == names(1.3, open_until=0.25) == ["open", "closed"]
    assert names(2, open_until=0.25) == ["open", "closed-fill", "closed-read"]
    assert names(2, open_until=0.25, closed_cache=False) == ["open", "closed"]
    assert names(3, reach="0.3:all,0.5:4,1:2") == ["open", "last-4", "last-2-fill", "last-2-read"]
    assert names(9, open_until=0.25, local_every=1) == ["open", "local"], "it still changes"
    shares = kept_while_read(make_course("lopt", n_layers=DEPTH, open_until=0.25), epochs=2).shares
    assert shares == (0.25, 0.5, 0.25), "of two epochs one fills it"

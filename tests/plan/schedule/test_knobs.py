"""The memory knobs: settings by layer as people write them, the ring of buffers, where each unit's weights lie."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.plan.schedule.knobs import ACTIVATIONS, WEIGHTS, default_knobs, per_layer, placement_of
from tests.plan.plans import make_knobs

R, H, D = WEIGHTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("disk", (D, D, D, D)),
        (" host ", (H, H, H, H)),
        ("disk,0-1=resident", (R, R, D, D)),
        ("disk, 3=host", (D, D, D, H)),
        ("disk,0-3=host", (H, H, H, H)),
        ("disk,0=resident,2-3=host", (R, D, H, H)),
        ("disk,0-2=resident,1=host", (R, H, R, D)),  # the later exception holds
        ("resident,00-01=disk", (D, D, R, R)),
    ],
)
def test_reads(text, expected):
    assert per_layer(text, WEIGHTS, n_layers=4, where="weights") == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "'' is unknown"),
        ("auto", "'auto' is unknown"),
        ("Disk", "'Disk' is unknown"),
        ("page", "'page' is unknown"),
        ("0-1=disk", "'0-1=disk' is unknown"),  # what holds for the other layers is missing
        ("disk,", "'' is not LAYERS=CHOICE"),
        ("disk,resident", "'resident' is not LAYERS=CHOICE"),
        ("disk,0-1", "'0-1' is not LAYERS=CHOICE"),
        ("disk,0-1=keep", "'0-1=keep' is not LAYERS=CHOICE"),
        ("disk,0-=resident", "not LAYERS=CHOICE"),
        ("disk,-1=resident", "not LAYERS=CHOICE"),
        ("disk,0..1=resident", "not LAYERS=CHOICE"),
        ("disk;0-1=resident", "is unknown"),
        ("disk,4=resident", "beyond 0-3"),
        ("disk,2-4=resident", "beyond 0-3"),
        ("disk,2-1=resident", "beyond 0-3"),
        ("disk,0-99999=resident", "beyond 0-3"),
        ("disk,0-100000=resident", "not LAYERS=CHOICE"),
        ("x" * 9000, "is unknown"),
    ],
)
def test_refuses(text, what):
    with pytest.raises(InputError) as caught:
        per_layer(text, WEIGHTS, n_layers=4, where="weights")
    assert what in caught.value.what and caught.value.where == "weights"
    assert all(choice in caught.value.fix for choice in WEIGHTS), "the accepted forms are shown"
    assert len(str(caught.value)) < 200


@given(st.text("disk,host=0123-6 resident", max_size=20), st.integers(1, 6))
def test_any_text_is_one_choice_a_layer_or_an_input_error(text, n_layers):
    with suppress(InputError):
        found = per_layer(text, WEIGHTS, n_layers=n_layers, where="weights")
        assert len(found) == n_layers and set(found) <= set(WEIGHTS)


@pytest.mark.parametrize("choices", [WEIGHTS, ACTIVATIONS])
def test_the_form_in_the_advice_is_read(choices):
    with pytest.raises(InputError) as caught:
        per_layer("what", choices, n_layers=8, where="here")
    advised = caught.value.fix.rpartition("e.g. ")[2]
    assert len(set(per_layer(advised, choices, n_layers=8, where="here"))) == 2


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_the_ring_holds_the_computing_layer_and_those_on_their_way(prefetch):
    assert make_knobs(4, prefetch=prefetch).ring == 0, "resident layers need no buffer"
    assert make_knobs(4, weights=(R, R, D, R), prefetch=prefetch).ring == prefetch + 1


def test_every_unit_has_a_place():
    assert placement_of(make_knobs(3, weights=(R, H, D), head="resident")) == (
        ("embed", "disk"),
        ("layer 0", "resident"),
        ("layer 1", "host"),
        ("layer 2", "disk"),
        ("head", "resident"),
    )


@pytest.mark.parametrize(
    ("device", "head", "pieces"), [("cpu", "disk", {}), ("cuda", "resident", {"mlp_block": 64, "mlp_tile": 4096})]
)
def test_the_default_holds_all_on_the_device(device, head, pieces):
    config = {"model_type": "llama", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 64,
              "num_hidden_layers": 3, "num_attention_heads": 4}  # fmt: skip
    knobs = default_knobs(facts_from_config(config, where="here"), device)
    assert knobs == make_knobs(3, head=head, **pieces)
    assert (knobs.saved_inputs, knobs.states, knobs.gradients, knobs.apply) == ("device", "device", "device", "step")

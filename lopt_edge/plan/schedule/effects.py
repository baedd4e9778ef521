"""The ops, one row each: what an op does, makes, frees, computes with and moves.

The rule: whoever interprets a plan reads this table, and none has its own idea of an op: the validator (validate.py,
validate_moves.py), the timeline and the clock (plan/costs), cuts.py, the passes, the executor's cuts and the diagnosis.
So a new op is a `Kind` and a row here, its writer (build.py or a pass) and its runner (run/step/executor.py). A row names
formulas and rules (`workspace`, `seconds`, `rule`) that live with their interpreter; an op that needs a new one adds it
there.

No bytes and no seconds here: those are plan/costs. What a plan says in words is ops.py's; each row `says` its sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from typing import Literal


class Kind(StrEnum):
    """The kinds of op, as a plan's text writes them."""

    EMBED = "EMBED"
    FORWARD = "FORWARD"
    LOSS = "LOSS"
    BACKWARD = "BACKWARD"
    STEP = "STEP"
    READ = "READ"
    WRITE = "WRITE"
    ALIGN = "ALIGN"
    HOLD = "HOLD"
    AVERAGE = "AVERAGE"
    RECV = "RECV"
    SEND = "SEND"
    AGREE = "AGREE"
    REDUCE = "REDUCE"
    FETCH = "FETCH"
    WAIT = "WAIT"
    EVICT = "EVICT"
    SPILL = "SPILL"
    RESTORE = "RESTORE"
    PAGE_OUT = "PAGE_OUT"
    PAGE_IN = "PAGE_IN"
    LOAD = "LOAD"
    STORE = "STORE"


REDUCED = "reduced"  # the item of a sum over ranks
ITEMS = ("input", "pages", "states", "gradients", "boundary", "teacher", "held", REDUCED)  # what an op's text may name
GROUP_ITEMS = ("states", "gradients")  # of a parameter group


@dataclass(frozen=True)
class Thing:
    """A thing that lives between ops: there is one of it in a step, one a (micro-batch, layer), one a parameter group, or
    one for each boundary in flight; `source`: one for the layer whose keys and values the op's layer attends to; `layers`:
    those of all layers.

    `shares`: it is the same storage as that thing was before the op. `when`: the Plan's method that says of an op whether
    the thing is concerned; empty: always. `takes`: what its bytes are those of (as many as hidden states, say; empty: none
    of its own), `counts_as`: the timeline's category.
    """

    name: str
    per: Literal["step", "layer", "layers", "source", "group", "boundary"] = "step"
    shares: str = ""
    when: str = ""
    takes: Literal["hidden", "layer context", "graph", "states", "gradients", "keys", "key gradients", "exchange", ""] = (
        "hidden"
    )
    counts_as: str = "activations"


@dataclass(frozen=True)
class Effect:
    """The row of one kind of op: all that others ask about it.

    `role`: arithmetic in the order of the list (`compute`), or beside it (`beside`, which no movement is timed by), a
    movement up or down, its end, a sum over ranks (`exchange`), or a copy that is given back. `says`: the op in words.
    `uses`: whose weights, states and gradients it computes with. `trains`: the group whose gradients it adds to, where
    `Plan.trains` says so. `enters`: a micro-batch begins with it. `makes`, `frees`: in this order. `moves`: what a movement
    moves (`group`: what its item says), `until_wait`: things whose copy on the device is free at the movement's WAIT.
    `rule`, `workspace`, `seconds`: the names of a check in validate.py, a formula in timeline.py and one in seconds.py;
    empty: nothing to check, no bytes on top of what it makes, no time.
    """

    role: Literal["compute", "beside", "exchange", "up", "down", "wait", "evict"]
    says: str
    uses: Literal["", "embed", "layer", "head", "group"] = ""
    trains: Literal["", "layer", "aux"] = ""
    enters: bool = False
    makes: tuple[Thing, ...] = ()
    frees: tuple[Thing, ...] = ()
    moves: Literal["", "weights", "input", "pages", "group"] = ""
    until_wait: tuple[str, ...] = ()
    rule: str = ""
    workspace: str = ""
    seconds: str = ""


HIDDEN, GRAD, TEACHER, HELD = (Thing(name) for name in ("hidden", "grad", "teacher", "held"))
CONTEXT = Thing("layer context", takes="layer context")
INPUT = Thing("input", "layer", counts_as="saved inputs")
GRAPH, PAGES = Thing("graph", "layer", takes="graph"), Thing("pages", "layer", takes="")
GRAPH_INPUT, ALIGNED = Thing("graph input", "layer"), Thing("aligned", "layer")
STATES = Thing("states", "group", takes="states", counts_as="optimizer")
GRADIENTS = Thing("gradients", "group", takes="gradients", counts_as="gradients")
ADDED = replace(GRADIENTS, when="trains")
SUM = Thing(REDUCED, "group", takes="exchange", counts_as="gradients")
KEPT = (
    Thing("target", shares="hidden", when="holds_target", counts_as="saved inputs"),
    replace(INPUT, shares="hidden", when="keeps_input"),
    replace(GRAPH, when="keeps_graph"),
    replace(GRAPH_INPUT, shares="hidden", when="keeps_graph"),
    replace(PAGES, when="keeps_pages"),
)
BEGUN = (HIDDEN, CONTEXT)
# Of layers whose keys and values later layers attend to, in models that have such.
KEYS, KEY_GRADIENTS = Thing("keys", "layer", takes="keys"), Thing("key gradients", "source", takes="key gradients")
ALL_KEYS = (replace(KEYS, per="layers"),)

EFFECTS: dict[tuple[Kind, str], Effect] = {
    (Kind.EMBED, ""): Effect(
        "compute", "hidden states from token ids", uses="embed", enters=True, makes=BEGUN, frees=ALL_KEYS,
        rule="enter", workspace="embed", seconds="embed"),
    (Kind.FORWARD, ""): Effect(
        "compute", "run a layer; keep nothing | its input | its autograd graph | its graph, movable", uses="layer",
        makes=(*KEPT, HIDDEN, KEYS), rule="forward", workspace="forward", seconds="forward"),
    (Kind.LOSS, ""): Effect(
        "compute", "the loss of a segment: its gradient with respect to the segment's output", uses="head", trains="aux",
        makes=(GRAD, ADDED), frees=(Thing("target"), replace(HIDDEN, when="is_last_run"),
                                        replace(TEACHER, when="is_last_run")),
        rule="loss", workspace="loss", seconds="loss"),
    (Kind.BACKWARD, ""): Effect(
        "compute", "gradient through a layer (from its graph, or recomputed from its saved input)", uses="layer",
        trains="layer", makes=(GRAD, ADDED, KEY_GRADIENTS),
        frees=(INPUT, GRAPH, GRAPH_INPUT, PAGES, ALIGNED, replace(KEY_GRADIENTS, per="layer"),
               replace(GRAD, when="ends_gradient")),
        rule="backward", workspace="backward", seconds="backward"),
    (Kind.STEP, ""): Effect(
        "compute", "clip and update one parameter group (a layer's adapters, or a segment's aux head)", uses="group",
        frees=(GRADIENTS, SUM), rule="step", workspace="update", seconds="update"),
    (Kind.READ, "boundary"): Effect(
        "compute", "hidden states from the cache, as they enter a layer: instead of EMBED and the layers before",
        enters=True, makes=BEGUN, frees=ALL_KEYS, rule="enter", workspace="cache read", seconds="cache read"),
    (Kind.READ, "held"): Effect(
        "compute", "the hidden states that were held begin the next pass: instead of EMBED and the layers before",
        enters=True, makes=(replace(HIDDEN, shares="held"),), frees=(HELD,), rule="take held"),
    (Kind.READ, "teacher"): Effect(
        "compute", "a teacher's last hidden states, from their cache", makes=(TEACHER,), rule="teacher",
        workspace="cache", seconds="cache read"),
    (Kind.WRITE, "boundary"): Effect(
        "compute", "the hidden states that enter a layer go to the cache (and go on as it holds them)", makes=(HIDDEN,),
        rule="next layer", workspace="cache", seconds="cache write"),
    (Kind.ALIGN, ""): Effect(
        "compute", "a layer's output is drawn to the teacher's: a gradient that waits for its BACKWARD", makes=(ALIGNED,),
        frees=(TEACHER,), rule="align", workspace="align", seconds="align"),
    (Kind.HOLD, ""): Effect(
        "compute", "the hidden states that enter a layer are held for the next pass",
        makes=(replace(HELD, shares="hidden"),), rule="hold"),
    (Kind.AVERAGE, ""): Effect(
        "beside", "the average of a layer's adapters takes in their values of after the step", rule="average",
        seconds="average"),
    (Kind.RECV, ""): Effect(
        "compute", "hidden states from the process before, as they enter a layer: instead of EMBED", enters=True,
        makes=BEGUN, rule="enter", workspace="receive", seconds="arrive"),
    (Kind.SEND, ""): Effect(
        "compute", "the hidden states that enter a layer go to the process after this one",
        makes=(Thing("sent", "boundary", shares="hidden"),), rule="send", seconds="send"),
    (Kind.AGREE, ""): Effect(
        "compute", "whether all processes of a pipeline, or all ranks, found finite numbers: only then come STEPs",
        frees=(Thing("sent", "boundary"),), rule="agree"),
    (Kind.REDUCE, ""): Effect(
        "exchange", "the sum of a group's gradients over all ranks begins", uses="group", makes=(GRADIENTS, SUM),
        until_wait=(REDUCED,), rule="reduce", seconds="exchange"),
    (Kind.FETCH, ""): Effect("up", "a layer's weights come into a buffer of the device", moves="weights"),
    (Kind.WAIT, ""): Effect("wait", "a movement ends here at the latest"),
    (Kind.WAIT, REDUCED): Effect("wait", "the sum of a group's gradients over all ranks has come, and its norm is taken",
                                 workspace="norm"),
    (Kind.EVICT, ""): Effect("evict", "that buffer of a layer's weights is free again", moves="weights"),
    (Kind.EVICT, "input"): Effect("evict", "a saved input's device copy goes, the one below stays", moves="input",
                                  frees=(INPUT,)),
    (Kind.SPILL, ""): Effect("down", "a layer's saved input goes down", moves="input", until_wait=("input",)),
    (Kind.RESTORE, ""): Effect("up", "a saved input comes back", moves="input", makes=(INPUT,)),
    (Kind.PAGE_OUT, ""): Effect("down", "the tensors that autograd saved in a layer go down", moves="pages",
                                until_wait=("graph", "graph input")),
    (Kind.PAGE_IN, ""): Effect("up", "the tensors that autograd saved come back", moves="pages", makes=(GRAPH,)),
    (Kind.LOAD, "states"): Effect("up", "a group's optimizer states come up", moves="group",
                                  makes=(STATES,)),
    (Kind.LOAD, "gradients"): Effect("up", "a group's gradients come up", moves="group",
                                     makes=(GRADIENTS,)),
    (Kind.STORE, "states"): Effect("down", "a group's optimizer states go down", moves="group", until_wait=("states",)),
    (Kind.STORE, "gradients"): Effect("down", "a group's gradients go down", moves="group", until_wait=("gradients",)),
}  # fmt: skip
_OF_KIND = {kind: next(row for (each, _), row in EFFECTS.items() if each is kind) for kind in Kind}


@cache  # a plan asks for each of its ops several times; there are few kinds and items
def effect_of(kind: Kind, item: str = "") -> Effect:
    """The row of an op. An item that its kind does not know gets a row of the kind: the validator refuses such an op."""
    return EFFECTS.get((kind, item)) or EFFECTS.get((kind, "")) or _OF_KIND[kind]


COMPUTE = frozenset(kind for kind in Kind if _OF_KIND[kind].role == "compute")
RUNS_LAYER = frozenset(kind for kind in Kind if _OF_KIND[kind].uses == "layer")
UP, DOWN = (frozenset(kind for kind in Kind if _OF_KIND[kind].role == role) for role in ("up", "down"))

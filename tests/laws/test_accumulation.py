"""Law 5: a window of micro-batches, however uneven, has the gradients of the one big batch; padding has none.

Exact in real numbers; in fp32 the sums are taken in another order. Losses are compared as they are logged: the task loss
per supervised token of the window, the local losses per token and element, before their weight.
"""

from __future__ import annotations

import pytest
import torch

from lopt_edge.data import MicroBatch
from lopt_edge.run.step.batches import Batch, make_batch
from tests.laws.bench import LOCAL_WEIGHT, Bench, make_bench

ROWS = [torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (17, 5, 9, 12, 3)]
PROMPTS = [2, 1, 8, 3, 1]  # tokens that are not learned: the third row has one target only
CASES = [("e2e", 1), ("lopt", 2), ("lopt", 3), ("frozen", 2)]


def batch_of(rows: list[int], *, pad_id: int = 0) -> Batch:
    chosen = [ROWS[i] for i in rows]
    longest = max(map(len, chosen))
    targets = [[-100 if t + 1 < PROMPTS[i] else ROWS[i][t + 1] for t in range(len(ROWS[i]) - 1)] for i in rows]
    return make_batch(
        MicroBatch(
            input_ids=[row + [pad_id] * (longest - len(row)) for row in chosen],
            targets=[row + [-100] * (longest - len(row)) for row in targets],
            lengths=tuple(map(len, chosen)),
        ),
        torch.device("cpu"),
    )


def run_window(folder, method: str, k: int, groups: list[list[int]], **changes) -> tuple[Bench, dict[str, torch.Tensor]]:
    bench = make_bench(folder, method=method, num_segments=k, n_micro_batches=len(groups))
    return bench, bench.gradients([batch_of(group, **changes) for group in groups])


def assert_same(ours, theirs) -> None:
    (bench, gradients), (other, expected) = ours, theirs
    assert bench.result.totals == other.result.totals
    assert bench.result.loss == pytest.approx(other.result.loss, rel=1e-5)
    assert bench.result.local_loss == pytest.approx(other.result.local_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0, f"{name} is zero: the test would prove nothing"
        assert (gradient - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


@pytest.mark.parametrize(("method", "k"), CASES)
@pytest.mark.parametrize("groups", [[[0], [1], [2], [3], [4]], [[0, 2], [1, 4], [3]], [[4, 1, 2], [0, 3]]], ids=str)
def test_uneven_micro_batches_equal_one_batch(four_bit, method, k, groups):
    folder = four_bit("llama")
    assert_same(run_window(folder, method, k, groups), run_window(folder, method, k, [[0, 1, 2, 3, 4]]))


@pytest.mark.parametrize(("method", "k"), CASES)
def test_a_short_last_window_is_weighted_by_its_own_tokens(four_bit, method, k):
    """A window of two where the others have five: divided by its own totals, not by the usual number."""
    folder = four_bit("llama")
    short = run_window(folder, method, k, [[3], [1]])
    assert_same(short, run_window(folder, method, k, [[1, 3]]))
    assert short[0].result.totals.tokens == 17
    assert short[0].result.totals.supervised == (12 - 3) + (5 - 1)


def test_the_mean_is_per_token_not_per_micro_batch(four_bit):
    """Losses of single rows, weighted by their targets, give the window's loss."""
    folder = four_bit("llama")
    singles = [run_window(folder, "lopt", 2, [[i]])[0].result for i in range(5)]
    window = run_window(folder, "lopt", 2, [[i] for i in range(5)])[0].result
    task = sum(one.loss * one.totals.supervised for one in singles) / window.totals.supervised
    local = sum(one.local_loss[0] * one.totals.tokens for one in singles) / window.totals.tokens
    assert window.loss == pytest.approx(task, rel=1e-5)
    assert window.local_loss[0] == pytest.approx(local, rel=1e-5)
    assert window.loss != pytest.approx(sum(one.loss for one in singles) / 5, rel=1e-3)


@pytest.mark.parametrize(("method", "k"), CASES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_stands_in_the_padding_changes_nothing(four_bit, family, method, k):
    folder = four_bit(family)
    one = run_window(folder, method, k, [[0, 1, 2]])
    other = run_window(folder, method, k, [[0, 1, 2]], pad_id=77)
    assert one[0].result == other[0].result
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


def test_the_local_losses_are_averaged_then_weighted(four_bit):
    """With three local losses each has a third of lambda: the logged losses stay without any weight."""
    folder = four_bit("llama")
    bench, gradients = run_window(folder, "lopt", 4, [[0]])
    assert len(bench.result.local_loss) == 3
    head = bench.heads[0]
    batch = batch_of([0])
    embedded = bench.model.embed(batch.ids_BT)
    with torch.no_grad():
        hidden = bench.model.run_layer(0, embedded, bench.model.layer_context(embedded))
    mean = (head.up(head.activation(head.down(head.norm(hidden)))) - embedded).square().mean()
    assert bench.result.local_loss[0] == pytest.approx(mean.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(mean * LOCAL_WEIGHT / 3, head.up.bias)
    torch.testing.assert_close(gradients["head 0 up.bias"], expected, rtol=1e-4, atol=1e-7)


def test_a_batch_without_targets_teaches_the_task_nothing(four_bit):
    """A micro-batch may hold prompts only (truncated replies): no NaN, and no division by zero."""
    rows = make_batch(MicroBatch([ROWS[0]], [[-100] * 17], (17,)), torch.device("cpu"))
    bench = make_bench(four_bit("llama"), method="lopt", num_segments=2)
    gradients = bench.gradients([rows])
    assert bench.result.loss == 0.0
    assert bench.result.local_loss[0] > 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(gradient.abs().max() == 0 for name, gradient in gradients.items() if name.startswith(("layer 2", "layer 3")))

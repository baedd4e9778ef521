"""Cards: every figure plausible, every way in which people write a name found, and no name that means two cards."""

from __future__ import annotations

import re

import pytest

from lopt_edge.plan.facts.cards import CARDS, GIB, TERA, find_card, near_cards


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_figures(card):
    assert 5 * GIB < card.memory_bytes < 200 * GIB
    assert 40e9 < card.memory_bandwidth < 10e12
    assert card.source
    if card.kind in ("apple", "cpu"):
        assert card.pcie_bandwidth == 0
        return
    assert 12e9 < card.pcie_bandwidth < 51e9
    assert 1 * TERA < card.fp32_flops < 110 * TERA
    if card.name.startswith("GTX"):
        assert card.bf16_flops == 0 and not card.has_bf16
    else:
        assert 2 <= round(card.bf16_flops / card.fp32_flops, 6) <= 30
    assert card.has_bf16 == (card.name != "T4" and not re.match(r"GTX|RTX 20", card.name))


def test_geforce_halves_fp32_accumulation():
    assert CARDS["RTX 4090"].bf16_flops == pytest.approx(165.2 * TERA, rel=1e-3)
    assert CARDS["RTX 3090"].bf16_flops == pytest.approx(71.2 * TERA, rel=1e-2)
    assert CARDS["RTX 2080 Ti"].bf16_flops == pytest.approx(53.8 * TERA, rel=1e-2)
    assert CARDS["RTX 4060 Laptop"].bf16_flops == pytest.approx(29.1 * TERA, rel=1e-2)


def test_less_memory_than_the_box_says():
    sold = {"RTX 3060": 12, "RTX 4090": 24, "RTX 5090": 32, "RTX 4060 Laptop": 8, "RTX 3090 Ti": 24, "T4": 16, "L4": 24}
    for name, gib in sold.items():
        assert 0.9 * gib * GIB < CARDS[name].memory_bytes < gib * GIB, name


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_found_by_its_name(card):
    for name in (card.name, card.name.lower(), card.name.replace(" ", "-"), card.name.replace(" ", "")):
        assert find_card(name) is card
    assert find_card(f"NVIDIA GeForce {card.name}") is card


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rtx4090", "RTX 4090"),
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("rtx-4060-laptop", "RTX 4060 Laptop"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX 4060 Laptop"),
        ("RTX 3070 mobile", "RTX 3070 Laptop"),
        ("4060ti", "RTX 4060 Ti"),
        ("4060 Ti 16 GiB", "RTX 4060 Ti 16GB"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("1660 super", "GTX 1660 SUPER"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Apple M3 Max", "M3 Max"),
        ("cpu", "CPU"),
    ],
)
def test_forgiving(name, found):
    card = find_card(name)
    assert card is not None and card.name == found


@pytest.mark.parametrize(
    "name", ["", "  ", "rtx", "gpu", "NVIDIA", "RTX 9090", "RTX 3060 8GB", "a100", "16GB", "RTX 4090 48GB"]
)
def test_not_found(name):
    assert find_card(name) is None


def test_near():
    assert "RTX 3060" in near_cards("rtx 3060 8gb")
    assert set(near_cards("a100")) & {"A100 40GB", "A100 80GB"}
    assert near_cards("rtx 9090")[0].endswith("090")
    assert near_cards("a banana") == []
    assert len(set(near_cards("rtx 40"))) == len(near_cards("rtx 40"))

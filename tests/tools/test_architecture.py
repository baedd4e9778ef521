"""The picture of the rooms: it is that of the imports as they are, and the graph behind it is read rightly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.draw_architecture import circles, levels, picture, reduced, room_graph

pytestmark = pytest.mark.usefixtures("warm_children")

ROOT = Path(__file__).parents[2]
FILES = {
    "lopt_edge/__init__.py": "if TYPE_CHECKING:\n    from lopt_edge.top.main import run\n",
    "lopt_edge/errors.py": "import json\nimport quant\n",
    "lopt_edge/top/__init__.py": "",
    "lopt_edge/top/main.py": "from lopt_edge.low import one, two\nfrom lopt_edge import errors\n",
    "lopt_edge/low/__init__.py": "",
    "lopt_edge/low/one.py": "def late():\n    from ..errors import Fault\n    return Fault\n",
    "lopt_edge/low/two.py": "from .one import late\nfrom lopt_edge.low.deep.three import x\n",
    "lopt_edge/low/deep/__init__.py": "",
    "lopt_edge/low/deep/three.py": "import quant.sizes\n",
    "quant/__init__.py": "",
    "quant/sizes.py": "",
}


def house(folder: Path, **changed: str) -> Path:
    for name, text in {**FILES, **changed}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_document_shows_the_imports_as_they_are():
    done = subprocess.run(
        [sys.executable, "tools/draw_architecture.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_import_counts_wherever_it_stands(tmp_path):
    assert room_graph(house(tmp_path)) == {
        "public names": {"top"},
        "top": {"low", "errors"},
        "low": {"errors", "low/deep"},
        "low/deep": {"quant"},
        "errors": {"quant"},
        "quant": set(),
    }


def test_an_arrow_that_follows_from_others_is_not_drawn(tmp_path):
    graph = room_graph(house(tmp_path))
    assert reduced(graph) == [
        ("errors", "quant"), ("low", "errors"), ("low", "low/deep"), ("low/deep", "quant"), ("public names", "top"),
        ("top", "low"),
    ]  # fmt: skip
    assert circles(graph) == []
    assert levels(graph) == {"public names": 4, "top": 3, "low": 2, "low/deep": 1, "errors": 1, "quant": 0}


def test_a_circle_is_named_and_all_its_arrows_are_drawn(tmp_path):
    graph = room_graph(
        house(tmp_path, **{"lopt_edge/low/deep/three.py": "from lopt_edge.top.main import run\nimport quant\n"})
    )
    assert circles(graph) == [("low", "low/deep", "top")]
    assert {("low/deep", "top"), ("top", "low"), ("low", "low/deep")} <= set(reduced(graph))
    assert levels(graph)["top"] == levels(graph)["low"] == levels(graph)["low/deep"] == 2
    assert "low_deep ==> top" in picture(graph) and "low <-> low/deep <-> top" in picture(graph)

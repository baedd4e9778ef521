"""Power cuts at every moment of a run: after exit code 0 the result is whole, before it the run goes on where it was saved.

One short run is recorded (crash_disk.py), and of each moment several disks are made on which what was not synced is lost,
in part or all. Each is held to it:
- with run.json it is a finished run's: every file of the result as it was written, so other programs load it
- without, `resume` finds a whole checkpoint, none older than what was durable, or nothing was and a new run may begin there

By default some of the others are resumed to their end, to the undisturbed run's bytes; `-m long` resumes every one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lopt_edge import finetune
from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, MANIFEST
from lopt_edge.training.checkpoint.output_folder import EVENTS_NAME, RUN_NAME, check_output
from lopt_edge.training.checkpoint.resume import find_start
from lopt_edge.training.session.progress import Progress
from tests.training.crash_disk import CrashDisk, lay_out_image, name_of_image
from tools.tiny_runs import log_of, make_config, make_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
OUT = "runs/out"
N_RESUMED = 6
Image = dict[str, bytes | None]


@dataclass
class Recorded:
    """A run, the disk at each of its moments, and what it left."""

    config: Config
    disk: CrashDisk
    log: list[dict[str, Any]]

    @property
    def whole(self) -> Image:
        """The disk without a power cut."""
        return list(self.disk.images(at=len(self.disk.moments) - 1, seeds=range(0)))[1]

    def images(self, *, a_moment: int) -> Iterator[tuple[int, Image]]:
        """The different images, with their moment."""
        seen = set()
        for at in range(len(self.disk.moments)):
            for image in self.disk.images(at=at, seeds=range(a_moment)):
                if (name := name_of_image(image)) not in seen:
                    seen.add(name)
                    yield at, image

    def newest_durable(self, at: int) -> int:
        """The step of the newest checkpoint that no power cut can take away any more."""
        found = re.compile(rf"{OUT}/{CHECKPOINTS}/step-(\d+)/{MANIFEST}")
        steps = [
            int(match[1]) for path in next(self.disk.images(at=at, seeds=range(0))) if (match := found.fullmatch(path))
        ]
        return max(steps, default=-1)


def chat(number: int) -> list[dict[str, str]]:
    reply = "yes" if number % 2 else "no, never"
    return [{"role": "user", "content": f"Is it {number}?"}, {"role": "assistant", "content": reply}]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Recorded:
    root = tmp_path_factory.mktemp("crash")
    model = make_model(root / "model" / "tiny")
    (root / "t.jinja").write_text(TEMPLATE)
    (root / "disk").mkdir()
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat(number)}) + "\n" for number in range(10)))
    config = make_config(
        model, root, output=f"disk/{OUT}", max_steps=3, save_every=1, eval_fraction=0.2, eval_every=1, keep_best=True,
        data=str(root / "chats.jsonl"), chat_template=str(root / "t.jinja"),
    )  # fmt: skip
    disk = CrashDisk(root / "disk")
    with pytest.MonkeyPatch.context() as patch, disk.recording(patch):
        finetune(config)
    return Recorded(config, disk, log_of(config))


class Said(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def settings_of(image: Path) -> Config:
    return load_config(image / OUT / "config.yaml", {"output": str(image / OUT), "resume": "auto"})


def is_sound(recorded: Recorded, at: int, image: Image, folder: Path) -> str:
    """ "finished", "goes on" or "new"; fails for any other state of a disk."""
    lay_out_image(image, folder)
    if f"{OUT}/{RUN_NAME}" in image:
        for path, raw in recorded.whole.items():
            if "/checkpoints" not in path:
                assert image[path] == raw, f"moment {at}: {path} is not what the finished run wrote"
        return "finished"
    promised = recorded.newest_durable(at)
    if f"{OUT}/config.yaml" not in image:
        assert promised < 0
        check_output(folder / OUT)
        return "new"
    _, start, warnings = find_start(settings_of(folder))
    assert warnings == [] and (start.state.steps if start else -1) >= promised, f"moment {at}"
    return "goes on"


def test_no_image_is_unusable(recorded, tmp_path):
    found = [is_sound(recorded, at, image, tmp_path / str(n)) for n, (at, image) in enumerate(recorded.images(a_moment=3))]
    assert len(found) >= 100, "else the run has too few moments"
    assert {kind: found.count(kind) > 0 for kind in ("finished", "goes on", "new")} == dict.fromkeys(set(found), True)
    print({kind: found.count(kind) for kind in set(found)}, f"at {len(recorded.disk.moments)} moments")


def test_after_exit_0_nothing_is_lost(recorded, tmp_path):
    """Forty ways to forget, at the last moment: all give the result, and peft and transformers load it."""
    from peft import LoraConfig
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    last = len(recorded.disk.moments) - 1
    images = {name_of_image(image): image for image in recorded.disk.images(at=last, seeds=range(40))}
    for name, image in images.items():
        assert is_sound(recorded, last, image, tmp_path / name) == "finished"
        folder = tmp_path / name / OUT
        assert LoraConfig.from_pretrained(str(folder)).r == 4
        assert load_file(folder / ADAPTER_NAME)
        assert AutoTokenizer.from_pretrained(str(folder)).chat_template == TEMPLATE
        assert all(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def goes_on(recorded: Recorded, folder: Path) -> None:
    said = Said()
    assert finetune(settings_of(folder), said) is not None
    out = folder / OUT
    assert (out / ADAPTER_NAME).read_bytes() == recorded.whole[f"{OUT}/{ADAPTER_NAME}"]
    assert log_of(settings_of(folder)) == recorded.log
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == recorded.whole[f"{OUT}/{name}"]
    assert all(json.loads(line) for line in (out / EVENTS_NAME).read_text().splitlines())


def resumable(recorded: Recorded) -> list[Image]:
    images = (image for _, image in recorded.images(a_moment=1))
    return [image for image in images if f"{OUT}/config.yaml" in image and f"{OUT}/{RUN_NAME}" not in image]


def test_some_are_resumed_to_the_same_bytes(recorded, tmp_path):
    images = resumable(recorded)
    for number in range(N_RESUMED):
        lay_out_image(images[number * len(images) // N_RESUMED], tmp_path / str(number))
        goes_on(recorded, tmp_path / str(number))


@pytest.mark.long
def test_all_are_resumed_to_the_same_bytes(recorded, tmp_path):
    images = resumable(recorded)
    for number, image in enumerate(images):
        lay_out_image(image, tmp_path / str(number))
        goes_on(recorded, tmp_path / str(number))
    print(f"{len(images)} images resumed")


def finished_copy(recorded: Recorded, root: Path) -> Path:
    lay_out_image(recorded.whole, root / "whole")
    return root / "whole"


def test_a_damaged_result_is_said_and_written_again(recorded, tmp_path):
    """What versions before this one left after a power cut: run.json there, the configuration and tokenizer empty."""
    folder = finished_copy(recorded, tmp_path)
    for name in ("adapter_config.json", "tokenizer.json"):
        (folder / OUT / name).write_bytes(b"")
    said = Said()
    finetune(settings_of(folder), said)
    assert [name for name in ("adapter_config.json", "tokenizer.json") if any(name in text for text in said.warnings)] == [
        "adapter_config.json", "tokenizer.json"]  # fmt: skip
    for name in ("adapter_config.json", "tokenizer.json", ADAPTER_NAME):
        assert (folder / OUT / name).read_bytes() == recorded.whole[f"{OUT}/{name}"]


@pytest.mark.parametrize("tail", [b'{"event": "x", "st', b"\x00" * 300, b'{"a": 1}\n\x00\x00\n'])
def test_a_torn_event_log_is_repaired_and_said(recorded, tmp_path, tail):
    folder = finished_copy(recorded, tmp_path)
    log = folder / OUT / EVENTS_NAME
    log.write_bytes(b'{"event": "first"}\n' + tail)
    said = Said()
    finetune(settings_of(folder), said)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0] == {"event": "first"} and lines[-1]["event"] == "torn log"
    assert any(EVENTS_NAME in text and "no whole line" in text for text in said.warnings)

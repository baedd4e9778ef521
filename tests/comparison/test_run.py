"""`lopt-edge compare`: variants as they are read, cells as they are run, tables and page as they are written.

Two variants with two seeds are real runs of the tiny model, beside one that fails; what only depends on which cells run
(grids, `--only`, resumption) is shown with children that write a run's files without training.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import lopt_edge.comparison.run as comparison
from lopt_edge.adapters.generation import Sampling, generate_ids
from lopt_edge.comparison.cells import Job
from lopt_edge.comparison.closed_questions import AT_ONCE, answered
from lopt_edge.comparison.closed_questions import main as ask_closed
from lopt_edge.comparison.exact_match import count_matches, questions
from lopt_edge.comparison.exact_match import main as ask
from lopt_edge.comparison.figures import FIGURES, Closed, Spread, outcome_of
from lopt_edge.comparison.study import Study
from lopt_edge.comparison.variants import Variant, parse_variants, resolve
from lopt_edge.config.load import load_config
from lopt_edge.data import Conversation
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.planning.worst_case import answer, question
from tools.tiny_runs import make_model, write_rows

pytestmark = pytest.mark.usefixtures("warm_children")

FAKE = """
import json, sys, yaml
from pathlib import Path
config = yaml.safe_load(open(sys.argv[1]))
lr, seed, folder = config["lr"], config["seed"], Path(config["output"])
if config["method"] == "frozen" and lr > 0.5:
    sys.exit("error: diverged\\n  -> lower --lr")
test = Path(config["eval_data"]).name == "test.jsonl"
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(Path(sys.argv[1]).read_text())
step = {"loss": 1.0, "tokens": 10, "step_seconds": 9.0}
(folder / "metrics.jsonl").write_text("".join(json.dumps({**step, "step_seconds": s}) + "\\n" for s in (9, 9, 1, 2, 3)))
(folder / "plan.json").write_text(json.dumps({"plan": {"bytes_moved": 3 << 20}}))
loss = (lr - 0.02) ** 2 + seed / 100 + test
run = {"evaluation": {"before": {"eval_loss": 5.0}, "after": {"eval_loss": loss}}, "device": "cpu",
       "peaks": {"peak_device_bytes": (100 + seed) << 20, "peak_host_bytes": 0, "peak_disk_bytes": 0},
       "data": {"fingerprint": "f"}, "totals": {"steps": 5, "tokens": 50}, "compute_dtype": "float32", "versions": {}}
(folder / "run.json").write_text(json.dumps(run))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its 4-bit copy, data, and a settings file."""
    root = tmp_path_factory.mktemp("compare")
    model = make_model(root / "tiny")
    four_bit_folder(find_model(str(model)), cache_dir=str(root / "cache"))
    write_rows(root / "train.jsonl", 12)
    write_rows(root / "eval.jsonl", 3, first=50)
    write_rows(root / "test.jsonl", 3, first=80)
    write_rows(root / "other.jsonl", 2, first=70)
    (root / "run.yaml").write_text(f"""
model: {model}
data: {root}/train.jsonl
eval_data: {root}/eval.jsonl
retention_data: {root}/other.jsonl
output: {root}/out
cache_dir: {root}/cache
max_steps: 4
batch_size: 2
grad_accum: 1
lora_r: 4
lr: 1e-2
device: cpu
compute_dtype: float32
max_seq_len: 128
""")
    return root


@pytest.fixture
def run(command: Callable[..., tuple[int, str, str]], root: Path) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `lopt-edge compare`."""

    def call(*words: object) -> tuple[int, str, str]:
        return command("compare", *words)

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Children that only write what a run leaves; the names of those that were begun."""
    begun: list[str] = []
    real = comparison.finetune_job

    def quick(cell: comparison.Cell) -> Job:
        begun.append(cell.name)
        job = real(cell)
        return Job((sys.executable, "-c", FAKE, str(cell.beside(".yaml"))), job.log, job.name, job.outcome)

    monkeypatch.setattr(comparison, "finetune_job", quick)
    return begun


# variants --------------------------------------------------------------------------------------------------------------


def variants(text: str) -> list[Variant]:
    found, errors = parse_variants(text, "--methods")
    assert not errors
    return found


def test_a_variant_is_a_method_and_settings(root):
    base = load_config(root / "run.yaml", {"lr": "2e-3"})
    plain, other, lists = variants("e2e, lopt:r=8:lr-local=0.1x:k=4 ,lopt:boundary_layers=1+3:weights=disk+0-1=resident")
    assert other.name == "lopt:k=4:lr_local=0.1x:r=8"
    assert other == variants("lopt:k=4:lora_r=8:lr_local=0.1x")[0], "however it is written"
    (reaching,) = variants("lopt:reach=0.1:all+1:half:r=8")
    assert resolve(reaching, 3e-4, base=base, common={}).reach == "0.1:all,1:half"
    assert len({one.slug for one in (plain, other, lists)}) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9=+._-]+", one.slug) for one in (plain, other, lists))
    config = resolve(other, 3e-4, base=base, common={"seed": 2})
    assert (config.method, config.num_segments, config.lora_r, config.lr, config.lr_local, config.seed) == (
        "lopt",
        4,
        8,
        3e-4,
        3e-5,
        2,
    )
    assert config.max_steps == 4, "the rest is the file's"
    config = resolve(lists, 1e-3, base=base, common={})
    assert (config.boundary_layers, config.weights) == ((1, 3), "disk,0-1=resident")
    assert resolve(variants("e2e:lr=5e-4")[0], 1e-3, base=base, common={}).lr == 5e-4


def test_options_of_one_method_in_the_file_are_no_matter_to_the_others(root):
    base = load_config(root / "run.yaml", {"local_every": 2})
    assert resolve(variants("lopt")[0], 1e-3, base=base, common={}).local_every == 2
    assert "local_every" not in resolve(variants("e2e")[0], 1e-3, base=base, common={}).model_fields_set
    with pytest.raises(InputError, match="local_every"):
        resolve(variants("e2e:local_every=2")[0], 1e-3, base=base, common={})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--methods", ""), ("names an empty variant",)),
        (("--methods", "e2e,,lopt"), ("names an empty variant",)),
        (("--methods", "e3e"), ("--methods e3e: method", "'e3e'")),
        (("--methods", "lopt:boundary_layers=1,3"), ("'3' is no method", "write a list with +")),
        (("--methods", "lopt:kk=3"), ("unknown setting",)),
        (("--methods", "lopt:k"), ("'k' is no key=value",)),
        (("--methods", "lopt:k=0,e2e:r=-1"), ("2 problems", "num-segments", "lora-r")),
        (("--methods", "lopt:k=2:num_segments=4"), ("num_segments is given twice",)),
        (("--methods", "lopt:lr_local=fastx"), ("no number or factor",)),
        (("--methods", "lopt:k=4:r=8,lopt:r=8:k=4"), ("is given twice",)),
        (("--methods", "lopt,lopt:k=2"), ("same settings as lopt",)),
        (("--methods", "lopt,lopt:lr_local=0.01x"), ("same settings as lopt",)),
        (("--methods", "lopt:k=99"), ("lopt:k=99", "99")),
        (("--methods", "e2e:k=4"), ("num_segments has no effect",)),
        (("--methods", "e2e:max_steps=9"), ("max_steps is shared by all variants",)),
        (("--methods", "e2e:device_memory=1GB"), ("device_memory is shared by all variants",)),
        (("--methods", "e2e:batch_size=4"), ("takes 4 sequences a step, the config 2",)),
        (("--methods", "e2e", "--seeds", "0,x"), ("'x' must be a whole number",)),
        (("--methods", "e2e", "--seeds", "1,1"), ("'1' is given twice",)),
        (("--methods", "e2e", "--lr-grid", "1e-3,0"), ("'0' must be a number above 0",)),
        (("--methods", "e2e:lr=1e-3", "--lr-grid", "1e-3,1e-4"), ("--lr-grid tunes it",)),
        (("--methods", "e2e", "--only", "frozen"), ("--only frozen: is not among --methods",)),
        (("--methods", "e2e", "--jobs", "0", "--exact-match", "-1"), ("2 problems", "--jobs", "--exact-match")),
        (("--methods", "e2e", "--test-data", "nowhere.jsonl"), ("nowhere.jsonl: no such file",)),
        (("--methods", "lopt:k=99,e2e:zz=1", "--jobs", "0"), ("3 problems", "99", "zz", "--jobs")),
        (("--methods", "e2e:zz=1", "--seeds", "-1", "--jobs", "0"), ("3 problems", "zz", "--seeds", "--jobs")),
    ],
)  # fmt: skip
def test_mistakes_are_told_together_before_anything_runs(run, root, fake, words, expected):
    code, out, err = run(root / "run.yaml", *words)
    assert (code, out) == (2, "")
    assert all(part in " ".join(err.split()) for part in expected), err
    assert not fake and not (root / "out").exists()


def test_preferences_are_compared_by_their_objective(run, root, tmp_path):
    rows = [{"prompt": f"What is {n}?", "chosen": f" It is {n}.", "rejected": " No." * (1 + n % 3)} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = re.sub(r"(?m)^(data|eval_data|retention_data|max_steps|output):.*$", "", (root / "run.yaml").read_text())
    more = f"objective: dpo\ndata: {tmp_path}/pairs.jsonl\neval_fraction: 0.25\nmax_steps: 3\noutput: {tmp_path}/out\n"
    (tmp_path / "run.yaml").write_text(text + more)
    code, out, err = run(tmp_path / "run.yaml", "--methods", "e2e")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["variants"]
    figures = {name: row["figures"][name]["mean"] for name in ("eval_loss", "preferred", "margin")}
    assert figures["eval_loss"] < 0.7 and 0.5 < figures["preferred"] <= 1 and figures["margin"] > 0
    assert (
        "that of objective dpo" in " ".join(out.split())
        and "chosen preferred" in (tmp_path / "out" / "compare.md").read_text()
    )
    code, _, err = run(tmp_path / "run.yaml", "--methods", "e2e,e2e:objective=simpo", "--output", tmp_path / "other")
    assert code == 2 and "objective is shared by all variants" in err


def test_what_a_comparison_cannot_follow_is_refused(run, root, tmp_path, fake):
    text = (root / "run.yaml").read_text()
    cases = {
        "dry_run: true": "nothing would be compared",
        "keep_best: true": "with test data the adapter would be chosen by them",
        f"eval_data: {root}/test.jsonl": "are the data that the learning rate is chosen by",
    }
    for line, words in cases.items():
        key = line.split(":")[0]
        (tmp_path / "run.yaml").write_text(re.sub(rf"(?m)^{key}:.*$", "", text) + line + "\n")
        code, _, err = run(
            tmp_path / "run.yaml", "--methods", "e2e", "--test-data", root / "test.jsonl", "--lr-grid", "1e-3,1e-2"
        )
        assert code == 2 and words in " ".join(err.split()), err
    (tmp_path / "run.yaml").write_text(re.sub(r"(?m)^eval_data.*$", "", text))
    code, _, err = run(tmp_path / "run.yaml", "--methods", "e2e", "--exact-match", 2)
    assert code == 2 and "methods are compared by it" in err and "needs held-out rows" in err
    (tmp_path / "config.yaml").write_text("")
    code, _, err = run(root / "run.yaml", "--methods", "e2e", "--output", tmp_path)
    assert code == 2 and "holds a run of finetune" in err
    assert not fake


@pytest.mark.parametrize(
    ("name", "words"), [("notes.txt", "holds 'notes.txt', which is of no"), ("compare.md", "did not write")]
)
def test_a_folder_of_something_else_is_not_written_into(run, root, tmp_path, fake, name, words):
    (tmp_path / name).write_text("mine")
    (tmp_path / "runs").mkdir()
    code, _, err = run(root / "run.yaml", "--methods", "e2e", "--output", tmp_path)
    assert code == 2 and words in " ".join(err.split()), err
    assert (tmp_path / name).read_text() == "mine"
    assert not fake


# real runs -------------------------------------------------------------------------------------------------------------

METHODS = ["e2e", "lopt:k=4:lr_local=0.1x", "e2e:weights=host"]
TABLES = ("compare.md", "compare.csv", "compare.json", "compare.html")


@pytest.fixture(scope="module")
def compared(root: Path) -> tuple[comparison.Comparison, comparison.Comparison]:
    """Two variants that run and one that its child refuses (no host tier below a CPU), first one seed, then two.

    The tables of the first comparison are kept in `failing`.
    """
    first = comparison.compare(root / "run.yaml", METHODS, seeds=(0,), jobs=2, output=str(root / "real"))
    (root / "failing").mkdir()
    for name in TABLES:
        shutil.copy(root / "real" / name, root / "failing" / name)
    began: list[str] = []
    second = comparison.compare(
        root / "run.yaml", METHODS[:2], seeds=(0, 1), jobs=2, output=str(root / "real"), say=began.append
    )
    assert not any("seed 0" in told for told in began), "what is there is not run again"
    return first, second


def test_real_runs_fill_the_table(compared, root):
    _, found = compared
    assert [row.status for row in found.rows] == ["done", "done"] and not found.problems
    for row in found.rows:
        for name in ("eval_loss", "forgetting", "peak_device_bytes", "step_seconds", "tokens_per_second", "bytes_moved"):
            assert len(row.spread(name).values) == 2, name
        assert 100 << 20 < (row.spread("peak_device_bytes").mean or 0) < 4 << 30
        for outcome in row.outcomes:
            run = json.loads((outcome.cell.folder / "run.json").read_text())
            assert outcome.figures["eval_loss"] == run["evaluation"]["after"]["eval_loss"]
            assert run["config"]["seed"] == outcome.cell.seed
            assert run["config"]["lr_local"] == (None if row.name == "e2e" else 1e-3)
    assert any("shared machine" in remark for remark in found.remarks)
    assert any("fewer than three seeds" in remark for remark in found.remarks)
    assert not any("UNEQUAL" in remark for remark in found.remarks)


def test_a_failed_run_is_told_with_its_reason(compared, root):
    found, _ = compared
    assert [row.status for row in found.rows] == ["done", "done", "failed"]
    assert len(found.problems) == 1 and found.problems[0].startswith("e2e:weights=host, lr 0.01, seed 0: ")
    assert "host" in found.problems[0].partition("seed 0: ")[2]
    assert "| e2e:weights=host | 0.01 | 0 of 1, failed | - |" in found.markdown
    assert found.problems[0] in found.markdown.partition("## Runs that are not there")[2]
    assert found.problems[0] in Reader((root / "failing" / "compare.html").read_text()).texts
    assert found.rows[0].spread("eval_loss").std is None, "one run has no spread"


@pytest.mark.parametrize("folder", ["real", "failing"])
def test_the_tables_agree(compared, root, folder):
    values = json.loads((root / folder / "compare.json").read_text())
    lines = list(csv.DictReader(io.StringIO((root / folder / "compare.csv").read_text())))
    markdown = (root / folder / "compare.md").read_text()
    heading, *rows = [
        line.strip("| ").split(" | ") for line in markdown.partition("## ")[0].splitlines() if line.startswith("| ")
    ]
    names = [one["variant"] for one in values["variants"]]
    assert [line["variant"] for line in lines] == names == [row[0] for row in rows] == METHODS[: len(rows)]
    for line, one, row in zip(lines, values["variants"], rows, strict=True):
        for name, figure in FIGURES.items():
            of_all = one["figures"][name]
            mean, std = (float(line[key]) if line[key] else None for key in (name, f"{name}_std"))
            assert (mean, std) == (of_all["mean"], of_all["std"])
            runs = [run["figures"][name] for run in one["runs"] if run["figures"]]
            spread = Spread(tuple(value for value in runs if value is not None))
            assert (spread.mean, spread.std, len(spread.values)) == (mean, std, of_all["n"])
            if figure.heading in heading:
                assert row[heading.index(figure.heading)] == spread.text(figure)
    assert values["shared"]["max_steps"] == 4


class Reader(HTMLParser):
    """Texts, and whether every tag that was opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_page_has_the_numbers_and_needs_nothing_else(compared, root):
    _, found = compared
    text = (root / "real" / "compare.html").read_text()
    page = Reader(text)
    assert not page.open
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 7, "two curves, four plots of dots, one of bars"
    identifiers = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for picture in pictures:
        assert picture["role"] == "img" and set((picture.get("aria-labelledby") or "").split()) <= identifiers
    dots = [(attributes.get("class") or "").split() for tag, attributes in page.tags if tag == "circle"]
    dots = [classes for classes in dots if classes]  # the points of curves have none
    assert len(dots) == 16, "four plots of two variants, each at its place and before its name"
    assert all(dots.count(["dot", hue]) == 8 for hue in ("hue0", "hue1")), "which share a hue"
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags} and "http" not in text
    assert "prefers-color-scheme: dark" in text
    for row in found.rows:
        for name in ("eval_loss", "forgetting", "step_seconds", "peak_device_bytes"):
            assert row.spread(name).text(FIGURES[name]) in page.texts


def test_the_same_command_runs_only_what_failed(compared, root, run, monkeypatch):
    """Finished cells are left alone to the byte; other settings in a cell's place are refused by name."""
    jobs: list[str] = []
    monkeypatch.setattr(comparison, "run_jobs", lambda new, **rest: jobs.extend(job.name for job in new))
    words = ("--output", root / "real", "--seeds", "0,1", "--jobs", 2)
    before = {path: path.stat().st_mtime_ns for path in (root / "real" / "runs").rglob("run.json")}
    assert run(root / "run.yaml", "--methods", "e2e,lopt:k=4:lr_local=0.1x", *words)[0] == 0
    assert jobs == [] and len(before) == 4
    assert run(root / "run.yaml", "--methods", "e2e,e2e:weights=host", *words)[0] == 1
    assert [name for name in jobs if "seed" in name] == [f"{METHODS[2]}, lr 0.01, seed {seed}" for seed in (0, 1)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (root / "other.yaml").write_text((root / "run.yaml").read_text().replace("lora_r: 4", "lora_r: 8"))
    code, _, err = run(root / "other.yaml", "--methods", "e2e", *words)
    err = " ".join(err.split())
    assert code == 2 and "lora_r was 4, is 8" in err and "2 problems" in err and "runs/e2e/lr-0.01/seed-1" in err


def test_exact_match_of_a_run(compared, root, monkeypatch):
    """The run's adapter is asked; only white space at the ends is forgiven."""
    cell = compared[1].rows[0].outcomes[0].cell
    path = str(root / "eval.jsonl")
    counted = count_matches(cell.folder, path, 2)
    assert (counted["rows"], counted["asked"]) == (2, 2) and counted["matches"] in (0, 1, 2)
    assert outcome_of(cell, (path, 2)).figures["exact_match"] is None
    references = [reference for _, reference in questions(path, 3, None)]
    replies = iter([f" {references[0]}\n", references[1].upper(), references[2]])
    generator = SimpleNamespace(
        tokenizer=lambda text, **rest: {"input_ids": [1]}, continue_text=lambda *words: next(replies)
    )
    monkeypatch.setattr("lopt_edge.adapters.generation.load_generator", lambda *words, **rest: generator)
    ask((str(cell.folder), path, "3", str(cell.folder / "exact-match.json")))
    assert outcome_of(cell, (path, 3)).figures["exact_match"] == 2 / 3
    assert outcome_of(cell, (path, 2)).figures["exact_match"] is None, "of other rows"


def test_closed_questions_are_asked_of_the_base_and_of_each_run(compared, root, run, monkeypatch):
    """An answer is right if the greedy completion begins with it, which generating it shows token by token."""
    from lopt_edge.adapters.generation import load_generator
    from lopt_edge.adapters.perplexity import read_for

    cell = compared[1].rows[0].outcomes[0].cell
    generator = load_generator(cell.config.model, str(cell.folder), cache_dir=cell.config.cache_dir)
    path = write_rows(root / "closed.jsonl", AT_ONCE + 4)
    dataset, eos = read_for(generator, str(path)), generator.tokenizer.eos_token_id

    def greedy(example, n_tokens: int) -> list[int]:
        asked = example.input_ids[: example.supervised.index(1)]
        return list(generate_ids(generator.model, asked, Sampling(max_new_tokens=n_tokens), stop=[]))

    examples = []
    for index, example in enumerate(dataset.examples):  # every second answer is what the model says, then its end
        first = example.supervised.index(1)
        n_tokens = len(example.input_ids) - first - 1
        answer = greedy(example, n_tokens) if index % 2 else example.input_ids[first:-1]
        examples.append(replace(example, input_ids=array("q", [*example.input_ids[:first], *answer, eos])))
    found = list(answered(generator, replace(dataset, examples=tuple(examples))))
    for example, is_right in zip(sorted(examples, key=len), found, strict=True):
        wanted = list(example.input_ids[example.supervised.index(1) : -1])
        assert is_right == (greedy(example, len(wanted)) == wanted)
    assert len(found) > AT_ONCE and sum(found) >= len(found) // 2 and not all(found)
    share = sum(answered(generator, dataset)) / len(found)
    words = ("--output", root / "real", "--methods", "e2e", "--seeds", "0", "--closed-questions", path)
    monkeypatch.setattr(comparison, "run_jobs", lambda new, **rest: [ask_closed(job.words[3:]) for job in new])
    code, out, err = run(root / "run.yaml", *words)
    assert code == 0, err
    heading = next(line for line in out.splitlines() if line.startswith("| variant"))
    assert "answers before" in heading and "answers after" in heading
    assert outcome_of(cell, closed=Closed(str(path), 0.0)).figures["answers_after"] == share


def test_equal_seconds_are_the_planners_and_kept(root, run, fake):
    """`frozen` gets more steps than e2e, by as much as the planner finds it faster; and the same the next time."""
    words = ("--methods", "e2e,frozen", "--seeds", "0,1", "--output", root / "equal", "--equal", "seconds")
    code, out, err = run(root / "run.yaml", *words)
    assert code == 0, err
    steps = json.loads((root / "equal" / "equal-seconds.json").read_text())["steps"]
    assert steps["e2e"] == 4 and 4 < steps["frozen"] <= 8
    folder = root / "equal" / "runs" / "frozen" / "lr-0.01"
    assert yaml.safe_load((folder / "seed-0.yaml").read_text())["max_steps"] == steps["frozen"]
    assert "UNEQUAL" not in out and f"e2e: 4, frozen: {steps['frozen']}" in out
    (root / "equal" / "equal-seconds.json").write_text(json.dumps({"reference": "e2e", "steps": {"e2e": 4, "frozen": 9}}))
    code, _, err = run(root / "run.yaml", *words)
    assert code == 2 and f"max_steps was {steps['frozen']}, is 9" in " ".join(err.split()), "what was kept is taken"
    code, _, err = run(root / "run.yaml", *words[:-1], "steps", "--closed-questions", root / "none.jsonl")
    assert code == 2 and "'steps' is unknown" in err and "is no file" in err


def test_equal_bytes_are_the_first_ones_for_all_and_seconds_are_those_within_them(root, run, fake):
    """`e2e` within `frozen`'s bytes has the budget that the plan of `frozen` took, in this call and in the next."""
    words = ("--methods", "frozen,e2e", "--seeds", "0", "--output", root / "even", "--equal", "seconds,bytes")
    code, out, err = run(root / "run.yaml", *words)
    assert code == 0, err
    kept = json.loads((root / "even" / "equal-bytes.json").read_text())
    steps = json.loads((root / "even" / "equal-seconds.json").read_text())["steps"]
    for name in ("e2e", "frozen"):
        settings = yaml.safe_load((root / "even" / "runs" / name / "lr-0.01" / "seed-0.yaml").read_text())
        assert settings["device_memory"] == f"{kept['device_bytes']}B" and settings["max_steps"] == steps[name]
    asked = question(load_config(root / "run.yaml", {"method": "frozen", "output": str(root / "other")}))
    assert kept["reference"] == "frozen" and 0 < kept["device_bytes"] <= answer(asked).peak_bytes["device"]
    assert "equal bytes: all have the device memory that the plan of frozen takes" in out and "budget_of_equal_bytes" in out
    (root / "even" / "equal-bytes.json").write_text(json.dumps({"reference": "frozen", "device_bytes": 10**9}))
    code, _, err = run(root / "run.yaml", *words)
    assert code == 2 and "device_memory was" in " ".join(err.split()), "what was kept is taken"
    text = (root / "run.yaml").read_text()
    (root / "stated.yaml").write_text(text + "device_memory: 2GB\n")
    code, _, err = run(root / "stated.yaml", *words)
    assert code == 2 and "bytes are equal already" in " ".join(err.split())


def test_questions_take_conversations_and_refuse_plain_text(tmp_path):
    chat = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    }
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    ((asked, reference),) = questions(str(tmp_path / "chat.jsonl"), 5, None)
    assert (asked, reference) == (Conversation((("user", "a"),), "chat.jsonl:1"), "b")
    (tmp_path / "plain.txt").write_text("words")
    with pytest.raises(InputError, match="plain text"):
        questions(str(tmp_path / "plain.txt"), 5, None)


# which cells run -------------------------------------------------------------------------------------------------------


def test_a_grid_is_tuned_on_the_first_seed_and_the_test_data_are_kept_for_the_end(root, run, fake):
    words = ("--methods", "e2e,frozen", "--seeds", "3,4", "--output", root / "grid", "--lr-grid", "0.01,0.02,1",
             "--test-data", root / "test.jsonl")  # fmt: skip
    code, out, err = run(root / "run.yaml", *words)
    assert code == 1 and "frozen, lr 1, seed 3: diverged -> lower --lr" in err, "a learning rate that fails is told"
    assert len(fake) == 2 * 3 + 2 * 2
    values = json.loads((root / "grid" / "compare.json").read_text())["variants"]
    for one in values:
        assert one["lr"] == 0.02
        assert [run["lr"] for run in one["tuning"]] == [0.01, 0.02, 1.0]
        assert all(run["seed"] == 3 and "/tuning/" in run["folder"] for run in one["tuning"])
        assert all(run["figures"] is None or run["figures"]["eval_loss"] < 1 or run["lr"] == 1 for run in one["tuning"])
        assert one["figures"]["eval_loss"]["mean"] == pytest.approx(1.035), "of the test data"
        assert one["figures"]["step_seconds"]["mean"] == 2 and one["figures"]["tokens_per_second"]["mean"] == 5
    assert "| frozen | 0.0301 | 0.0300 | failed | 0.02 |" in out
    del fake[:]
    assert run(root / "run.yaml", *words)[0] == 1
    assert fake == ["frozen, lr 1, seed 3"], "only what failed is run again"
    shutil.rmtree(root / "grid")
    assert run(root / "run.yaml", *words[:-2])[0] == 1
    assert len(fake) == 1 + 2 * 3 + 2, "without test data the tuning run is the first seed's"


def test_only_fills_its_variants_and_the_table_has_all_that_is_there(root, run, fake):
    words = ("--methods", "e2e,frozen", "--seeds", "0,1,2", "--output", root / "only")
    code, out, _ = run(root / "run.yaml", *words, "--only", "frozen")
    assert code == 0 and [name.split(",")[0] for name in fake] == ["frozen"] * 3
    assert "| e2e | 0.01 | 0 of 3, not run |" in out and "| frozen | 0.01 | 3 of 3 |" in out
    assert "e2e, lr 0.01, seed 0: not run yet" in out
    code, out, _ = run(root / "run.yaml", *words, "--only", "e2e")
    assert code == 0 and len(fake) == 6
    assert "| e2e | 0.01 | 3 of 3 |" in out and "| frozen | 0.01 | 3 of 3 |" in out and "not there" not in out


def test_an_unfinished_run_is_taken_up(root, run, fake, monkeypatch):
    """Its folder is no obstacle; the child is asked to resume."""
    assert run(root / "run.yaml", "--methods", "e2e", "--seeds", "0", "--output", root / "again")[0] == 0
    cell = root / "again" / "runs" / "e2e" / "lr-0.01" / "seed-0"
    (cell / "run.json").unlink()
    job = Study(load_config(root / "run.yaml"), tuple(variants("e2e")), (), (0,), (), root / "again", None, 0, 1)
    found = job.cell(job.variants[0], 0.01, 0)
    found.check()
    assert not found.done
    monkeypatch.undo()
    assert comparison.finetune_job(found).words[-3:] == (str(cell.with_name("seed-0.yaml")), "--resume", "auto")

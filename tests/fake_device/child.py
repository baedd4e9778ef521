"""The process in which the card in name exists: `python -m tests.fake_device.child SHIM FOLDER CASE ...` prints findings.

One JSON line a case: its name, and its findings by kind of step or the error that it met. The shim comes before torch.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from tests.fake_device import shim


def main() -> None:
    library, root, *names = sys.argv[1:]
    shim.load(Path(library))
    import bitsandbytes.functional  # noqa: F401  # it looks for a real card when it is imported
    import torch
    import transformers.modeling_utils  # noqa: F401  # its annotations name what the card plays

    from tests.fake_device.cases import Bed, findings

    torch.set_num_threads(1)
    bed = Bed(Path(root))
    for name in names:
        try:
            found = findings(bed, name)
        except Exception as error:
            found = {"error": "".join(traceback.format_exception(error))[-4000:]}
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main()

"""Networks of the recipe: backbone, front end, heads and losses.

torchaudio is hidden from the packages imported here. It comes along as a dependency of fairseq, nothing in this project calls it, and its
published wheel is linked against CUDA: beside a CPU build of torch, transformers would fail on importing it.
"""

from __future__ import annotations

import sys

# None is Python's own mark for "this module cannot be imported": find_spec answers None, `import` raises ModuleNotFoundError.
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]

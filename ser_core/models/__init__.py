"""Networks of the recipe: backbone, front end, heads and losses.

Importing torchaudio is disabled. It is installed as a dependency of fairseq and never used here, and its published wheel is linked against
CUDA: with a CPU build of torch, transformers would fail when it imports torchaudio.
"""

from __future__ import annotations

import sys

# None marks a module that cannot be imported: importlib.util.find_spec returns None, `import` raises ModuleNotFoundError.
sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]

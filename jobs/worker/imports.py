"""Tells a module that is missing from one that could not be looked up: Python's import system reports both as ModuleNotFoundError."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from jobs.store.failures import FailureClass, class_of_exception


def failure_class(error: BaseException) -> FailureClass:
    """Class of an exception in this process; `storage` if a module could not be imported because the file system failed."""
    found = class_of_exception(error)
    return FailureClass.storage if found is FailureClass.code and _lost_by_storage(error) else found


def _lost_by_storage(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, is a failed import of a module that exists.

    True if the module can be found now, or if a folder of `sys.path` cannot be looked up.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, ModuleNotFoundError) and current.name and (_found(current.name) or _path_fails()):
            return True
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return False


def _found(name: str) -> bool:
    importlib.invalidate_caches()  # the listing of a folder that could not be read is cached as empty
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of its parent package; `__spec__` is not set
        return False
    except OSError:
        return True


def _path_fails() -> bool:
    for folder in sys.path:
        try:
            Path(folder or ".").stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return True
    return False

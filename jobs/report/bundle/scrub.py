"""What a bundle leaves out of records, settings and code: secrets, and paths, hosts and jobs that say who computed where. Pure.

Records and settings keep what is listed here, so that an entry that is added later is left out until it is listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from jobs.store.records import MEASURED, MODEL, Result

# Of a result's provenance: what tables and reports read. Hosts are numbered; no folder, file name, job and node of Slurm, path of weights.
PROVENANCE = (
    *(name for name in MEASURED if name != "slurm"),
    *("commit", "dirty", "snapshot", "python", "packages", "device", "machine", "processor", "cpu_seconds", "started", "finished"),
    *("seed", "durations", "arithmetic", "relief", "beside", "queue", "requested"),
)
RUNTIME = ("weights",)  # of `provenance.runtime`
POLICY = ("outliers", "sigmas", "rounds", "max_seeds", "max_attempts", "hold_diverging", "max_failures")
CONFIGURATION = (
    *("name", "corpus", "methods", "variants", "folds", "seeds", "first_seed", "table", "resources", "policy", "sweep", "recipe"),
)
NOT_CODE = ("configs/site/", "configs/experiment/")  # may hold secrets of any experiment and site; the experiment's own is resolved
ARTIFACTS = (".csv", ".json")  # of a run: predictions, curves; weights and features are left out
LARGEST_ARTIFACT = 64 * 2**20  # bytes
SHORTEST_SECRET = 8  # characters; shorter values, such as numbers, occur everywhere
_PATH = re.compile(r"~[^/\s]*/|/[^/\s]")
_ASSIGNMENT = re.compile(r"""^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*["']?(.*?)["']?\s*$""", re.MULTILINE)


def scrubbed_result(result: Result, hosts: Mapping[str, str]) -> Result:
    """A result with the entries of `PROVENANCE` and the artifacts that a bundle has. `hosts`: host -> the name that it gets."""
    runtime = result.provenance.get("runtime")
    kept = {name: result.provenance[name] for name in PROVENANCE if name in result.provenance}
    if (host := result.provenance.get("host")) in hosts:
        kept["host"] = hosts[str(host)]
    if isinstance(runtime, Mapping):
        kept["runtime"] = {name: runtime[name] for name in RUNTIME if name in runtime}
    artifacts = {name: digest for name, digest in result.artifacts.items() if is_kept_artifact(name)}
    return replace(result, provenance=kept, artifacts=artifacts)


def host_names(results: Iterable[Result]) -> dict[str, str]:
    """Host of any result -> `node 1`, `node 2`, ..., in the order of their names."""
    hosts = sorted({host for result in results if isinstance(host := result.provenance.get("host"), str)})
    return {host: f"node {number}" for number, host in enumerate(hosts, 1)}


def is_kept_artifact(name: str) -> bool:
    """Whether an artifact is of a kind that a bundle has; a model is not."""
    return PurePosixPath(name).suffix in ARTIFACTS and not name.startswith(f"{MODEL}/")


def scrubbed_configuration(values: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved settings without those of the site, of notices and of the controller; of absolute paths only the last part."""
    kept = {name: values[name] for name in CONFIGURATION if name in values}
    policy = kept.get("policy")
    if isinstance(policy, Mapping):
        kept["policy"] = {name: policy[name] for name in POLICY if name in policy}
    found: dict[str, Any] = without_paths(kept)
    return found


def without_paths(value: Any) -> Any:
    """JSON values in which a text that is an absolute path is its last part."""
    if isinstance(value, str):
        return PurePosixPath(value).name if _PATH.match(value) else value
    if isinstance(value, Mapping):
        return {name: without_paths(each) for name, each in value.items()}
    return [without_paths(each) for each in value] if isinstance(value, list | tuple) else value


def scrubbed_manifest(text: str, digest: str) -> str | None:
    """A corpus manifest whose `source` has no paths, without transcripts; None if it is not that of the corpus with this digest.

    Transcripts are left out as the recordings are: licences of corpora forbid that they are passed on.
    """
    try:
        manifest = json.loads(text)
    except ValueError:
        return None
    if not isinstance(manifest, dict) or manifest.get("digest") != digest:
        return None
    if "source" in manifest:
        manifest["source"] = without_paths(manifest["source"])
    if "text_digest" in manifest and isinstance(manifest.get("utterances"), list):
        manifest["utterances"] = [_without_text(each) for each in manifest["utterances"]]
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def _without_text(utterance: Any) -> Any:
    return {name: value for name, value in utterance.items() if name != "text"} if isinstance(utterance, dict) else utterance


def secret_values(settings: Mapping[str, Any], assigned: Iterable[str]) -> dict[str, str]:
    """Value -> where it is from, of what must occur nowhere in a bundle.

    `settings`: values of the keys that may hold secrets, by key, nested where they are. `assigned`: texts of files such as `.env`.
    """
    found = {value: key for key, given in settings.items() for key, value in _texts(key, given)}
    found |= {value: f".env: {name}" for text in assigned for name, value in _ASSIGNMENT.findall(text)}
    return {value: key for value, key in found.items() if len(value) >= SHORTEST_SECRET}


def secret_in(data: bytes, secrets: Mapping[str, str]) -> str:
    """Where a secret value that occurs in a file is from; "" if none does."""
    return next((key for value, key in secrets.items() if value.encode() in data), "")


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in a value, each with its key."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _texts(f"{key}.{name}", each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(key, each)
    elif isinstance(value, str):
        yield key, value

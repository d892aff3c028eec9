"""A grid without speech: scikit-learn's handwritten digits, classified from their pixels or from principal components of the pixels.

`docs/your-own-grid.md` walks through this file. `python launch.py grid --config examples/digits/digits.yaml` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from jobs.errors import UsageError
from jobs.experiment.basic_registry import BasicRegistry, Stage, write_manifest
from jobs.experiment.registry import StageArguments
from jobs.store.scores import Score, Terms

FOLDS = ("a", "b", "c")


@dataclass
class Recipe:
    """The section `recipe` of an experiment."""

    components: int = 12  # principal components
    units: int = 32  # of the hidden layer
    epochs: int = 15  # of the classifier
    images: int = 300  # that it is trained on


class Digits(BasicRegistry):
    """Two methods: `pixels` is one stage; `components` has a stage upstream that all seeds of a fold share."""

    methods = ("pixels", "components")
    stages = ("project", "classify")
    recipe_schema = Recipe
    packages = ("scikit-learn", "numpy")  # whose versions results and tables state
    makes = ("digits",)  # the corpus that a launch makes if it is missing
    score = Score("accuracy", "accuracy", "Recognised digits", of_confusion="wa")
    terms = Terms(examples="images")  # in captions

    def check(self, recipe: Recipe) -> None:
        """Called before anything is submitted."""
        if not 1 <= recipe.components <= 64:
            raise UsageError(f"recipe.components={recipe.components}: from 1 to 64, the number of pixels")

    def make_corpus(self, name: str, folder: Path, progress: Callable[[int, int], None]) -> str:
        """One line for each image: fold, digit, 64 pixels."""
        import numpy as np
        from sklearn.datasets import load_digits

        found = load_digits()
        folds = np.arange(len(found.target)) % len(FOLDS)
        folder.mkdir(parents=True, exist_ok=True)
        np.savetxt(folder / "digits.csv", np.column_stack((folds, found.target, found.data)), fmt="%d", delimiter=",")
        corpus = write_manifest(folder, name, FOLDS)
        return f"{name}: {len(folds)} images, folds {', '.join(FOLDS)}; digest {corpus.digest[:12]}; in {folder}"

    def call(self, method: str, recipe: Recipe, fold: str, seed: int) -> Stage:
        """The last stage of a run. What is in `settings`, the fold, the seed and the stages upstream identify it."""
        settings = {"units": recipe.units, "epochs": recipe.epochs, "images": recipe.images}
        if method == "pixels":
            return Stage("classify", settings, fold, seed)
        project = Stage("project", {"components": recipe.components}, fold, seed=0)  # the same one for every seed
        return Stage("classify", settings, fold, seed, upstream={"inputs": project})

    def run(self, stage: str, **given: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Compute one stage: `upstream` names the folders that it reads, `output` the one that it writes to."""
        import numpy as np

        table = np.loadtxt(given["corpus"] / "digits.csv", delimiter=",")
        folds, digits, pixels = table[:, 0], table[:, 1].astype(int), table[:, 2:] / 16
        test = folds == FOLDS.index(given["fold"])
        if stage == "project":
            return self._project(pixels[~test], given)
        if "inputs" in given["upstream"]:
            with np.load(given["upstream"]["inputs"] / "components.npz") as found:
                pixels = (pixels - found["mean"]) @ found["components"].T
        return self._classify((pixels[~test], digits[~test]), (pixels[test], digits[test]), given)

    def _project(self, pixels: Any, given: StageArguments) -> Mapping[str, Any]:
        import numpy as np
        from sklearn.decomposition import PCA

        found = PCA(given["settings"]["components"], random_state=given["seed"]).fit(pixels)
        np.savez(given["output"] / "components.npz", mean=found.mean_, components=found.components_)
        return {"metrics": {"explained": float(found.explained_variance_ratio_.sum())}}

    def _classify(self, training: tuple[Any, Any], test: tuple[Any, Any], given: StageArguments) -> Mapping[str, Any]:
        import numpy as np
        from sklearn.metrics import confusion_matrix
        from sklearn.neural_network import MLPClassifier

        settings, seed = given["settings"], given["seed"]
        chosen = np.random.default_rng(seed).permutation(len(training[1]))[: settings["images"]]
        inputs, targets = training[0][chosen], training[1][chosen]
        model = MLPClassifier((settings["units"],), batch_size=32, learning_rate_init=0.003, random_state=seed)
        for epoch in range(settings["epochs"]):
            model.partial_fit(inputs, targets, classes=range(10))
            given["report"](f"epoch {epoch + 1}/{settings['epochs']}, loss {model.loss_:.3f}")
        confusion = confusion_matrix(test[1], model.predict(test[0]), labels=range(10)).tolist()
        return {"metrics": {"loss": float(model.loss_)}, "confusion": confusion, "classes": [str(digit) for digit in range(10)]}

    def preload(self) -> None:
        """Imported once, in the process that workers are forked from."""
        import sklearn.decomposition
        import sklearn.metrics
        import sklearn.neural_network  # noqa: F401


REGISTRY = Digits()

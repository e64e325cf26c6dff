"""A run's folder: whether a run may begin or go on there, from which step, and what it notes of itself.

RUN/recipe.yaml      the recipe as given
RUN/resolved.json    the recipe as given and as resolved (no "auto"), the seed of the data's order, the machine,
                     versions of packages, the code's revision; a resumed run keeps to it
RUN/metrics.jsonl    training/log.py
RUN/wandb.json       the run's id at wandb; what wandb keeps is in RUN/wandb/
RUN/checkpoints/     training/checkpoint.py
RUN/rows/            while it runs: activations that a resumption must not run the host for again (sources.py)
RUN/sae/             the finished SAE
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sae import config, files
from sae.autoencoder import SAE
from sae.errors import UserError
from sae.locks import lock
from sae.places import Place
from sae.recipe import Recipe
from sae.training import checkpoint

FINISHED, EVALUATED = "sae/feature_stats.safetensors", "sae/evaluation.json"  # written in this order
MAY_CHANGE = ("log.", "evaluation.", "training.save_every", "training.device", "host.device", "out")  # on resuming


def earlier(recipe: Recipe, resume: bool) -> dict[str, Any]:
    """What an earlier start of this run resolved (empty for a new run); refuses to overwrite or to change it."""
    folder = Path(recipe.out)
    if not resume:
        if checkpoint.all_of(folder) or (folder / "sae" / "cfg.json").exists():
            raise UserError(
                f"{folder}: holds a run already. "
                f"Go on with `sae train {folder} --resume`, choose another `out`, or delete it."
            )
        return {}
    if not (folder / "resolved.json").exists():
        if checkpoint.all_of(folder):
            raise UserError(
                f"{folder}: has checkpoints and no resolved.json, which says what they are of. Put it back, or begin a "
                "new run with another `out`."
            )
        return {}
    before = files.read_json_object(folder / "resolved.json", ("recipe", "source", "encoder_dtype"))
    then, now = flat(config.to_dict(Recipe())) | flat(before["recipe"]), flat(config.to_dict(recipe))
    changed = [name for name in now if _differ(then[name], now[name]) and not name.startswith(MAY_CHANGE)]
    if changed:
        told = "; ".join(f"{name} = {then[name]}, now it is {now[name]}" for name in changed)
        raise UserError(
            f"{folder}: began with {told}. Resume without that change, or begin a new run with another `out`."
        )
    return before


def _differ(then: Any, now: Any) -> bool:
    """Also in the order of a mixture's sources, by which ties between them are broken."""
    return json.dumps(then) != json.dumps(now)


@contextmanager
def writing(recipes: Sequence[Recipe]) -> Iterator[None]:
    """Nobody else writes these runs' folders meanwhile; a UserError says who does."""
    with ExitStack() as opened:
        for recipe in recipes:
            opened.enter_context(lock(Place(recipe.out), "train"))
        yield


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's nested dict by dotted names, lists for tuples as JSON has them."""
    pages = {name: page if isinstance(page, dict) else {"": page} for name, page in recipe.items()}
    return {
        f"{name}.{field}".rstrip("."): list(value) if isinstance(value, tuple) else value
        for name, page in pages.items()
        for field, value in page.items()
    }


def is_finished(recipe: Recipe, before: dict[str, Any], steps: int) -> bool:
    """Whether the run came to its last step, its SAE was written and, where it has a host, evaluated.

    before   what the earlier start resolved, if there was one
    """
    folder = Path(recipe.out)
    if not before or checkpoint.steps(folder)[-1:] != [steps]:
        return False
    evaluates = recipe.evaluation.tokens and before["source"] != "given rows"
    if not (folder / FINISHED).exists() or (evaluates and not (folder / EVALUATED).exists()):
        return False
    of = flat(SAE.load(folder / "sae").cfg.metadata.recipe)  # not another recipe's, from before in this folder
    now = flat(config.to_dict(recipe))
    return not any(_differ(of.get(name), now[name]) for name in now if not name.startswith(MAY_CHANGE))


def common_step(folders: Sequence[Path], began: Sequence[bool]) -> int:
    """The step from which runs that train together go on: the newest that all have saved; 0 where none has, or where
    they were killed in the first save. began: whether there was an earlier start that counts."""
    saved = [checkpoint.steps(folder) if before else [] for folder, before in zip(folders, began, strict=True)]
    if common := set.intersection(*map(set, saved)):
        return max(common)
    if not any(saved) or (all(began) and all(len(steps) <= 1 for steps in saved)):
        return 0
    told = "; ".join(
        f"{folder}: {', '.join(map(str, steps)) or 'none'}" for folder, steps in zip(folders, saved, strict=True)
    )
    raise UserError(f"train: these runs have saved no step in common ({told}). Go on with each on its own.")


def note_recipe(recipe: Recipe) -> None:
    files.write_text(Path(recipe.out) / "recipe.yaml", config.to_yaml(recipe))


def begin(recipe: Recipe, resolved: dict[str, Any], start: int) -> None:
    """Write what is known before the first step. Checkpoints of later steps, and the figures of a run that begins at
    step 0, are removed."""
    folder = Path(recipe.out)
    files.sweep(folder)
    checkpoint.drop_after(folder, start)
    if start == 0 and (folder / "metrics.jsonl").exists():
        files.write_text(folder / "metrics.jsonl", "")
    note_recipe(recipe)
    files.write_json(folder / "resolved.json", {"recipe": config.to_dict(recipe), **resolved})

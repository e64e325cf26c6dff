"""goldengate-sae: harvest, learn, find and steer the features of a language model.

Public names resolve on first use, so that `sae --help` loads neither torch nor transformers.
Documents write `from sae import SAE, Host, ...`: every notebook has a variable called `sae`.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "SAE": "sae.autoencoder",
    "Host": "sae.host",
    "Recipe": "sae.recipe",
    "UserError": "sae.errors",
    "train": "sae.run",
    "train_many": "sae.run",
    "harvest": "sae.run",
    "evaluate": "sae.run",
    "index": "sae.run",
    "find": "sae.run",
    "steer": "sae.steering",
    "compare": "sae.steering",
}
__all__ = ["SAE", "Host", "Recipe", "UserError", "compare", "evaluate", "find", "harvest", "index", "steer", "train",
    "train_many"]  # fmt: skip

_OURS = {
    "HookedSAETransformer": "Host.load(name), host.run_with_saes(tokens, saes=[sae])",
    "SAETransformerBridge": "Host.load(name), host.run_with_saes(tokens, saes=[sae])",
    "LanguageModelSAERunnerConfig": "Recipe, or a recipe file for `sae train`",
    "LanguageModelSAETrainingRunner": "train(recipe)",
    "ActivationsStore": "harvest(recipe), then sae.activations.store.Store.open(folder)",
    "CacheActivationsRunner": "harvest(recipe)",
    "run_evals": "evaluate(sae)",
    "SAEConfig": "sae.autoencoder.SAEConfig",
    "TrainingSAE": "train(recipe)",
    "SparseAutoEncoder": "SAE.load(folder)",
    "AutoEncoder": "SAE.load(folder)",
    "AutoEncoderTopK": "SAE.load(folder)",
    "SparseCoder": "SAE.load(folder)",
    "Sae": "SAE.load(folder)",
    "load_dictionary": "SAE.load(folder)",
    "trainSAE": "train(recipe)",
    "ActivationBuffer": "harvest(recipe)",
}
"""What fingers of SAELens, sparsify and dictionary_learning type, and what it is here (docs/coming-from.md)."""

if TYPE_CHECKING:
    from sae.autoencoder import SAE
    from sae.errors import UserError
    from sae.host import Host
    from sae.recipe import Recipe
    from sae.run import evaluate, find, harvest, index, train, train_many
    from sae.steering import compare, steer


def __getattr__(name: str):
    if name in _OURS:
        # no AttributeError: of `from sae import NAME` Python would make a line that does not say it
        raise ImportError(f"sae has no {name}. Here it is {_OURS[name]}; see docs/coming-from.md.")
    if name not in _HOME:
        raise AttributeError(f"module 'sae' has no attribute {name!r} (public names: {', '.join(__all__)})")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)

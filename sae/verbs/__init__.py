"""The verbs of the command `sae`: which page has them, and what each does. Imports nothing."""

VERBS = {
    "harvest": ("learning", "run the host over the recipe's text and keep its activations in a store"),
    "verify": ("learning", "check a store of activations byte for byte"),
    "train": ("learning", "train an SAE from a recipe; a run folder goes on where it stopped"),
    "evaluate": ("learning", "measure an SAE on held-out text: FVU, L0, cross-entropy, KL, with intervals"),
    "index": ("finding", "record where every feature fires, for find and show"),
    "find": ("finding", "which features stand for a concept"),
    "show": ("finding", "one feature: statistics, top examples, what it promotes"),
    "label": ("finding", "your own names for features, by which find, show and steer know them"),
    "atlas": ("atlas", "which tokens lie near a word: in the embeddings, and layer by layer"),
    "diff": ("data", "which features tell two files of texts apart, with false discoveries held"),
    "classify": ("data", "how well a few features tell classes of texts, beside the residual and the words"),
    "steer": ("steering", "answer a prompt plain and with features turned up or down"),
    "calibrate": ("steering", "how far to turn a feature: chosen on half of the questions, reported on the others"),
    "effects": ("steering", "what a dial changes besides: perplexity, capability, refusals, other features"),
    "chat": ("steering", "talk to the model while features are turned up and down"),
    "convert": ("converting", "write an SAE in another library's layout, or dials as a small file that others load"),
    "push": ("sharing", "put an SAE on the Hugging Face Hub, with a model card"),
    "corpus": ("rest", "have the host write a corpus of its own"),
    "demo": ("rest", "the whole path on a small real model: harvest, train, evaluate, find, steer"),
    "info": ("rest", "what a folder is: an SAE, an activation store, an index, a run"),
}
ALIASES = {"eval": "evaluate"}

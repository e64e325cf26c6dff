"""The user's own names of features: `labels.json` in the folder of an SAE, {"1286": "the Golden Gate Bridge"}.

They belong to the SAE's weights: an SAE that was loaded takes them along when it is saved, and they go when other
weights are saved in their place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sae import files, locks
from sae.errors import UserError
from sae.places import Place

FILE = "labels.json"
_LONGEST = 200
_DIAL = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?[x×]?|off", re.IGNORECASE)


def read(folder: str | Path) -> dict[int, str]:
    """The labels of an SAE's folder; none where it has no such file. Raises UserError for a damaged one."""
    path = Path(folder) / FILE
    if not path.exists():
        return {}
    found: dict[int, str] = {}
    for key, label in files.read_json_object(path).items():
        if not re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", key):
            raise UserError(f"{path}: {key!r} is not a feature's number. Mend or delete that line.")
        found[int(key)] = label
    for feature, label in found.items():
        if feature < 0 or not isinstance(label, str):
            raise UserError(f"{path}: the label of {feature} is {label!r:.60}. Give words for a number from 0 up.")
    return found


def write(folder: str | Path, labels: Mapping[int, str]) -> None:
    """Write all labels of a folder."""
    files.write_json(Path(folder) / FILE, {str(feature): labels[feature] for feature in sorted(labels)})


def change(folder: str | Path, feature: int, label: str) -> dict[int, str]:
    """Give a feature a label, or with an empty one take it away; the labels after it.

    Raises UserError for one that another feature has, a number, one with '=' in it or of more than 200 characters.
    """
    label = " ".join(label.split())
    if _DIAL.fullmatch(label) or "=" in label or len(label) > _LONGEST:
        raise UserError(
            f"label: '{label[:60]}' would not be told from a number or a dial. Give words without '=', at most "
            f"{_LONGEST} characters."
        )
    with locks.lock(Place(Path(folder).resolve()), "labels"):
        known = read(folder)
        for other, name in known.items():
            if label and other != feature and name.casefold() == label.casefold():
                raise UserError(f"label: feature {other} has '{name}' already. Give another, or take that one away.")
        if label:
            known[feature] = label
        else:
            known.pop(feature, None)
        write(folder, known)
    return known


def feature_of(name: str | int, labels: Mapping[int, str]) -> int:
    """A feature by its number, or by its label (the whole, or the only one that holds these words).

    Raises UserError for a label that is not there, or several.
    """
    text = " ".join(str(name).split())
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    wanted = text.casefold()
    own = [feature for feature, label in labels.items() if label.casefold() == wanted]
    own = own or [feature for feature, label in labels.items() if wanted and wanted in label.casefold()]
    if len(own) == 1:
        return own[0]
    if own:
        several = ", ".join(f"{feature} ({labels[feature]})" for feature in own[:5])
        raise UserError(f"'{text[:60]}': {len(own)} features have that in their label: {several}. Give a number.")
    raise UserError(
        f"'{text[:60]}' is neither a feature's number nor a label. Look for it with `sae find`, or name a feature with "
        "`sae label`."
    )

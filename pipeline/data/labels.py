"""Label names of a data set matched to those of a model, one to one or not at all.

A wrong match would go unseen: the model would only look worse than it is. So names have to agree, and the order of
two lists counts for something only where one of them says nothing else.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from pipeline.plumbing.errors import InputError

_SEPARATORS = re.compile(r"[\s_\-\u2010-\u2015]+")
_WORDNET_ID = re.compile(r"n\d{8}")
_NAMED = 12


def match_labels(
    names: Sequence[str], model_labels: Sequence[str] | None, where: str, *, has_own_order: bool = False
) -> list[int]:
    """The model's class index of each label name of a data set; ``where`` names the data set in errors.

    ``model_labels``: names by class index; None for a model that takes the data set's own. ``has_own_order``: the
    names stand in an order that the data set gives them, not in the alphabet's.

    Names match where they are equal; else after normalising (:func:`normalised`); else if they share one of the
    synonyms that commas separate ("tabby, tabby cat"). Decimal numbers are class indices, unless the model's labels
    are numbers themselves. By position are matched, in equal number: lists that are alike at every place, some of whose
    names alone say too little (two cranes); names beside a model that has only ``LABEL_0`` and so on; WordNet ids
    beside names, or the reverse. Raises InputError with both lists for everything else.
    """
    if model_labels is None:
        return list(range(len(names)))
    known = _Labels(model_labels)
    matched = known.by_name(names)
    if matched is None and known.are_numbers:
        raise InputError(_complaint(names, known, where))
    if matched is None and names and all(name.isdecimal() for name in names):
        return _by_number(names, known, where)
    if matched is None and len(names) == len(model_labels):
        by_position = _alike_at_every_place(names, known) or _order_says_enough(names, model_labels, has_own_order)
        matched = list(range(len(names))) if by_position else None
    if matched is None:
        raise InputError(_complaint(names, known, where))
    return matched


def match_test_labels(names: Sequence[str], train_names: Sequence[str], where: str) -> list[int]:
    """Index in ``train_names`` of each label name of a test split, for a model that learns its labels from the train
    split; ``where`` names the data set in errors. Raises InputError for names that are not among them."""
    known = _Labels(train_names)
    matched = known.by_name(names)
    if matched is None:
        lacking = [name for name in names if not known.meant_by(name)]
        raise InputError(
            f"{where}: the test split has labels that cannot be found in the train split one to one: "
            f"{shortened(lacking or names)}; the model learns those of the train split: {shortened(train_names)}; the "
            f"test split has {shortened(names)}. Name the same labels in both"
        )
    return matched


def check_distinct(names: Sequence[str], where: str) -> None:
    """Raise InputError for two names that look the same, being different only in how Unicode composes them."""
    composed: dict[str, str] = {}
    for name in names:
        other = composed.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise InputError(
                f"{where}: two labels look the same, {other!r} ({other!a}) and {name!r} ({name!a}); make them one"
            )


def normalised(name: str) -> str:
    """A label name without what people write differently: Unicode form (NFKC) and case; underscores, hyphens and white
    space are one blank each; no zeros before a number."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    spaced = _SEPARATORS.sub(" ", folded).strip() or folded  # a class may be called "-"
    return spaced.lstrip("0") or "0" if spaced.isdecimal() else spaced


def shortened(names: Sequence[str]) -> str:
    """The first of ``names``, and how many they are if there are more."""
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return f"{shown}, … ({len(names)})" if len(names) > _NAMED else shown


# --- by name ---------------------------------------------------------------------------------------------------


class _Labels:
    """The labels of a model, to be looked up by name."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self._equal: dict[str, set[int]] = {}
        self._normalised: dict[str, set[int]] = {}
        self._synonyms: dict[str, set[int]] = {}
        for index, label in enumerate(labels):
            self._equal.setdefault(label, set()).add(index)
            self._normalised.setdefault(normalised(label), set()).add(index)
            for synonym in _synonyms(label):
                self._synonyms.setdefault(synonym, set()).add(index)

    @property
    def are_numbers(self) -> bool:
        """Whether a number among the names of data may be a label's name."""
        return any(normalised(label).isdecimal() for label in self.labels)

    def meant_by(self, name: str) -> set[int]:
        """The labels that ``name`` may mean: those that are equal to it, or if there is none, those that are after
        normalising, or those with a synonym in common."""
        return (
            self._equal.get(name)
            or self._normalised.get(normalised(name))
            or set().union(*(self._synonyms.get(synonym, set()) for synonym in _synonyms(name)))
        )

    def by_name(self, names: Sequence[str]) -> list[int] | None:
        """The one label that each of ``names`` means, no two the same; None where that cannot be said."""
        meant = [self.meant_by(name) for name in names]
        found = [min(labels) for labels in meant if len(labels) == 1]
        return found if len(set(found)) == len(names) else None


def _synonyms(label: str) -> set[str]:
    return {normalised(part) for part in label.split(",") if part.strip()}


# --- by number and by position -----------------------------------------------------------------------------------


def _by_number(names: Sequence[str], known: _Labels, where: str) -> list[int]:
    indices = [int(name) for name in names]
    if max(indices) >= len(known.labels):
        raise InputError(
            f"{where}: label {max(indices)} is out of range: the model has {len(known.labels)} labels, counted from 0: "
            f"{shortened(known.labels)}"
        )
    if len(set(indices)) < len(indices):
        raise InputError(_complaint(names, known, where))
    return indices


def _alike_at_every_place(names: Sequence[str], known: _Labels) -> bool:
    """Whether each name may mean the label at its place. Names that the model does not have count where they only add
    words or leave them out ("crane bird"), if at least half of all leave no doubt about the order."""
    certain = unknown = 0
    for index, name in enumerate(names):
        meant = known.meant_by(name)
        if meant and index not in meant:
            return False
        certain += meant == {index}
        if not meant:
            unknown += 1
            words, others = (set(normalised(text).split()) for text in (name, known.labels[index]))
            if not (words <= others or others <= words):
                return False
    return not unknown or 2 * certain >= len(names)


def _order_says_enough(names: Sequence[str], labels: Sequence[str], has_own_order: bool) -> bool:
    """Whether the order is all that one of the lists says, and the other's order can be no other."""
    if [normalised(label) for label in labels] == [f"label {index}" for index in range(len(labels))]:
        # "class_10" comes before "class_2" in the alphabet, but hardly in whoever numbered the labels.
        return has_own_order or list(names) == sorted(names, key=_by_value)
    if _are_wordnet_ids(names):
        return not _is_alphabetical(labels)  # then they are not in WordNet's order
    return _are_wordnet_ids(labels) and has_own_order and not _is_alphabetical(names)


def _are_wordnet_ids(names: Iterable[str]) -> bool:
    return all(_WORDNET_ID.fullmatch(name) for name in names)


def _is_alphabetical(names: Sequence[str]) -> bool:
    folded = [normalised(name) for name in names]
    return folded == sorted(folded)


def _by_value(name: str) -> list[tuple[int, str]]:
    """Key that sorts numbers within names by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _complaint(names: Sequence[str], known: _Labels, where: str) -> str:
    unknown = [name for name in names if not known.meant_by(name)]
    doubtful = [name for name in names if len(known.meant_by(name)) > 1]
    first: dict[int, str] = {}
    same = [
        f"{other!r} and {name!r}"
        for name in names
        if len(labels := known.meant_by(name)) == 1 and (other := first.setdefault(min(labels), name)) != name
    ]
    reasons = [f"unknown to the model: {shortened(unknown) or 'none'}"]
    reasons += [f"the same for several of its labels: {shortened(doubtful)}"] if doubtful else []
    reasons += [f"one label for the model: {'; '.join(same[:_NAMED])}"] if same else []
    return (
        f"{where}: {len(names)} labels do not match the model's {len(known.labels)}; {'; '.join(reasons)}; the data's "
        f"labels are {shortened(names)}; the model's labels are {shortened(known.labels)}. Name the data's labels as "
        "the model does, or by its class indices"
    )

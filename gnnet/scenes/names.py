"""Names of images that two sources write differently: `a.jpg`, `rear/a.jpg` and `night/rear/a.jpg` may be one."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from gnnet.files import alike

_SHOWN = 3  # names of a kind in a message
_log = logging.getLogger(__name__)
Value = TypeVar("Value")


class NameMatch(NamedTuple):
    """Names that a file gives, matched with names that are known.

    Args:
        given: the file's name by the known one.
        by_ending: known names that match by their ending only, or whose names are merely `alike`.
        ambiguous: names of the file that could be several known ones, or of which several could be the same one.
    """

    given: dict[str, str]
    by_ending: tuple[str, ...]
    ambiguous: tuple[str, ...]


def match_names(given: Iterable[str], known: Iterable[str]) -> NameMatch:
    """Match names exactly, else by the longest ending in whole parts of a path that leaves one choice.

    One name must be the ending of the other: `rear/a.jpg` matches `night/rear/a.jpg` and `a.jpg`, not `left/a.jpg`.
    A known name is taken once, by an exact name first. Where some names are exact, a file's longer name is of another
    image. What is left is matched in the same way but for what `alike` leaves out.

    Args:
        given: names of a file.
        known: names of a scene's images.
    """
    given, known = list(dict.fromkeys(given)), list(dict.fromkeys(known))
    match = _match(given, known)
    taken = {*match.given.values(), *match.ambiguous}
    theirs = _alone(name for name in given if name not in taken)
    ours = _alone(name for name in known if name not in match.given)
    if match.given:  # names are whole here
        again = {name: theirs[key] for key, name in ours.items() if key in theirs}
    else:
        again = {ours[key]: theirs[other] for key, other in _match(theirs, ours).given.items()}
    return NameMatch(match.given | again, (*match.by_ending, *again), match.ambiguous)


def _alone(names: Iterable[str]) -> dict[str, str]:
    """Names by what is `alike` in them, without those of which several are alike."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[alike("/".join(_parts(name)))].append(name)
    return {key: group[0] for key, group in groups.items() if len(group) == 1}


def _match(given: Iterable[str], known: Iterable[str]) -> NameMatch:
    """As `match_names`, but for names that are merely alike."""
    given, known = list(dict.fromkeys(given)), list(dict.fromkeys(known))
    exact = set(known).intersection(given)
    found = {name: name for name in known if name in exact}
    others = [name for name in given if name not in exact]
    if not others or len(exact) == len(known):
        return NameMatch(found, (), ())
    by_ending: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    whole: dict[tuple[str, ...], str] = {}
    for name in known:
        parts = _parts(name)
        whole.setdefault(parts, name)
        for start in range(len(parts)):
            by_ending[parts[start:]].append(name)
    claims: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)  # of known names: length of the ending, name
    ambiguous: list[str] = []
    for name in others:
        parts = _parts(name)
        choices = by_ending.get(parts, [])
        if not choices and not exact:
            shorter = (whole.get(parts[start:]) for start in range(1, len(parts)))
            choices = [longest for longest in shorter if longest is not None][:1]
        if len(choices) > 1:
            ambiguous.append(name)
        elif choices and choices[0] not in exact:
            claims[choices[0]].append((min(len(parts), len(_parts(choices[0]))), name))
    for name, claim in claims.items():
        longest = max(claim)[0]
        best = [claimed for length, claimed in claim if length == longest]
        if len(best) == 1:
            found[name] = best[0]
        else:
            ambiguous += best
    return NameMatch(found, tuple(name for name in found if name not in exact), tuple(ambiguous))


def by_known_name(
    found: Mapping[str, Value], known: Iterable[str], *, source: str, what: str
) -> dict[str, Value]:
    """What a file says of each image, by the name that is known; how names were matched is logged.

    Args:
        found: by the file's names.
        known: names of images, see `match_names`.
        source: the file and the setting that names it, for messages.
        what: what the known names are: `queries`, `references`.

    Raises:
        ValueError: if none of the file's names is known.
    """
    known = list(known)
    if not found:
        raise ValueError(f"{source} holds no name; expected those of the {what}")
    match = match_names(found, known)
    if not match.given:
        ours = f"the {what} are called {_some(known)}" if known else f"there are no {what}"
        unclear = f" ({_some(match.ambiguous)} could be several of them)" if match.ambiguous else ""
        raise ValueError(
            f"{source} has names as {_some(found)}, and {ours}: none is the same{unclear}; expected the names of the "
            f"{what}, or their endings (a.jpg or rear/a.jpg for night/rear/a.jpg), each for one image"
        )
    if match.by_ending:
        name = match.by_ending[0]
        _log.warning(
            "%s: %d of %d %s are matched by the ending or the likeness of their names, as %s in the file is %s",
            source, len(match.by_ending), len(known), what, match.given[name], name,
        )  # fmt: skip
    if match.ambiguous:
        _log.warning(
            "%s: %d names could be several of the %s, and are left out: %s",
            source, len(match.ambiguous), what, _some(match.ambiguous),
        )  # fmt: skip
    return {name: found[given] for name, given in match.given.items()}


def _parts(name: str) -> tuple[str, ...]:
    """Parts of a path; `\\` separates them too, as Windows writes it."""
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")

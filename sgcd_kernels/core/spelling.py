"""What a name that is not among the options was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def explain_choice(value: object, options: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """The end of an error message about a name that is not one of `options`: empty, or begins with "; ".

    `elsewhere` says what names are that other libraries have and this one lacks. They are no misspellings: 'sapo' is a
    loss of TRL, and one letter away from 'dapo'.

    >>> explain_choice("gpro", ["grpo", "gspo"])
    "; did you mean 'grpo'?"
    >>> explain_choice("SAPO", ["dapo"], {"sapo": "a loss of TRL that this library does not have"})
    "; 'sapo' is a loss of TRL that this library does not have"
    """
    elsewhere = elsewhere or {}
    known = {_plain(name): name for name in elsewhere}.get(_plain(str(value)))
    if known is not None:
        return f"; {known!r} is {elsewhere[known]}"
    near = nearest(str(value), list(options))
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(value: str, options: Sequence[str]) -> str | None:
    """The one option that `value` may be a misspelling of; None if there is none, or more than one equally near.

    Case, '_', '-' and spaces do not count. One edit is allowed, or two from 8 letters on: a letter left out, added or
    replaced, or two neighbours swapped. In names of up to 5 letters the first letter is not replaced: 'fapo' and
    'dapo' are two algorithms, and so are most names of that kind. Else the option that begins with the
    value, if that has 3 letters at least ('forward' is 'forward_kl').
    """
    plain = _plain(value)
    distances = {option: _edits(plain, _plain(option)) for option in options}
    close = [option for option, edits in distances.items() if _is_typo(plain, _plain(option), edits)]
    if close:
        least = min(distances[option] for option in close)
        close = [option for option in close if distances[option] == least]
    else:
        close = [option for option in options if len(plain) >= 3 and _plain(option).startswith(plain)]
    return close[0] if len(close) == 1 else None


def _is_typo(value: str, option: str, edits: int) -> bool:
    longest = max(len(value), len(option))
    if edits > max(1, longest // 4) or 2 * edits >= longest:
        return False
    replaced_first = edits and len(value) == len(option) and value[:1] != option[:1] and sorted(value) != sorted(option)
    return not (replaced_first and longest <= 5)


def _plain(name: str) -> str:
    return name.lower().translate({ord(c): None for c in "_- "})


def _edits(a: str, b: str) -> int:
    """The optimal string alignment distance: insertions, deletions, replacements, and swaps of neighbours."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]

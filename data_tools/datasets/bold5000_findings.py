"""What ``check`` finds in BOLD5000's stimulus lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from data_tools.datasets import bold5000_lists as lists
from data_tools.datasets.protocol import Finding
from data_tools.datasets.raw_files import read_lines


def compare_families(root: Path, subject: str, shown: lists.Presentation) -> Finding:
    """Compare the lists that were read with those of the other families that are there."""
    fact = "stimulus lists"
    for path in lists.flat_list_paths(root, subject):
        lines = read_lines(path, lists.DOWNLOAD)
        names = tuple(lists.plain_name(line) for line in lines)
        if names == shown.names:
            continue
        if len(names) != len(shown.names):
            detail = f"{path} has {len(names)} trials, {shown.sources[0].parent} {len(shown.names)}"
            return Finding(fact, False, detail)
        trial = next(i for i, name in enumerate(names) if name != shown.names[i])
        return Finding(
            fact, False, f"{path} line {trial + 1} is {names[trial]}, not {shown.names[trial]}"
        )
    return Finding(fact, True, f"{len(shown.names)} trials from {shown.sources[0].name} on")


def compare_repeats(
    subject: str, names: Sequence[str], repeated: Collection[str], complete: bool
) -> Finding:
    """Count how often the images of the repeated list were shown: not four times each.

    Args:
        subject: its name.
        names: image of each trial.
        repeated: images of the repeated list.
        complete: whether the published numbers must come out.
    """
    showings = Counter(name for name in names if name in repeated)
    found = dict(sorted(Counter(showings.values()).items()))
    published = lists.REPEATS[subject] if complete else found
    detail = f"{_words(found)} (images x showings)"
    if found != published:
        detail += f", published: {_words(published)}; {lists.DOWNLOAD}"
    return Finding("repeats", found == published, detail)


def _words(histogram: Mapping[int, int]) -> str:
    return ", ".join(f"{images} x {times}" for times, images in histogram.items())

"""What NSD declares about itself.

Source: the data description of NSD and its experimental design file; voxel counts of nsdgeneral
as printed by published decoders.
"""

from __future__ import annotations

from dataclasses import replace

from data_tools.datasets.protocol import Facts, SubjectFacts

TRIALS_PER_SESSION = 750

# sessions, distinct images, distinct shared images, trials with shared images, nsdgeneral voxels
_ALL_SESSIONS = {
    "subj01": (40, 10000, 1000, 3000, 15724),
    "subj02": (40, 10000, 1000, 3000, 14278),
    "subj03": (32, 9411, 930, 2371, 15226),
    "subj04": (30, 9209, 907, 2188, 13153),
    "subj05": (40, 10000, 1000, 3000, 13039),
    "subj06": (32, 9411, 930, 2371, 17907),
    "subj07": (40, 10000, 1000, 3000, 12682),
    "subj08": (30, 9209, 907, 2188, 14386),
}
_OLD_TEST_TRIALS = {40: 2770, 32: 2113, 30: 1985}
"""Trials with shared images by number of sessions, without the last three sessions."""
# With 37 sessions, all that was public before August 2023 for a subject of 40: 8,859 training
# images (24,980 trials) and 982 test images (2,770 trials).
_FIRST_37 = (8859 + 982, 982, 2770)


def facts(max_sessions: int | None, default_roi: bool) -> Facts:
    """Return the declared facts for the first ``max_sessions`` sessions (None: all).

    Counts of images are declared for all sessions and for the first 37, the two releases.
    """
    subjects = {}
    for name, (sessions, images, test_images, test_trials, voxels) in _ALL_SESSIONS.items():
        read = sessions if max_sessions is None else min(sessions, max_sessions)
        counts: tuple[int | None, int | None, int | None] = (images, test_images, test_trials)
        if read < sessions:
            counts = _FIRST_37 if (sessions, read) == (40, 37) else (None, None, None)
        subjects[name] = SubjectFacts(
            sessions=read,
            trials=read * TRIALS_PER_SESSION,
            images=counts[0],
            test_images=counts[1],
            test_trials=counts[2],
            train_images=_less(counts[0], counts[1]),
            train_trials=_less(read * TRIALS_PER_SESSION, counts[2]),
            voxels=voxels if default_roi else None,
        )
    return Facts(
        dataset="nsd",
        subjects=subjects,
        unit="percent signal change",
        licence="NSD Terms and Conditions (no redistribution)",
        citation=(
            "Allen et al. (2022), A massive 7T fMRI dataset to bridge cognitive neuroscience and "
            "artificial intelligence, Nature Neuroscience 25, doi:10.1038/s41593-021-00962-x"
        ),
        redistributable=False,
    )


def mindeye2_facts(max_sessions: int | None, test: str) -> Facts:
    """Return the facts of MindEye2's package, whose folder ``test`` is of the older release.

    With that folder only training counts and test trials of all sessions are declared.
    """
    whole = facts(max_sessions, default_roi=True)
    subjects = dict(whole.subjects)
    if test == "test":
        for name, stated in subjects.items():
            known = max_sessions is None or max_sessions >= _ALL_SESSIONS[name][0]
            subjects[name] = replace(
                stated,
                trials=None,
                images=None,
                test_images=None,
                test_trials=_OLD_TEST_TRIALS[_ALL_SESSIONS[name][0]] if known else None,
            )
    return replace(whole, subjects=subjects, unit="z")


def _less(total: int | None, part: int | None) -> int | None:
    return None if total is None or part is None else total - part

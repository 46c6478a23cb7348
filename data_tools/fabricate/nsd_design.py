"""The NSD experiment: which image in which trial, and the tables that say so.

Axes: N planned trials (equal for all subjects), M images of a subject (the real data: 10,000).

Ids are 1-based in files (73KID, 10KID, subjectim, sharedix, masterordering) except ``nsdId``, the
row of the stimulus file, which is 0-based.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.fabricate import coco, deterministic
from data_tools.fabricate.catalogue import NSD_SUBJECTS, Catalogue
from data_tools.fabricate.nsd_order import planned_order
from dist_decoder.rng import numpy_generator

RUNS = 12
_EXECUTED_SHARE = {3: 0.8, 6: 0.8, 4: 0.75, 8: 0.75}
"""Subjects that stopped early: 32 and 30 of 40 sessions."""
_SLOT_SHARE = 0.84
"""Share of a run's four-second slots that show an image: 63 of 75."""
_MINUTES_PER_DAY = 24 * 60


class NsdDesign:
    """The design of one seed."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.config = catalogue.config.nsd
        self.seed = catalogue.seed

    def executed_sessions(self, subject: int) -> int:
        """Return how many of the planned sessions a subject took part in."""
        return max(1, round(self.config.sessions * _EXECUTED_SHARE.get(subject, 1.0)))

    @cached_property
    def order_N(self) -> NDArray[np.int64]:
        """0-based image id of every planned trial; each id three times."""
        size = (self.config.sessions, self.config.trials_per_session, self.config.shared_images)
        return planned_order(*size, numpy_generator(self.seed, "nsd order"))

    def rows(self, subject: int, session: int) -> NDArray[np.int64]:
        """Return the 0-based stimulus rows of a session (1-based), trial by trial."""
        count = self.config.trials_per_session
        ids = self.order_N[(session - 1) * count : session * count]
        return self.catalogue.nsd_image_of_id[subject - 1, ids]

    def trials_per_run(self) -> NDArray[np.int64]:
        """Return (12,) trials of each run: 63, 62, 63, ... for 750."""
        bounds = np.ceil(self.config.trials_per_session * np.arange(RUNS + 1) / RUNS)
        return np.diff(bounds).astype(np.int64)

    def expdesign(self) -> bytes:
        """Return ``nsd_expdesign.mat``."""
        sessions, shared = self.config.sessions, self.config.shared_images
        image_of_id = (self.catalogue.nsd_image_of_id + 1).astype(np.int32)
        per_session = self.order_N.reshape(sessions, -1)
        counts = np.stack(
            [np.bincount(np.bincount(ids)[np.unique(ids)], minlength=4)[1:4] for ids in per_session]
        )
        return deterministic.mat(
            {
                "masterordering": (self.order_N[None] + 1).astype(np.uint16),
                "subjectim": image_of_id,
                "sharedix": image_of_id[:1, :shared],
                "stimpattern": self._slots(),
                "basiccnt": counts.T.astype(np.uint16),
            }
        )

    def _slots(self) -> NDArray[np.uint8]:
        per_run = self.trials_per_run()
        num_slots = int(np.ceil(per_run.max() / _SLOT_SHARE))
        pattern = np.zeros((self.config.sessions, RUNS, num_slots), np.uint8)
        draw = numpy_generator(self.seed, "nsd slots")
        for session in range(self.config.sessions):
            for run in range(RUNS):
                used = draw.choice(num_slots, size=per_run[run], replace=False)
                pattern[session, run, used] = 1
        return pattern

    def stim_info(self) -> bytes:
        """Return ``nsd_stim_info_merged.csv``, 41 columns."""
        pictures = self.catalogue.nsd
        count = len(pictures)
        draw = numpy_generator(self.seed, "nsd stim info")
        once, repeated = self.catalogue.bold
        in_bold = {picture.uid for picture in (*once, *repeated)}
        images = self.images
        shared = np.zeros(count, bool)
        shared[self.catalogue.nsd_image_of_id[0, : self.config.shared_images]] = True
        columns: dict[str, object] = {
            "cocoId": [image.coco_id for image in images],
            "cocoSplit": [image.split for image in images],
            "cropBox": [
                "(" + ", ".join(f"{part:.6g}" for part in image.crop) + ")" for image in images
            ],
            "loss": draw.uniform(0, 0.4, size=count).round(6),
            "nsdId": np.arange(count),
            "flagged": draw.random(count) < 0.01,
            "BOLD5000": [picture.uid in in_bold for picture in pictures],
            "shared1000": shared,
        }
        repetitions = {}
        for subject in range(1, NSD_SUBJECTS + 1):
            position_M3 = self._planned_positions(subject)
            columns[f"subject{subject}"] = (position_M3[:, 0] > 0).astype(int)
            for index in range(3):
                repetitions[f"subject{subject}_rep{index}"] = position_M3[:, index]
        return deterministic.table(pd.DataFrame(columns | repetitions), ",", index=True)

    @cached_property
    def images(self) -> tuple[coco.CocoImage, ...]:
        """COCO facts by stimulus row."""
        ids = [int(picture.uid.removeprefix("coco:")) for picture in self.catalogue.nsd]
        num_categories = self.catalogue.config.num_categories
        return tuple(coco.coco_image(self.seed, coco_id, num_categories) for coco_id in ids)

    def _planned_positions(self, subject: int) -> NDArray[np.int64]:
        """Return (stimuli, 3) 1-based positions in the plan, 0 where the subject has none."""
        positions = np.zeros((self.catalogue.num_nsd_images, 3), np.int64)
        by_id = np.argsort(self.order_N, kind="stable").reshape(-1, 3) + 1
        positions[self.catalogue.nsd_image_of_id[subject - 1]] = by_id
        return positions

    def responses(self, subject: int) -> bytes:
        """Return ``responses.tsv``: 19 columns, one row per executed trial."""
        draw = numpy_generator(self.seed, "nsd behaviour", subject)
        count = self.config.trials_per_session
        run, trial = self._run_and_trial()
        frames = []
        seen: set[int] = set()
        for session in range(1, self.executed_sessions(subject) + 1):
            rows = self.rows(subject, session)
            old_now, old = np.zeros(count), np.zeros(count)
            seen_now: set[int] = set()
            for index, row in enumerate(rows.tolist()):
                old[index], old_now[index] = row in seen, row in seen_now
                seen.add(row)
                seen_now.add(row)
            answered = draw.random(count) > 0.03
            right = draw.random(count) < 0.8
            minutes = np.arange(count) * 60 / count
            ids = self.order_N[(session - 1) * count : session * count]
            frames.append(
                pd.DataFrame(
                    {
                        "SUBJECT": subject,
                        "SESSION": session,
                        "RUN": run,
                        "TRIAL": trial,
                        "73KID": rows + 1,
                        "10KID": ids + 1,
                        "TIME": (7 * (session - 1) + 0.4 + minutes / _MINUTES_PER_DAY).round(6),
                        "ISOLD": old.astype(int),
                        "ISCORRECT": np.where(answered, right, np.nan),
                        "RT": np.where(answered, draw.uniform(400, 2500, count).round(3), np.nan),
                        "CHANGEMIND": np.where(answered, draw.random(count) < 0.02, np.nan),
                        "MEMORYRECENT": np.where(old > 0, draw.integers(1, 500, count), np.nan),
                        "MEMORYFIRST": np.where(old > 0, draw.integers(1, 900, count), np.nan),
                        "ISOLDCURRENT": old_now.astype(int),
                        "ISCORRECTCURRENT": np.where(answered, right, np.nan),
                        "TOTAL1": np.where(answered & (right != (old > 0)), 1, 0),
                        "TOTAL2": np.where(answered & (right == (old > 0)), 1, 0),
                        "BUTTON": np.where(answered, np.where(right == (old > 0), 2, 1), np.nan),
                        "MISSINGDATA": 0,
                    }
                )
            )
        return deterministic.table(pd.concat(frames), "\t")

    def _run_and_trial(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        per_run = self.trials_per_run()
        run = np.repeat(np.arange(1, RUNS + 1), per_run)
        return run, np.concatenate([np.arange(1, n + 1) for n in per_run])

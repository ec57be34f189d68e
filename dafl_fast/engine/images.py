"""Images that the user gave, on the device: where the student's real images come from.

Photographs are cut at every step: many crops, of which the teacher's answers choose the few that go
into a ring. Images of the teacher's size are in it from the beginning, and are varied at every
step. Images of classes that are rare are drawn more often.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data import Normaliser
from ..errors import UserError
from ..unlabelled import Given
from .bank import ReplayBank
from .crops import Cutter
from .distributed import World
from .estimate import FEWEST as ENOUGH

# Of the crops that the teacher sees, one in so many is kept if there are photographs. Of whole
# images all are: any of them looks like something, and a student soon knows few ones by heart.
KEPT = 4
# No image is drawn more often than so many times the average, however rare its class.
MOST_OFTEN = 8
# Whole images are turned by 180° too if the teacher knows them, and doubts them at most so much
# more then.
DOUBTFUL = 1.5
# Images that the teacher answers at once when the bank is filled.
_BATCH = 256
# Of whole images so many at least are held out, if that is no more than one in ten, so none of
# fewer than 80; and the number of their variants that tell how good the student is.
UNSEEN, RARELY, SHOWN = 8, 10, 2 * _BATCH
FEWEST = UNSEEN * RARELY
OTHER_SEED = 2**62 + 1  # of these; with that of the run, its first crops would be the same
# What a batch is drawn from, see `sources_of`.
Sources = list[tuple[ReplayBank, int, slice]]


class BalancedBank(ReplayBank):
    """A replay bank that draws each image the more often, the fewer of its class there are.

    A class is the one that the teacher's logits choose. All classes are drawn equally often, except
    that no image is drawn more than `MOST_OFTEN` times as often as the average one. Call `weigh`
    between `add` and `draw`.
    """

    def __init__(
        self,
        capacity: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        dtype: str = "bf16",
        device: torch.device | str = "cpu",
        held_out: int = 0,
    ) -> None:
        super().__init__(capacity, image_shape, num_classes, dtype, device, held_out)
        # These follow from the logits.
        self.labels = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        # Images that tell how good the student is, if they are not among the ring's.
        self.unseen: Callable[[], ReplayBank] | None = None
        self._cumulative = torch.zeros(capacity, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, images: Tensor, logits: Tensor) -> None:
        """Stores a batch: images [N, C, H, W], logits [N, num_classes]."""
        where = (self.count + torch.arange(len(images), device=images.device)) % self.capacity
        self.labels.index_copy_(0, where, logits.argmax(1))
        super().add(images, logits)

    def restore(self, start: int, entries: dict[str, Tensor]) -> None:
        """Writes back the entries that `span` returned."""
        super().restore(start, entries)
        logits = entries["logits"].to(self.labels.device)
        self.labels[self._slots(start, start + len(logits))] = logits.argmax(1)
        self.weigh()

    def held_out(self, most: int) -> tuple[Tensor, Tensor]:
        """Up to `most` images that `draw` never returns, and nothing like them; and their logits.
        Waits for the device."""
        return super().held_out(most) if self.unseen is None else self.unseen().newest(most)

    @torch.no_grad()
    def weigh(self) -> None:
        """Counts the images of each class, and sets how often each image is drawn."""
        held = self.count.clamp(max=self.capacity)
        places = torch.arange(self.capacity, device=held.device)
        filled = places < held
        self.counts.zero_().index_add_(0, self.labels, filled.to(torch.int64))
        least = held.double() / (MOST_OFTEN * len(self.counts))
        if self._held_out:
            filled &= places % self._held_out != self._held_out - 1
        weights = filled / torch.maximum(self.counts.double(), least)[self.labels]
        torch.cumsum(weights, 0, out=self._cumulative)

    def _chosen(self, random: Tensor) -> Tensor:
        place = random.double() * (self._cumulative[-1] / torch.iinfo(torch.int64).max)
        which = torch.searchsorted(self._cumulative, place, right=True)
        # A number that is rounded up to the end would lie behind the last image.
        return torch.minimum(which, self.count.clamp(max=self.capacity) - 1)


class Found:
    """The user's images with the teacher's answers, as a bank to draw from.

    Of whole images some are held out, of which the student learns nothing. Their variants, and
    other crops of the photographs, tell how good it is. They are cut once.

    Args:
        config: sizes and shares.
        given: the images.
        num_classes: of the teacher.
        random: the source of randomness, on the device where the images are kept.
        world: the processes that share the candidates. All have the same bank.
        answer: the teacher: images [n, C, H, W] -> images as they are kept, and logits.

    Raises:
        UserError: the run ends when the student no longer gets better, and no image tells that.
    """

    def __init__(
        self,
        config: Config,
        given: Given,
        num_classes: int,
        random: torch.Generator,
        world: World,
        answer: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self._random, self._world, self._answer = random, world, answer
        self._words, self.fingerprint = given.words, given.fingerprint()
        # Only whole images of the user's tell how good the student is on real ones.
        self.drawn, self.tells = given.drawn > 0, not (given.photographs or given.sketches)
        self._candidates, device = config.candidates, random.device
        self._rows = world.rows_of_batch("images-candidates", self._candidates)
        self.kept = max(1, self._candidates // (KEPT if given.photographs else 1))
        self.share = config.images_share if config.generator != "none" else 1.0
        given, unseen = _parted(given, config.bank_held_out)
        shape, dtype, capacity = config.shape, config.bank_dtype, len(given.whole)
        self.cutter: Cutter | None = None
        if given.form is not None:
            self.cutter = Cutter(given, shape, device)
            capacity = max(capacity, self.kept, round(self.share * config.bank_images))
        held_out = config.bank_held_out if unseen is None else 0
        self.bank = BalancedBank(capacity, shape, num_classes, dtype, device, held_out)
        self.bank.varied = self.cutter is not None
        if len(given.whole):
            self._fill(given)
        judged = SHOWN if given.photographs else len(given.whole) // max(1, held_out)
        if unseen is not None:
            judged = SHOWN if unseen.photographs or len(unseen.whole) else 0
            empty = ReplayBank(SHOWN, shape, num_classes, dtype, device)
            make = partial(self._varied, unseen, empty) if judged else lambda: empty
            self.bank.unseen = cache(make)
        if judged < ENOUGH and config.until_flat and config.generator == "none":
            raise UserError(
                "--until-flat needs images that tell how good the student is: a photograph, "
                f"{FEWEST} whole ones as files, or {ENOUGH * config.bank_held_out:,} in a tensor, "
                f"got {self.words}"
            )

    @torch.no_grad()
    def _fill(self, given: Given) -> None:
        """Puts whole images into the bank as they are. The teacher's answers to the user's decide
        whether variants are turned by 180°."""
        device, doubts = self._random.device, []
        prepared = torch.nn.Identity() if given.form is None else Normaliser(given.form).to(device)
        own, sketches = given.whole[: given.own], given.whole[given.own :]
        for part in own.split(_BATCH) if len(own) else ():
            images = prepared(part.to(device))
            answers = [self._answer(images)]
            self.bank.add(*answers[0])
            if self.cutter is not None:
                answers.append(self._answer(images.flip(2, 3)))
                sure = [logits.float().softmax(1).amax(1) for _, logits in answers]
                doubts.append((1 - torch.stack(sure)).sum(1))
        if self.cutter is not None and doubts:
            upright, turned = torch.stack(doubts).sum(0)
            knows = 2 * upright < len(own) * (1 - 1 / len(self.bank.counts))
            turns = knows & (turned <= DOUBTFUL * upright)
            self.cutter.half_turns.fill_(self._world.decide(lambda: bool(turns)))
        if len(sketches):  # Their variants follow soon: a slow teacher need not see all before.
            self.bank.add(*self._answer(prepared(sketches[:_BATCH].to(device))))
        self.bank.weigh()

    def _varied(self, unseen: Given, into: ReplayBank) -> ReplayBank:
        """Variants of images that the student never sees. They are made when they are first asked
        for: a resumed run knows by then whether it turns them."""
        assert self.cutter is not None
        random = torch.Generator(self._random.device).manual_seed(OTHER_SEED)
        cutter = Cutter(unseen, self.cutter.shape, self._random.device)
        cutter.half_turns.copy_(self.cutter.half_turns)
        while len(into) < SHOWN:
            into.add(*self._answer(cutter.cut(_BATCH, random)))
        return into

    @property
    def live(self) -> dict[str, Tensor]:
        """What a checkpoint has of them, beside the bank's entries."""
        if self.cutter is None:
            return {}
        return {"found_added": self.bank.count, "half_turns": self.cutter.half_turns}

    @property
    def words(self) -> str:
        """How many there are of which kind, and how they are varied. Waits for the device."""
        turned = self.cutter is not None and bool(self.cutter.half_turns)
        return self._words + ", half of whose variants are turned by 180°" * turned

    def renew(self) -> tuple[Tensor, Tensor]:
        """Cuts candidates, and puts those of them into the bank that help. Returns these: images
        [kept, C, H, W] and logits."""
        images, logits = map(self._world.gather, self._cut(self._rows))
        which = self.chosen(logits)
        images, logits = images.index_select(0, which), logits.index_select(0, which)
        self.bank.add(images, logits)
        self.bank.weigh()
        return images, logits

    def fresh(self) -> tuple[Tensor, Tensor]:
        """Candidates, chosen by nobody, and the teacher's logits for them; of images that were
        given as a tensor, as many as the bank draws."""
        if self.cutter is None:
            return self.bank.draw(self._candidates, self._random)
        return self._cut()

    def _cut(self, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        assert self.cutter is not None
        return self._answer(self.cutter.cut(self._candidates, self._random, rows))

    def chosen(self, logits: Tensor) -> Tensor:
        """Which of the candidates go into the bank, given the teacher's logits for all of them.

        An image counts as much as the teacher's confidence in it, divided by the number of its
        class that come before it: those in the bank, and those of the candidates of which the
        teacher is surer. So each place goes to the class that is furthest behind, unless the
        teacher is not sure at all.
        """
        confidence, labels = logits.float().softmax(1).max(1)
        surer = confidence.unsqueeze(0) > confidence.unsqueeze(1)
        surer |= (confidence.unsqueeze(0) == confidence.unsqueeze(1)).tril(-1)  # equal: the first
        before = (surer & (labels.unsqueeze(0) == labels.unsqueeze(1))).sum(1)
        score = confidence / (1 + self.bank.counts[labels] + before)
        return score.topk(self.kept).indices

    def summary(self) -> dict[str, Any]:
        """What summary.json says of them. Waits for the device."""
        return {
            "images": self.words,
            "images_share": self.share,
            "images_class_counts": self.bank.counts.tolist(),
        }


def _parted(given: Given, held_out: int) -> tuple[Given, Given | None]:
    """The images to learn from, and if some of them are varied, those of which the variants tell
    how good the student is: one in `held_out` of the whole ones, at most one in ten, of few ones
    none. A variant of any other would be like one that the student has learned from."""
    count = len(given.whole)
    if not held_out or given.form is None or not count:
        return given, None
    unseen = torch.zeros(count, dtype=torch.bool)
    if count >= FEWEST:
        every = min(max(held_out, RARELY), count // UNSEEN)
        random = torch.Generator().manual_seed(OTHER_SEED)  # classes may come in turn
        unseen[torch.randperm(count, generator=random)[: count // every]] = True
    return given.part(~unseen), given.part(unseen)


def sources_of(
    found: Found | None, generated: ReplayBank | None, count: int, rows: slice
) -> Sources:
    """What a batch of `count` images is drawn from: the banks, how many images from each, and which
    of those are among the batch's `rows`. The images that were found come first, and are all if
    nothing is generated."""
    parts: list[tuple[ReplayBank, int]] = []
    if found is not None:
        taken = min(max(1, round(found.share * count)), count - 1)
        parts.append((found.bank, count if generated is None else taken))
    if generated is not None:
        parts.append((generated, count - sum(taken for _, taken in parts)))
    sources: Sources = []
    start = 0
    for bank, taken in parts:
        first, last = (min(max(row - start, 0), taken) for row in (rows.start, rows.stop))
        sources.append((bank, taken, slice(first, last)))
        start += taken
    return sources


def draw_from(
    sources: Sources, random: torch.Generator, crop: int, flip: bool
) -> tuple[Tensor, Tensor]:
    """A batch from several banks, see `sources_of` and `ReplayBank.draw`: images and logits. What
    is varied already is not shifted: its edge would be reflected for nothing."""
    drawn = [
        bank.draw(count, random, rows, 0 if bank.varied else crop, flip)
        for bank, count, rows in sources
    ]
    if len(drawn) == 1:
        return drawn[0]
    images, logits = zip(*drawn, strict=True)
    return torch.cat(images), torch.cat(logits)


def held_out_of(sources: Sources, most: int) -> tuple[Tensor, Tensor]:
    """Up to `most` images that are never drawn, and their logits: from each bank the share that it
    has in a batch, if it has as many. Waits for the device."""
    batch = sum(count for _, count, _ in sources)
    parts = [bank.held_out(max(1, most * count // batch)) for bank, count, _ in sources]
    images, logits = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(logits)

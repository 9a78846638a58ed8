"""Pretrain the text encoders on captions alone: from token ids to what stands where.

    python -m training.train_text --minutes 60 --out training/weights/text-encoders.safetensors
    python -m training.train_text --init ENCODERS --listener FILE ...

FLUX is given T5 and CLIP ready-made, and so is the demo model: trained from scratch beside the
transformer, at its learning rate, T5 stayed a bag of words and "an owl above a mushroom" came out
either way round (LOG.md). What a caption says of a picture is a few numbers, so no picture is
needed: each encoder learns, by itself, to predict the thing in each of 4 x 4 cells, its tint and
the background's colour. A CPU does it in an hour. The heads are dropped.

With `--listener`, an all-in-one file, they also learn to be understood by the file's transformer
(`listener`), whose two text layers for them are written beside them: a warm start then keeps what
it can draw.

Shape letters, in this module only:
    B  batch    T  text tokens    D  T5's width    P  CLIP's width    R  cells, 16
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import WORK
from training.checkpoint import load_tensors, part_of, save_tensors
from training.dataset import load_scenes
from training.demo_tokenizers import load_tokenizer
from training.grammar import TINTS, load_things
from training.listener import Listener
from training.networks import ClipText, Sizes, T5Encoder, start_clip, start_t5
from training.runtime import Log, decay, ramp

OUT = Path(__file__).parent / "weights" / "text-encoders.safetensors"
CELL = 64  # pixels; all sprites' edges and the centres of places fall between cells
CELLS_PER_SIDE = 4
NUM_CELLS = CELLS_PER_SIDE**2
READER_WIDTH, CLIP_READER_WIDTH = 192, 64
BATCH_SIZE = 96
LEARNING_RATE, HEAD_LEARNING_RATE = 3e-4, 1e-3
LISTENER_WEIGHT = 4.0  # of the share of variance missed, at most about 1
SHADE_WEIGHT = 5.0  # makes the error of a colour, at most 1, weigh about as much as a cell's
NUM_HELD_OUT = 512
STEPS_BETWEEN_NOTES = 100


def cells_of(objects: Tensor) -> tuple[Tensor, Tensor]:
    """Which thing and which tint covers the centre of each cell: (B, 4, 5) -> (B, R) twice.

    0 is nothing, or no tint; otherwise the index plus one.
    """
    centre = torch.arange(CELLS_PER_SIDE) * CELL + CELL // 2
    y_R, x_R = (axis.flatten() for axis in torch.meshgrid(centre, centre, indexing="ij"))
    things = torch.zeros(len(objects), NUM_CELLS, dtype=torch.int64)
    tints = torch.zeros_like(things)
    for thing, x, y, size, tint in (objects[:, sprite].split(1, dim=1) for sprite in range(4)):
        reach = size / 2
        is_inside = (thing >= 0) & ((x_R - x).abs() < reach) & ((y_R - y).abs() < reach)
        things = torch.where(is_inside, thing + 1, things)
        tints = torch.where(is_inside, tint + 1, tints)
    return things, tints


class Outputs(nn.Module):
    """From a vector for each cell to things and tints; from their mean to the background."""

    def __init__(self, width: int, num_things: int) -> None:
        super().__init__()
        self.thing = nn.Linear(width, num_things + 1)
        self.tint = nn.Linear(width, len(TINTS) + 1)
        self.shade = nn.Linear(width, 3)

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, R, width) -> logits (B, R, things), (B, R, tints), colour (B, 3)."""
        return self.thing(cells), self.tint(cells), self.shade(cells.mean(1)).sigmoid()


class TokenReader(nn.Module):
    """Each cell looks at T5's tokens, as image tokens will: (B, T, D) -> `Outputs`."""

    def __init__(self, num_things: int, width: int = READER_WIDTH) -> None:
        super().__init__()
        self.queries_RD = nn.Parameter(torch.randn(NUM_CELLS, width) / 2)
        self.token_norm = nn.LayerNorm(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, 6, batch_first=True) for _ in range(2)
        )
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.outputs = Outputs(width, num_things)

    def forward(self, tokens_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> as `Outputs`."""
        tokens_BTD = self.token_norm(tokens_BTD)
        x_BRD = self.queries_RD.expand(len(tokens_BTD), -1, -1)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x_BRD = x_BRD + attention(norm(x_BRD), tokens_BTD, tokens_BTD, need_weights=False)[0]
            x_BRD = x_BRD + self.inner(x_BRD)
        return self.outputs(x_BRD)


class PooledReader(nn.Module):
    """CLIP's one vector spread over the cells: (B, P) -> `Outputs`."""

    def __init__(self, num_things: int, pooled_width: int) -> None:
        super().__init__()
        inner, width = 768, CLIP_READER_WIDTH
        self.spread = nn.Sequential(
            nn.Linear(pooled_width, inner), nn.GELU(), nn.Linear(inner, NUM_CELLS * width)
        )
        self.outputs = Outputs(width, num_things)

    def forward(self, pooled_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, P) -> as `Outputs`."""
        spread = self.spread(pooled_BP).unflatten(1, (NUM_CELLS, -1))
        return self.outputs(F.gelu(spread))


class Lesson:
    """Encoders, readers, captions and scenes: one loss of random captions, one score of unseen."""

    def __init__(
        self, scenes_path: Path, *, init: Path | None = None, listener: Path | None = None
    ) -> None:
        scenes = {name: torch.from_numpy(a) for name, a in load_scenes(scenes_path).items()}
        self.objects, self.shades = scenes["objs"].long(), scenes["bg"].float() / 255
        self.t5_ids, self.clip_ids = scenes["t5"], scenes["clip"]
        is_pair = (self.objects[:, 1, 0] >= 0) & (self.objects[:, 0, 0] != self.objects[:, 1, 0])
        self.unseen = torch.nonzero(is_pair)[-NUM_HELD_OUT:, 0]
        self.num_seen = int(self.unseen[0])
        sizes = Sizes(
            t5_vocabulary=load_tokenizer("t5").get_vocab_size(),
            clip_vocabulary=load_tokenizer("clip").get_vocab_size(),
        )
        num_things = len(load_things())
        self.t5, self.clip = start_t5(T5Encoder(sizes)), start_clip(ClipText(sizes))
        self.listener = None if listener is None else Listener(listener, sizes)
        if init is not None:
            self.load(load_tensors(init))
        self.token_reader = TokenReader(num_things, sizes.t5_width)
        self.pooled_reader = PooledReader(num_things, sizes.clip_width)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over encoders that `tensors` once gave."""
        for name, module in (("t5", self.t5), ("clip", self.clip)):
            module.load_state_dict(part_of(tensors, name))
        if self.listener is not None and (ears := part_of(tensors, "transformer")):
            self.listener.ears.load(ears)

    def tensors(self) -> dict[str, Tensor]:
        """The encoders, and the transformer's layers for them if there is a listener, bfloat16."""
        parts = {"t5": self.t5.state_dict(), "clip": self.clip.state_dict()}
        if self.listener is not None:
            parts["transformer"] = self.listener.ears.tensors()
        return {
            f"{name}.{inner}": tensor.to(torch.bfloat16)
            for name, part in parts.items()
            for inner, tensor in part.items()
        }

    def encode(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """T5's tokens and CLIP's vector of these captions."""
        return self.t5(self.t5_ids[chosen].long()), self.clip(self.clip_ids[chosen].long())

    def read(self, encoded: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What each encoder's reader says of captions."""
        tokens_BTD, pooled_BP = encoded
        return [self.token_reader(tokens_BTD), self.pooled_reader(pooled_BP)]

    def missed(self, chosen: Tensor, encoded: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Which share of what it heard of captions the listener misses; nothing without one."""
        if self.listener is None:
            return []
        ids = self.t5_ids[chosen].long(), self.clip_ids[chosen].long()
        return self.listener.missed(ids, encoded)

    def loss(self) -> Tensor:
        """The sum of all errors on a random batch."""
        chosen = torch.randint(self.num_seen, (BATCH_SIZE,))
        things_BR, tints_BR = cells_of(self.objects[chosen])
        encoded = self.encode(chosen)
        total = LISTENER_WEIGHT * sum(self.missed(chosen, encoded), start=torch.zeros(()))
        for thing, tint, shade in self.read(encoded):
            total = total + F.cross_entropy(thing.flatten(0, 1), things_BR.flatten())
            total = total + F.cross_entropy(tint.flatten(0, 1), tints_BR.flatten())
            total = total + SHADE_WEIGHT * F.mse_loss(shade, self.shades[chosen])
        return total

    @torch.no_grad()
    def report(self) -> str:
        """Of unseen pairs: covered cells that each reader gets right, what the listener misses."""
        things_BR, _ = cells_of(self.objects[self.unseen])
        is_covered = things_BR > 0
        encoded = self.encode(self.unseen)
        said = (thing.argmax(-1) for thing, _, _ in self.read(encoded))
        t5, clip = ((s == things_BR)[is_covered].float().mean().item() for s in said)
        missed = [f"{error.item():.3f}" for error in self.missed(self.unseen, encoded)]
        end = f"; the listener misses {' and '.join(missed)}" if missed else ""
        return f"cells of unseen pairs: T5 {t5:.3f}, CLIP {clip:.3f}{end}"


def train(lesson: Lesson, seconds: float, log: Log) -> None:
    """AdamW until the time is over; the rate falls over the last 60 % of it."""
    encoders = [*lesson.t5.parameters(), *lesson.clip.parameters()]
    heads: list[nn.Module] = [lesson.token_reader, lesson.pooled_reader]
    if lesson.listener is not None:
        heads.append(lesson.listener.ears)
    readers = [parameter for head in heads for parameter in head.parameters()]
    rates = (LEARNING_RATE, HEAD_LEARNING_RATE)
    groups = [{"params": group} for group in (encoders, readers)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    start, step = time.monotonic(), 0
    while (spent := time.monotonic() - start) < seconds:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * ramp(step, 100) * decay(spent / seconds)
        loss = lesson.loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*encoders, *readers], 1.0)
        optimizer.step()
        step += 1
        if step % STEPS_BETWEEN_NOTES == 0:
            log(f"step {step} at {spent:.0f} s: loss {loss.item():.3f}, {lesson.report()}")


def main() -> None:
    """Train, and write both encoders to one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=Path, default=WORK / "scenes.npz")
    parser.add_argument("--init", type=Path, help="begin from these encoders")
    parser.add_argument("--listener", type=Path, help="an all-in-one file: to be understood by it")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    log = Log("text")
    lesson = Lesson(arguments.scenes, init=arguments.init, listener=arguments.listener)
    train(lesson, 60 * arguments.minutes, log)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(arguments.out, lesson.tensors())
    log(f"{lesson.report()}; written to {arguments.out}")


if __name__ == "__main__":
    main()

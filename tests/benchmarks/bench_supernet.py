"""A training step of a supernet: subnets on slices of the weights, against the same subnets by masks on tensors of full size.

    python tests/benchmarks/bench_supernet.py [--draws 6] [--img-sizes 224 112]

The masked step is written here as ViT-ResNAS describes it (https://arxiv.org/abs/2109.00642, section 3.2, and the released code): every
activation has full size, and a mask for each image zeroes what the image's subnet leaves out: channels after the positions and after each
reduction, heads before the projection, hidden units, and the whole residual of a dropped block. Norms take mean and variance over the
channels that are left. Both steps have the same weights, images and subnets; that they compute the same is checked first.

The bound is what the multiply-adds promise: K times the largest network's over the sum of the subnets'. CPU time, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor

from space.catalog import supernet_space
from space.components.attention import merge_heads, split_heads
from space.cost import cost
from space.slicing import subnet_slices
from space.subnet_spec import SubnetSpec
from space.supernet import Supernet, borrowed
from workers.subnet_sampling import SubnetSampler

BATCH_SIZE, NUM_SUBNETS, NUM_RUNS = 8, 2, 3


class MaskedLayerNorm(torch.autograd.Function):
    """LayerNorm over the channels that a mask `(B, 1, C)` keeps, of tokens that are zero elsewhere; the moments as the paper takes them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, kept: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True) / kept
        variance = (x * x).mean(dim=-1, keepdim=True) / kept - mean * mean
        rate = (variance + eps).rsqrt()
        normed = (x - mean) * rate * mask
        ctx.save_for_backward(normed, rate, mask, kept, weight)
        return torch.addcmul(bias, normed, weight) * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, rate, mask, kept, weight = ctx.saved_tensors
        gradient = gradients[0] * mask
        by_normed = gradient * weight
        first = by_normed.mean(dim=-1, keepdim=True) / kept
        second = (by_normed * normed).mean(dim=-1, keepdim=True) / kept
        x = (by_normed - first - normed * second) * rate * mask
        return x, None, None, (gradient * normed).sum(dim=(0, 1)), gradient.sum(dim=(0, 1)), None


class Masks:
    """The masks of the subnets of a step, image i having those of subnet i mod K."""

    def __init__(self, subnets: Sequence[SubnetSpec], batch_size: int):
        self.subnets, self.batch_size = subnets, batch_size

    def prefix(self, sizes: Sequence[int], full: int) -> Tensor:
        """`(B, 1, full)`, true for the first `sizes[k]` entries of the images of subnet k."""
        size = torch.tensor(sizes).repeat(self.batch_size // len(sizes))
        return (torch.arange(full) < size[:, None])[:, None]

    def widths(self, stage: int, full: int) -> Tensor:
        return self.prefix([subnet.arch.stages[stage].embed_dim for subnet in self.subnets], full)

    def block(self, stage: int, number: int, kind: str, choice: str) -> list[int]:
        """The choice of the block in each subnet; 0 where it is dropped."""
        found = []
        for subnet in self.subnets:
            kept = subnet.kept[stage]
            blocks = subnet.arch.stages[stage].blocks
            found.append(int(getattr(blocks[kept.index(number)], kind).choices[choice]) if number in kept else 0)
        return found


def masked_step(network: Any, images: Tensor, subnets: Sequence[SubnetSpec]) -> Tensor:
    """Logits of a ViT-ResNAS supernet by masks."""
    masks = Masks(subnets, len(images))
    x = network.position(network.prefix(network.patch_embed(images)))
    channels = masks.widths(0, x.shape[-1])
    x = x * channels
    for index, stage in enumerate(network.stages):
        for number, block in enumerate(stage.blocks):
            heads, hidden = (masks.block(index, number, *what) for what in (("mixer", "num_heads"), ("feed_forward", "hidden_dim")))
            is_kept = masks.prefix([int(count > 0) for count in heads], 1)
            x = x + masked_attention(block, x, channels, masks, heads) * channels * is_kept
            mlp = block.feed_forward.mlp
            units = F.gelu(mlp.fc1(normed(block.norm2, x, channels)))
            x = x + mlp.fc2(units * masks.prefix(hidden, units.shape[-1])) * channels * is_kept
        if stage.downsampling is not None:
            x = masked_reduction(stage.downsampling, x, channels)
            channels = masks.widths(index + 1, x.shape[-1])
            x = x * channels
    return network.head(normed(network.norm, x, channels)[:, 0])


def masked_attention(block: Any, x: Tensor, channels: Tensor, masks: Masks, heads: Sequence[int]) -> Tensor:
    q, k, v = split_heads(block.mixer.qkv(normed(block.norm1, x, channels)), block.mixer.num_heads)
    attended = F.scaled_dot_product_attention(q, k, v) * masks.prefix(heads, block.mixer.num_heads).transpose(1, 2)[..., None]
    return block.mixer.proj(merge_heads(attended))


def masked_reduction(reduction: Any, x: Tensor, channels: Tensor) -> Tensor:
    def image(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, reduction.grid)

    y = normed(reduction.norm, x, channels)
    patches = reduction.conv(image(y)).flatten(2).transpose(1, 2) + reduction.pos_embed
    residual = torch.cat([x[:, :1], F.avg_pool2d(image(x), 2).flatten(2).transpose(1, 2)], dim=1)
    return torch.cat([reduction.class_proj(y[:, :1]), patches], dim=1) + F.pad(residual, (0, reduction.num_new_channels))


def normed(norm: Any, x: Tensor, mask: Tensor) -> Tensor:
    kept = mask.float().mean(dim=-1, keepdim=True)
    return MaskedLayerNorm.apply(x, mask, kept, norm.weight, norm.bias, norm.eps)


def sliced_step(supernet: Supernet, images: Tensor, subnets: Sequence[SubnetSpec]) -> list[Tensor]:
    embedded = supernet.embed(images)
    return [supernet.run(embedded[place :: len(subnets)], subnet) for place, subnet in enumerate(subnets)]


class Contest:
    """One supernet of an image size, with the ways to take a step of it."""

    def __init__(self, img_size: int):
        self.space = supernet_space("vit_resnas/tiny", img_size=img_size)
        self.supernet = Supernet(self.space.largest, seed=0).train()
        self.optimizer = torch.optim.AdamW(self.supernet.parameters(), lr=1e-5, fused=True)
        self.sampler = SubnetSampler(space=self.space, num_subnets=NUM_SUBNETS, mode="stratified", num_unlocking_epochs=0)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH_SIZE, 3, img_size, img_size, generator=generator)
        self.labels = torch.randint(self.space.largest.num_classes, (BATCH_SIZE,), generator=generator)

    def masks(self, subnets: Sequence[SubnetSpec]) -> Tensor:
        return F.cross_entropy(masked_step(self.supernet.network, self.images, subnets), self.labels)

    def slices(self, subnets: Sequence[SubnetSpec]) -> Tensor:
        parts = sliced_step(self.supernet, self.images, subnets)
        losses = [F.cross_entropy(logits, self.labels[place::NUM_SUBNETS]) for place, logits in enumerate(parts)]
        return sum(losses, torch.zeros(())) / NUM_SUBNETS

    def unmasked(self, subnets: Sequence[SubnetSpec]) -> Tensor:
        return F.cross_entropy(self.supernet.network(self.images), self.labels)

    def check(self, subnets: Sequence[SubnetSpec]) -> None:
        """The masked and the sliced step have the same loss and the same gradients."""
        found = []
        for way in (self.masks, self.slices):
            loss = way(subnets)
            loss.backward()
            found.append({name: parameter.grad for name, parameter in self.supernet.network.named_parameters()} | {"loss": loss.detach()})
            self.supernet.zero_grad(set_to_none=True)
        for name, masked in found[0].items():
            sliced = found[1][name]
            assert masked is not None
            torch.testing.assert_close(torch.zeros_like(masked) if sliced is None else sliced, masked, rtol=1e-3, atol=1e-5)

    def seconds(self, way: Callable[[Sequence[SubnetSpec]], Tensor], subnets: Sequence[SubnetSpec]) -> tuple[float, float]:
        """CPU time of forward and backward, and of the whole step with AdamW: of each the least of several runs."""
        runs = []
        for _ in range(NUM_RUNS):
            began = time.process_time()
            way(subnets).backward()
            both = time.process_time() - began
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            runs.append((both, time.process_time() - began))
        both, step = (min(times) for times in zip(*runs, strict=True))
        return both, step

    def overhead(self, subnets: Sequence[SubnetSpec]) -> tuple[float, float]:
        """Seconds for all slices of the weights, and for bringing gradients of their sizes to their places in full ones."""
        own = dict(self.supernet.network.named_parameters())
        taken, brought = [], []
        for _ in range(NUM_RUNS):
            began = time.process_time()
            parts = [
                (each, own[each.origin], borrowed(each, own[each.origin]))
                for s in subnets
                for each in subnet_slices(s)
                if each.origin in own
            ]
            taken.append(time.process_time() - began)
            # The gradient of `part * 0` is made by one multiplication; the rest of the backward pass is what is measured.
            total = sum(((part * 0).sum() for _, _, part in parts), torch.zeros(()))
            began = time.process_time()
            total.backward()
            brought.append(time.process_time() - began)
            self.supernet.zero_grad(set_to_none=True)
        return min(taken), min(brought)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=6, help="draws of subnets that are measured")
    parser.add_argument("--img-sizes", type=int, nargs="+", default=[224, 112], help="pixels; the last line is of the first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print(f"vit_resnas/tiny, batch {BATCH_SIZE}, {NUM_SUBNETS} subnets a step")
    print("CPU seconds of forward and backward, in parentheses of the step with AdamW")
    ratios = [measure(img_size, arguments.draws) for img_size in arguments.img_sizes]
    print(f"step ratio to masks: {ratios[0]:.2f}")


def measure(img_size: int, num_draws: int) -> float:
    """Print a line for each draw; the median ratio of forward + backward."""
    contest = Contest(img_size)
    contest.check(contest.sampler.sample(0, 0))
    rows = []
    for draw in range(1, num_draws + 1):
        subnets = contest.sampler.sample(0, draw)
        largest, own = cost(contest.space.largest).macs, sum(cost(subnet).macs for subnet in subnets)
        bound = NUM_SUBNETS * largest / own
        masks, slices, unmasked = (contest.seconds(way, subnets) for way in (contest.masks, contest.slices, contest.unmasked))
        rates = (largest / unmasked[0], own / NUM_SUBNETS / slices[0])
        taken, brought = contest.overhead(subnets)
        rows.append((masks[0] / slices[0], bound, masks[0] / unmasked[0], rates[1] / rates[0], taken / slices[0], brought / slices[0]))
        print(
            f"{img_size} px masks {masks[0]:.2f} ({masks[1]:.2f}) slices {slices[0]:.2f} ({slices[1]:.2f}) "
            f"ratio {masks[0] / slices[0]:.2f} ({masks[1] / slices[1]:.2f}) bound {bound:.2f}",
            flush=True,
        )
    ratio, bound, masking, rate, taken, brought = (statistics.median(values) for values in zip(*rows, strict=True))
    print(f"{img_size} px: ratio {ratio:.2f}, which is about the bound {bound:.2f}")
    print(f"    x {masking:.2f}, the work of the masks themselves")
    print(f"    x {rate:.2f}, MACs per second of sliced to those of unmasked steps: narrow")
    print("      products are slower, and work on weights does not shrink with images;")
    print(f"      {100 * taken:.0f} % of a step takes slices, {100 * brought:.0f} % brings gradients to their places")
    return ratio


if __name__ == "__main__":
    main()

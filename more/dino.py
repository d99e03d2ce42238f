"""DINO: self-DIstillation with NO labels (Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin; ICCV 2021,
arXiv 2104.14294).

A student learns to give the answer of a teacher that sees another view of the image. Both are the same network,
backbone and head; its K outputs, the logits s of the student and t of the teacher, become distributions:

    p = softmax(s / T_s)            of the student, from every view                                           (eq. 1)
    q = softmax((t - c) / T_t)      of the teacher, from the two large views; no gradient

    loss = mean over large views i, other views v and images of  -sum over k of q_k(i) log p_k(v)        (eq. 2, 3)
    centre    c <- m_c c + (1 - m_c) mean of t over the large views of the batch, after it was used           (eq. 4)
    teacher   its weights <- m its weights + (1 - m) the student's, after every optimizer step; m rises towards 1

Nothing in the loss prevents collapse, and there are two of them: all outputs alike for every image, or one output that
always wins. Centring prevents the second and invites the first; sharpening, T_t below T_s, does the opposite. Together,
and with a teacher that moves slowly, they balance (section 5.3). `--no-centering` or `--teacher-temperature 0.1` takes
one of them away: it collapses. Multi-crop: from small crops of small parts the student predicts, and they have no q.

What you should see: the loss starts at log K (4.2 at K = 64), or a little above it where T_t is as low as in `quick`,
and falls, to about 1; `entropy`, that of q, falls with it and stays above 0; `entropy_of_mean`, that of the mean of q
over the batch, stays well above it: different images have different outputs. Signs of trouble, which are warned of:
`entropy` at log K, where the loss then stays, too; `entropy_of_mean` near 0, and the loss with it.

    python more/dino.py    some minutes on two CPU cores; with torchrun, --recipe or --data-dir: see README.md
    python more/dino.py --arch vit_tiny --optimizer adamw --base-lr 0.002 --weight-decay 0.04 --epochs 5

The teacher is what is judged, and kept in encoder.pt and heads.pt. A vision transformer's encoder.pt is torchvision's:

    net = torchvision.models.VisionTransformer(image_size=32, patch_size=4, num_layers=4, num_heads=2, hidden_dim=128,
                                               mlp_dim=512)
    net.heads = torch.nn.Identity()  # the output is that of the class token, (n, 128)
    net.load_state_dict(torch.load("runs/dino/encoder.pt"))

Read views, network, loss, and the loop in main. The table at the end says where this departs from the paper.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from common import (
    LARS,
    Crop,
    Draws,
    Flags,
    Run,
    all_gather,
    backbone,
    check_least,
    check_widths,
    color_jitter,
    distribute,
    full_precision,
    grayscale,
    normalize,
    parse_args,
    random_blur,
    refuse,
    solarize,
    warn,
)


@dataclass
class Args(Flags):
    batch_size: int = 64
    epochs: int = 10
    base_lr: float = 4.0
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # momentum 0.9 in lars and sgd; adamw for a vision transformer
    weight_decay_end: float = 0.0  # weight decay at the last step, where a cosine leads to; 0: as at the first
    outputs: int = 64  # K; the paper: 65536
    head_hidden: int = 512  # width of the head's hidden layers
    head_dim: int = 128  # d, width of the embeddings in front of the last layer
    head_batchnorm: bool = True  # in the head; the paper: none with a vision transformer
    norm_last_layer: bool = True  # the last layer's rows keep the norm 1, so that logits are cosines
    student_temperature: float = 0.1  # T_s
    teacher_temperature: float = 0.02  # T_t, the paper: 0.04; as high as T_s nothing is sharpened: training collapses
    teacher_temperature_start: float = 0.04  # where T_t starts, if it has a warm-up
    teacher_warmup_epochs: float = 0  # in which T_t rises linearly
    centering: bool = True  # subtract c; without it, training collapses
    center_momentum: float = 0.2  # m_c, share of c that a step keeps: the centre has to be faster than the teacher
    teacher_momentum: float = 0.95  # m at the first step: the share of itself that the teacher keeps
    freeze_last_layer_epochs: float = 1  # leave the last layer as it is for this many epochs
    clip_grad: float = 0.1  # largest norm of each parameter's gradient; the paper: 3; 0: do not clip
    small_crops: int = 0  # views beside the two large ones; the paper, for large images: 8
    small_size: int = 16  # their side in pixels
    small_scale: tuple[float, float] = (0.14, 0.4)  # share of the area that they keep (ImageNet: 0.05 to 0.14)
    solarize: bool = False  # invert bright values; part of the paper's views


LARGE_CROPS = 2  # the views that the teacher sees
VITS = {"vit_tiny": (4, 128, 4), "vit_small": (16, 384, 12)}  # side of a patch, width, blocks; a head has 64 of width


RECIPES = {
    "quick": {},
    # Solo-learn's for CIFAR, which trains 1000 epochs.
    "cifar": dict(
        dataset="cifar10", arch="resnet18", stem="small", epochs=200, log_every=50, eval_every=10, save_every=10,
        batch_size=256, warmup_epochs=10, base_lr=0.3, crop_min_scale=0.08, solarize=True, outputs=4096,
        head_hidden=2048, head_dim=256, head_batchnorm=False, teacher_temperature=0.07, center_momentum=0.9,
        teacher_momentum=0.9995, clip_grad=0.0,
    ),
    # The official README's ResNet-50. Its vision transformer: --arch vit_small --optimizer adamw --base-lr 5e-4
    # --weight-decay 0.04 --weight-decay-end 0.4 --no-norm-last-layer --crop-min-scale 0.4 --small-scale 0.05 0.4
    # --epochs 100 --batch-size 1024.
    "imagenet": dict(
        dataset="folder", image_size=224, arch="resnet50", workers=12, log_every=50, eval_every=10, save_every=1,
        batch_size=512, epochs=100, warmup_epochs=10, base_lr=0.03, optimizer="sgd", weight_decay=1e-4,
        crop_min_scale=0.14, blur=True, solarize=True, outputs=65536, head_hidden=2048, head_dim=256,
        head_batchnorm=False, teacher_temperature=0.04, center_momentum=0.9, teacher_momentum=0.996, clip_grad=3.0,
        small_crops=8, small_size=96, small_scale=(0.05, 0.14),
    ),
}  # fmt: skip


def check(args: Args) -> None:
    """Refuse impossible values of this method's flags."""
    low, high = args.small_scale
    if args.outputs < 2:
        refuse(f"--outputs {args.outputs}: with fewer than two there is nothing to predict")
    check_least(args, 1e-4, "student_temperature", "teacher_temperature", "teacher_temperature_start")
    check_widths(args, "head_hidden", "head_dim")
    check_least(args, 2, "outputs", most=2**16)  # the paper takes all of them
    check_least(args, 0, "weight_decay_end", "teacher_warmup_epochs", "freeze_last_layer_epochs", "clip_grad")
    for flag, value in (("--center-momentum", args.center_momentum), ("--teacher-momentum", args.teacher_momentum)):
        if not 0 <= value <= 1:
            refuse(f"{flag} {value} is not between 0 and 1")
    if not 0 <= args.small_crops <= 16:
        refuse(f"--small-crops {args.small_crops} must be 0 to 16; the paper takes 8")
    if args.small_crops and not 1 <= args.small_size <= args.image_size:
        refuse(f"--small-size {args.small_size} must be 1 to --image-size {args.image_size}, or --small-crops 0")
    if args.small_crops and not 0 < low <= high <= 1:
        refuse(f"--small-scale {low} {high} must be two shares of the area, the smaller one first")
    if args.arch.startswith("vit"):
        if args.arch not in VITS:
            refuse(f"--arch {args.arch} is unknown; take {' or '.join(VITS)}, or a ResNet")
        patch = VITS[args.arch][0]
        for flag, size in (("--image-size", args.image_size), ("--small-size", args.small_crops and args.small_size)):
            if size % patch:
                refuse(f"{flag} {size} is no multiple of {patch}, the side of a patch of --arch {args.arch}")


# ------------------------------------------------------------------------------------------------------ views


def crops(args: Args) -> list[Crop]:
    """The first step of each view, made where the image is decoded: two large crops, then the small ones."""
    large = Crop(args.image_size, (args.crop_min_scale, 1.0), "bicubic", flip=0.5 * args.flip)
    small = Crop(args.small_size, args.small_scale, "bicubic", flip=0.5 * args.flip)
    return [large] * LARGE_CROPS + [small] * args.small_crops


def augment(x: Tensor, draws: Draws, args: Args, blur: float, solarization: float) -> Tensor:
    """The rest of a view, (n, 3, s, s) in [0, 1] -> normalised; every image has its own draws.

    The views differ in the probabilities `blur` and `solarization` only.
    """
    if args.color_jitter:
        x = color_jitter(x, draws, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
    if args.grayscale:
        x = grayscale(x, draws.chance(0.2))
    if args.blur:
        x = random_blur(x, draws, p=blur)
    if args.solarize:
        x = solarize(x, draws.chance(solarization))
    return normalize(x, args.mean, args.std)


# ---------------------------------------------------------------------------------------------------- network


class VisionTransformer(torchvision.models.VisionTransformer):
    """torchvision's, under the same names, without its classifier, and for small crops, too: (n, 3, s, s) -> (n, d),
    the output of the class token. s is any multiple of the patch.
    """

    def __init__(self, arch: str, image_size: int):
        patch, d, blocks = VITS[arch]
        super().__init__(image_size, patch, blocks, num_heads=d // 64, hidden_dim=d, mlp_dim=4 * d)
        self.heads = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).mT  # n×3×s×s -> n×d×(s/patch)² -> n×(s/patch)²×d
        positions = resize_positions(self.encoder.pos_embedding, x.shape[1])
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + positions  # n×(1+(s/patch)²)×d
        return self.encoder.ln(self.encoder.layers(x))[:, 0]  # n×d


def resize_positions(embedding: Tensor, patches: int) -> Tensor:
    """Position embeddings (1, 1 + m, d) of the class token and a square of m patches -> (1, 1 + patches, d), bicubic.
    Those of the class token stay; so do all where m is `patches`.
    """
    side, new = (math.isqrt(count) for count in (embedding.shape[1] - 1, patches))
    if side == new:
        return embedding
    grid = embedding[:, 1:].mT.unflatten(2, (side, side))  # 1×d×side×side
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)  # 1×d×new×new
    return torch.cat([embedding[:, :1], grid.flatten(2).mT], 1)


class Head(nn.Module):
    """(n, width) -> embeddings of length 1, (n, d), and logits, (n, K)."""

    def __init__(self, width: int, args: Args):
        super().__init__()
        hidden, d = args.head_hidden, args.head_dim
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden) if args.head_batchnorm else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden) if args.head_batchnorm else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden, d),
        )
        for linear in (self.mlp[0], self.mlp[3], self.mlp[6]):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.last = weight_norm(nn.Linear(d, args.outputs, bias=False))  # row k is g_k v_k/|v_k|
        norm = self.last.parametrizations.weight.original0  # K×1, g
        nn.init.ones_(norm).requires_grad_(not args.norm_last_layer)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        z = self.mlp(h)  # n×width -> n×d
        with torch.autocast(z.device.type, enabled=False):  # T_t would magnify what a half type rounds off
            z = F.normalize(full_precision(z), dim=1)  # n×d
            return z, self.last(z)  # n×K


class DINO(nn.Module):
    """The student. Crops of one size pass the backbone as one batch, all pass the head as one."""

    def __init__(self, args: Args):
        super().__init__()
        if args.arch in VITS:
            self.backbone, width = VisionTransformer(args.arch, args.image_size), VITS[args.arch][1]
        else:
            self.backbone, width = backbone(args.arch, args.stem, zero_init=False)
        self.head = Head(width, args)

    def forward(self, views: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        large, small = views[:LARGE_CROPS], views[LARGE_CROPS:]
        h = self.backbone(torch.cat(large))  # 2n×3×s×s -> 2n×width
        if small:
            h = torch.cat([h, self.backbone(torch.cat(small))])  # Vn×width
        z, logits = self.head(h)  # Vn×d, Vn×K
        return z.chunk(len(views)), logits.chunk(len(views))  # n×d and n×K each


class Teacher(nn.Module):
    """Backbone and head, at first a copy of the student's, never given a gradient; and the centre of their logits.

    It runs in train mode: BatchNorm normalises with the statistics of the batch, as in the student.
    """

    def __init__(self, student: DINO):
        super().__init__()
        self.backbone = copy.deepcopy(student.backbone)
        self.head = copy.deepcopy(student.head)
        self.requires_grad_(False)
        self.register_buffer("center", torch.zeros_like(self.head.last.weight[:, 0]))  # K

    @torch.no_grad()
    def forward(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        _, logits = self.head(self.backbone(torch.cat(views)))  # 2n×3×s×s -> 2n×width -> 2n×K
        return logits.chunk(len(views))  # n×K each


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, m: float) -> None:
    """Weights <- m weights + (1 - m) the student's, for every parameter of the teacher, matched by name, in one call.

    Buffers are left alone: the teacher's running statistics come from its own passes.
    """
    theirs = dict(student.named_parameters())
    mine = dict(teacher.named_parameters())
    torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1 - m)


# ------------------------------------------------------------------------------------------------------- loss


def dino_loss(
    student: list[Tensor], teacher: list[Tensor], center: Tensor, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy (eq. 2, 3) between the teacher's and the student's distributions of other views.

    Logits of this rank's images: `student`, (n, K) for each of V views; `teacher`, (n, K) for the first of these;
    `center` (K). The teacher's are constants. The mean over the pairs and over this rank's images; the mean of that
    over ranks is the loss of the global batch. In float32 (float64 stays). Terms: the mean entropy of q; the entropy of
    the mean of q over the teacher's views of all ranks' images; how often the first output is the same for both.
    """
    if not 1 <= len(teacher) <= len(student) or len(student) < 2:
        raise ValueError(
            f"DINO needs at least two views, and a teacher for 1 to all, not {len(teacher)}/{len(student)}"
        )
    with torch.autocast(center.device.type, enabled=False):
        log_p = [F.log_softmax(full_precision(s) / student_temperature, dim=1) for s in student]  # n×K each
        with torch.no_grad():
            q = [F.softmax((full_precision(t) - center) / teacher_temperature, dim=1) for t in teacher]  # n×K each
        pairs = [(i, v) for i in range(len(q)) for v in range(len(log_p)) if v != i]
        loss = torch.stack([-(q[i] * log_p[v]).sum(1).mean() for i, v in pairs]).mean()
        with torch.no_grad():
            hits = [(q[i].argmax(1) == log_p[v].argmax(1)).to(loss.dtype).mean() for i, v in pairs]
            every = torch.cat(q)  # 2n×K
            mean = all_gather(every.mean(0, keepdim=True)).mean(0)  # K
            entropy, entropy_of_mean = torch.special.entr(every).sum(1).mean(), torch.special.entr(mean).sum()
    return loss, {"entropy": entropy, "entropy_of_mean": entropy_of_mean, "accuracy": torch.stack(hits).mean()}


@torch.no_grad()
def update_center(center: Tensor, teacher: list[Tensor], momentum: float) -> Tensor:
    """The next centre (K), eq. 4, from this rank's logits (n, K) of each view the teacher saw: the mean is over the
    images of all ranks.
    """
    mean = all_gather(torch.cat([full_precision(t) for t in teacher]).mean(0, keepdim=True)).mean(0)  # K
    return momentum * center + (1 - momentum) * mean


def warn_of_collapse(step: int, terms: dict[str, Tensor], outputs: int, told: str) -> str:
    """Warn if q has collapsed in one of the two ways, unless that was just `told`; return what there is to tell."""
    entropy, entropy_of_mean, most = float(terms["entropy"]), float(terms["entropy_of_mean"]), math.log(outputs)
    sign = ""
    if entropy > 0.99 * most:
        sign = f"the teacher gives all outputs alike (entropy {entropy:.4g} of {most:.4g}): lower --teacher-temperature"
    elif entropy_of_mean < 0.1 * most:
        sign = f"one output wins for all images (entropy of the mean {entropy_of_mean:.2g} of {most:.4g}): centre more"
    if sign and not told:
        warn(f"collapse at step {step}: {sign}")
    return sign


# --------------------------------------------------------------------------------------------------- training


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def teacher_temperature(args: Args, epoch: float) -> float:
    """T_t after so many epochs: linear from its start over the warm-up, then constant."""
    share = min(1.0, epoch / args.teacher_warmup_epochs) if args.teacher_warmup_epochs else 1.0
    return (1 - share) * args.teacher_temperature_start + share * args.teacher_temperature


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float) -> None:
    """Shorten the gradient of each parameter on its own to at most `norm`."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    factors = (norm / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, list(factors.unbind()))


def main(args: Args) -> dict[str, float]:
    """Train; return the last value of every metric."""
    run = Run("dino", args, RECIPES)  # processes, device, images, seed
    args = run.args
    check(args)

    model = run.place(DINO(args))  # on the device; --init; BatchNorm over the images of all processes
    teacher = Teacher(model)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]  # biases and BatchNorm
    # Neither adapted nor decayed: LARS obeys `adapt`; SGD does not know it, and takes the decay of 0.
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "adapt": False}]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay)
    else:
        make = LARS if args.optimizer == "lars" else torch.optim.SGD
        optimizer = make(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    run.start(model=teacher, student=model, optimizer=optimizer)  # the teacher is judged and kept in encoder.pt
    network = distribute(model)  # averages gradients over processes: common.py tells why that is exact
    peak_lr = args.base_lr * args.batch_size / 256
    decay_end = args.weight_decay_end or args.weight_decay
    kinds = [(1.0, 0.0), (0.1, 0.2)] + [(0.5, 0.0)] * args.small_crops  # of each view: blur, solarization
    told = ""  # the collapse that was last warned of

    for step, views in run.batches(crops(args)):
        lr = run.schedule(step, peak_lr, final=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = lr
        progress, epoch = step / run.total_steps, step / run.steps_per_epoch
        optimizer.param_groups[0]["weight_decay"] = cosine(args.weight_decay, decay_end, progress)
        xs = [augment(*view, args, *kind) for view, kind in zip(views, kinds, strict=True)]  # n×3×s×s each
        with run.autocast:
            zs, student = network(xs)  # n×d and n×K for each crop
            targets = teacher(xs[:LARGE_CROPS])  # n×K each
        t_t = teacher_temperature(args, epoch)
        loss, terms = dino_loss(student, targets, teacher.center, args.student_temperature, t_t)
        if args.centering:
            teacher.center.copy_(update_center(teacher.center, targets, args.center_momentum))  # for the next step

        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        if args.clip_grad:
            run.scaler.unscale_(optimizer)
            clip_gradients(model, args.clip_grad)
        if epoch < args.freeze_last_layer_epochs:
            model.head.last.zero_grad()  # to None: the optimizer leaves out decay and momentum, too
        run.scaler.step(optimizer)
        run.scaler.update()
        # After the optimizer, so that the average takes in the new weights.
        update_teacher(teacher, model, cosine(args.teacher_momentum, 1.0, progress))
        run.report(step + 1, loss, terms, lr, zs[0])
        if (step + 1) % args.log_every == 0:
            told = warn_of_collapse(step + 1, terms, args.outputs, told)
    return run.close()


if __name__ == "__main__":
    main(parse_args(Args, RECIPES))

# ------------------------------------------ where this file, the paper and the official code differ
#
# (–: it does not say)  here                                   paper             official code
#
# vision transformer    torchvision's and its initial weights  DeiT's (1)        stochastic depth 0.1 in the student;
#                                                                                truncated normal weights
# teacher temperature   its warm-up is linear in steps         linear            linear, epoch by epoch
# schedules             of all steps                           –                 end one step early
# last layer            normalised; ViT-S: as a flag           –                 normalised, but not for ViT-S
# logits                in float32 under autocast, too (2)     –                 fp16 or bf16
# ResNet-50             100 epochs, batch 512, SGD             800, 4080, LARS   as here, in its README
# blur                  Gaussian; the border is mirrored       –                 Pillow's boxes; the border is repeated
# small images          few outputs, sharper targets, a fast   –                 –
#                       teacher and a faster centre (3), and
#                       BatchNorm in the head, in `quick`
#
# (1) Patches of 16 or 8; ViT-S has a width of 384, 12 blocks and 6 heads. `vit_tiny` is ours: patches of 4, a width of
#     128, 4 blocks and 2 heads. Its positions are resized for small crops, as in the official code.
# (2) In bf16 a logit near 1 is exact to 1/256, and T_t magnifies that.
# (3) At first no view can be told from another, and the student learns what the teacher says on average. A centre that
#     lags behind the teacher lets that average grow, until few outputs are used.

"""One summary at the start of a run: model, classes, memory, batch, learning rate, length."""

import math

import paddle

from utils.system import available_memory, ranks_here


def summarize(run, num_images: int, resume: dict | None) -> str:
    """Lines for the log; ``run`` is ``run_state.Run``."""
    config, head = run.config, run.head
    world_size = run.replica.world_size
    num_parameters, num_trained = count_parameters(run.replica.backbone)
    slots = {"sgd": 1, "lars": 1, "adamw": 2}
    backbone_mb = 4 * (num_parameters + num_trained * (1 + slots[config.optim.name])) / 2**20
    head_mb = 4 * head.shard.num_local * head.embedding_size * (1 + slots[config.head_options()["optimizer"]]) / 2**20
    sampled = max(1, round(head.shard.num_local * head.sample_rate))
    images = run.images_per_update
    logits_mb = 4 * sampled * images / run.accumulation / 2**20
    base = config.optim
    scaling = "" if base.lr_batch is None else f" ({base.lr:g} x {images} / {base.lr_batch})"
    schedule = run.schedule
    margin = ", ".join(f"{key}={value}" for key, value in config.head.margin.kwargs().items())
    lines = [
        f"model      {config.model.network}: {num_parameters:,} parameters, embedding {head.embedding_size}, "
        f"input {config.model.input_size}, {config.run.precision} on {paddle.get_device()}, "
        f"paddle {paddle.__version__}",
        f"head       {config.head.margin.name}({margin}), {head.shard.num_classes:,} classes, {head.shard.num_local:,} "
        f"on this rank, sample_rate {head.sample_rate:g} ({sampled:,} an update)",
        f"memory     about {backbone_mb + head_mb + logits_mb:,.0f} MB a rank before activations: backbone "
        f"{backbone_mb:,.0f}, head {head_mb:,.0f}, logits {logits_mb:,.0f}",
        f"data       {num_images:,} images ({_places(config.data)})",
        f"batch      {images} images an update = {world_size} rank(s) x {run.loader.batch_size} x {run.accumulation} "
        "micro-batch(es)",
        f"optimiser  {base.name}, lr {schedule.base_lr:g}{scaling}, {schedule.name} schedule, warm-up "
        f"{schedule.warmup_steps} updates, clip {base.clip_norm:g}",
        f"length     {schedule.total_steps:,} updates, {schedule.steps_per_epoch:,} an epoch",
        f"output     {config.run.output}",
    ]
    needed_mb, free = backbone_mb + head_mb + logits_mb, available_memory(paddle.get_device(), ranks_here(world_size))
    if free is not None and needed_mb > free / 2**20:
        lines.append(
            f"warning    a rank needs {needed_mb:,.0f} MB before activations and has {free / 2**20:,.0f} MB; lower "
            "run.batch_size or head.sample_rate, or use more ranks (python tools/plan.py estimates all of it)"
        )
    if resume is not None:
        lines.append(f"resume     {resume['path']}: update {resume['step']}, saved by {resume['world_size']} rank(s)")
    return "\n".join(["run:", *lines])


def count_parameters(layer: paddle.nn.Layer) -> tuple[int, int]:
    """Number of weights, and of those that are trained, as PyTorch counts them: without the running means and variances
    of batch norms, which Paddle has among the parameters."""
    own = [p for name, p in layer.named_parameters() if name.rpartition(".")[2] not in ("_mean", "_variance")]
    return sum(math.prod(p.shape) for p in own), sum(math.prod(p.shape) for p in own if not p.stop_gradient)


def _places(data) -> str:
    if isinstance(data.root, tuple):
        return f"several sets: {', '.join(data.root)}"
    return f"{data.kind}: {data.root or data.list_file or 'made here'}"
